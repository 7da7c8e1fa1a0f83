"""The golden end-to-end MoME as its authors' files lie, for tests that change them and convert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing

from moiie_export.convert import ConvertResult, Originals, convert

GOLDEN = Path(__file__).parent / "golden" / "mome" / "end_to_end"
Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 320,
    },
    "vision_experts": [
        {
            "name": "clip",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 139,
        },
        {"name": "dino", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
        {
            "name": "pix2struct",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "d_kv": 8,
            "d_ff": 32,
            "seq_len": 256,
        },
    ],
    "generation": {"max_length_including_bos": 13},
}
"""What --config says about the golden model."""

SMALL_BERT = {
    "hidden_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "intermediate_size": 8,
    "vocab_size": 12,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class OfficialLayout:
    """A copy of the authors' files in one directory."""

    path: Path

    @property
    def originals(self) -> Originals:
        """Where the files are; the first of each kind that exists."""
        files = {name: next(self.path.glob(f"{name}.*")) for name in ("MoME_ckpt", "eva_vit_g", "dinov2")}
        return Originals(
            files["MoME_ckpt"],
            self.path / "llm",
            files["eva_vit_g"],
            files["dinov2"],
            self.path / "pix2struct",
            self.path / "sentence",
        )

    @property
    def arguments(self) -> list[str]:
        """The command line that converts it, without -o."""
        originals = self.originals
        options = {name: getattr(originals, name) for name in ("vicuna", "eva", "dino", "pix2struct", "sentence")}
        named = [word for name, path in options.items() for word in (f"--{name}", str(path))]
        return [str(originals.checkpoint), *named, "--config", str(self.path / "mome.json")]

    def convert(self, output: str = "out", **options: Any) -> ConvertResult:
        """Convert into a directory beside the files."""
        return convert(self.originals, self.path / output, self.path / "mome.json", **options)

    def sizes(self, changes: Mapping[str, Any]) -> None:
        """Write mome.json anew."""
        (self.path / "mome.json").write_text(json.dumps({**SIZES, **changes}), encoding="utf-8")

    def tensors(self, file: str, change: Callable[[Tensors], Tensors]) -> None:
        """Replace a file's tensors by what `change` makes of them."""
        path = self.path / f"{file}.safetensors"
        changed = {name: value.contiguous().clone() for name, value in change(load_file(path)).items()}
        save_file(changed, path)

    def pickle(self, file: str, wrap: Callable[[Tensors], Any] = dict) -> Path:
        """Write a file's tensors as a pickle in its place."""
        path = self.path / f"{file}.safetensors"
        torch.save(wrap(load_file(path)), path.with_suffix(".pth"))
        path.unlink()
        return path.with_suffix(".pth")


def write_layout(directory: Path) -> OfficialLayout:
    """The golden files with a tiny sentence encoder."""
    directory.mkdir(exist_ok=True)
    for name in ("llm", "encoders/pix2struct"):
        shutil.copytree(GOLDEN / name, directory / Path(name).name)
    for name in ("MoME_ckpt.safetensors", "encoders/eva_vit_g.safetensors", "encoders/dinov2.safetensors"):
        shutil.copy(GOLDEN / name, directory)
    write_sentence_encoder(directory / "sentence")
    layout = OfficialLayout(directory)
    layout.sizes({"sentence_encoder_config": SMALL_BERT})
    return layout


def first_stage(held: Tensors) -> Tensors:
    """One adapter a layer: the third of the golden ones."""
    kept = {n: v for n, v in held.items() if ".mlp.adapter." not in n}
    chosen = {n.replace("adapters.2.", ""): v for n, v in held.items() if ".adapter.adapters.2." in n}
    return kept | chosen


def write_sentence_encoder(directory: Path) -> None:
    """A BERT of the golden embedding's width as sentence-transformers saves one, with made-up weights."""
    directory.mkdir()
    size, inner, rng = SMALL_BERT["hidden_size"], SMALL_BERT["intermediate_size"], np.random.default_rng(0)
    layer, attention = "encoder.layer.0.", "encoder.layer.0.attention."
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (SMALL_BERT["vocab_size"], size),
        "embeddings.position_embeddings.weight": (SMALL_BERT["max_position_embeddings"], size),
        "embeddings.token_type_embeddings.weight": (2, size),
        "pooler.dense.weight": (size, size),
        "pooler.dense.bias": (size,),
    }
    for name, rows, columns in (
        *((f"{attention}self.{part}", size, size) for part in ("query", "key", "value")),
        (f"{attention}output.dense", size, size),
        (f"{layer}intermediate.dense", inner, size),
        (f"{layer}output.dense", size, inner),
    ):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("embeddings.LayerNorm", f"{attention}output.LayerNorm", f"{layer}output.LayerNorm"):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    tensors = {name: torch.from_numpy(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    tensors["embeddings.position_ids"] = torch.arange(SMALL_BERT["max_position_embeddings"])[None]
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12, **SMALL_BERT}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": false}')
    (directory / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": size}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this"])}
    tokenizer = Tokenizer(WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
