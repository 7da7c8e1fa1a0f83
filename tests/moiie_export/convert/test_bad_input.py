"""Files that do not belong together: one error each, with the file, the tensor or key, what was expected and what to do."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_runtime.errors import MoiieError
from tests.mome_layout import OfficialLayout, Tensors

LLM = "llm_model.model.layers.1.mlp.adapter."
Change = Callable[[Tensors], Tensors]


def without(*parts: str) -> Change:
    return lambda held: {name: value for name, value in held.items() if not any(part in name for part in parts)}


def with_(**tensors: torch.Tensor) -> Change:
    return lambda held: held | {name.replace("__", "."): value for name, value in tensors.items()}


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda held: {**held, name: change(held[name])}


def refused(layout: OfficialLayout, message: str, hint: str = "") -> None:
    """The conversion fails with these words and leaves nothing."""
    before = sorted(path.name for path in layout.path.iterdir())
    with pytest.raises(MoiieError, match=message) as caught:
        layout.convert()
    assert str(layout.path) in caught.value.message
    assert hint in (caught.value.hint or "")
    assert sorted(path.name for path in layout.path.iterdir()) == before


TENSORS: list[tuple[str, Change, str, str]] = [
    (
        "MoME_ckpt",
        without("dino_selector.reference_points"),
        "1 tensor.s. missing, the first: .dino_selector.reference_points., .*expected 1056099 trained values .* found 1055587",
        "--config",
    ),
    ("MoME_ckpt", without("router_mlp"), r"8 tensor.s. missing, the first: 'llm_model.model.layers.0.mlp.adapter.", ""),
    (
        "MoME_ckpt",
        without(".adapter."),
        "48 tensor.s. missing, the first: 'llm_model.*router_mlp.0.weight'",
        "incomplete",
    ),
    ("MoME_ckpt", without(f"{LLM}adapters.3.scale"), f"1 tensor.s. missing, the first: '{LLM}adapters.3.scale'", ""),
    (
        "MoME_ckpt",
        replaced(f"{LLM}adapters.0.up_proj.weight", lambda value: value[:, :32]),
        rf"'{LLM}adapters.0.up_proj.weight': expected shape \[32, 64\], found \[32, 32\] \(expected 1056099",
        "--config",
    ),
    (
        "MoME_ckpt",
        with_(**{f"{LLM}adapters.4.scale": torch.ones(1)}),
        f"tensor '{LLM}adapters.4.scale': not a part of the model",
        "another variant",
    ),
    ("MoME_ckpt", with_(clip_selector__x=torch.ones(1)), "tensor 'clip_selector.x': not a part of the model", ""),
    ("MoME_ckpt", with_(**{f"{LLM}scale": torch.ones(1)}), "adapters of both stages: found", "one stage"),
    (
        "MoME_ckpt",
        replaced("clip_ln.weight", lambda value: torch.where(value == value[7], torch.nan, value)),
        "tensor 'clip_ln.weight', row 7: expected finite weights, found nan",
        "damaged",
    ),
    (
        "MoME_ckpt",
        replaced("clip_ln.bias", lambda value: value.to(torch.int8)),
        "tensor 'clip_ln.bias': expected F64, F32, F16, BF16, found I8",
        "not quantised",
    ),
    (
        "eva_vit_g",
        without("blocks.1."),
        "a tower of another size: expected 2 or 3 blocks of width 32 and patches of 14, found 1, 32 and 14",
        "eva_vit_g.pth",
    ),
    ("eva_vit_g", replaced("patch_embed.proj.weight", lambda v: v[:24]), "found 2, 24 and 14", "--config"),
    ("eva_vit_g", replaced("pos_embed", lambda v: v[:, :50]), r"'pos_embed': expected shape \[1, 257, 32\], found", ""),
    ("eva_vit_g", without("q_bias"), "2 tensor.s. missing, the first: 'blocks.0.attn.q_bias'", ""),
    ("eva_vit_g", without("patch_embed"), "no eva tower under its authors' names: expected tensor 'patch_embed", ""),
    (
        "dinov2",
        replaced("patch_embed.proj.weight", lambda value: value[..., :12, :12]),
        "a tower of another size: expected 2 blocks of width 24 and patches of 14, found 2, 24 and 12",
        "dinov2_vitl14_pretrain.pth",
    ),
    ("dinov2", replaced("pos_embed", lambda v: v[:, :257]), r"'pos_embed': expected shape \[1, 1370, 24\], found", ""),
    ("dinov2", with_(register_tokens=torch.ones(1, 4, 24)), "'register_tokens': not a part of the model", ""),
    ("pix2struct/model", without("layernorm.weight"), "missing, the first: 'layernorm.weight'", "pix2struct-base"),
    ("pix2struct/model", replaced("layernorm.weight", lambda v: v[:8]), r"expected shape \[16\], found \[8\]", ""),
    ("llm/model", without("layers.1.mlp.up_proj"), "missing, the first: 'model.layers.1.mlp.up_proj.weight'", "Vicuna"),
    ("llm/model", with_(model__layers__2__x=torch.ones(2)), "'model.layers.2.x': not a part of the model", ""),
    ("sentence/model", without("word_emb"), "missing, the first: 'embeddings.word_embeddings.weight'", "MiniLM"),
    ("sentence/model", with_(cls__bias=torch.ones(2)), "tensor 'cls.bias': not a part of the model", ""),
]


@pytest.mark.parametrize(("file", "change", "message", "hint"), TENSORS)
def test_tensors_that_do_not_fit(layout: OfficialLayout, file: str, change: Change, message: str, hint: str) -> None:
    layout.tensors(file, change)
    refused(layout, message, hint)


CONFIGS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "llm",
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
        "llm/config.json: another model: hidden_size: expected 32, found 64; num_attention_heads: expected 4, found 8",
        "give Vicuna-7B v1.5",
    ),
    ("llm", {"rms_norm_eps": 1e-6}, "another model: rms_norm_eps: expected 1e-05, found 1e-06", "--config"),
    ("llm", {"num_key_value_heads": 2}, "another model: num_key_value_heads: expected 4, found 2", ""),
    ("llm", {"model_type": "mistral"}, "llm/config.json: model_type: 'mistral' is not implemented", ""),
    (
        "llm",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "llm/config.json: rope_scaling: .* not implemented",
        "",
    ),
    ("llm", {"bos_token_id": 5}, r"llm/config.json: bos_token_id: expected \[1\], found \[5\]", ""),
    (
        "pix2struct",
        {"num_attention_heads": 4, "d_kv": 4},
        "pix2struct/config.json: another model: num_attention_heads: expected 2, found 4; d_kv: expected 8, found 4",
        "give google/pix2struct-base",
    ),
    ("pix2struct", {"model_type": "vit"}, "pix2struct/config.json: model_type: 'vit' is not implemented", ""),
    ("pix2struct", {"model_type": "pix2struct"}, "pix2struct/config.json: vision_config: missing", ""),
    ("pix2struct", {"dense_act_fn": "relu"}, "pix2struct/config.json: dense_act_fn: 'relu' is not implemented", ""),
    ("sentence", {"num_attention_heads": 6}, "another model: num_attention_heads: expected 12, found 6", "MiniLM"),
    ("sentence", {"model_type": "mpnet"}, "sentence/config.json: model_type: 'mpnet' is not implemented", ""),
]


@pytest.mark.parametrize(("directory", "changes", "message", "hint"), CONFIGS)
def test_configs_that_do_not_fit(
    layout: OfficialLayout, directory: str, changes: dict[str, Any], message: str, hint: str
) -> None:
    edit(layout.path / directory / "config.json", changes)
    refused(layout, message, hint)


def edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_length_or_pooling_of_sentences(layout: OfficialLayout) -> None:
    edit(layout.path / "sentence" / "sentence_bert_config.json", {"max_seq_length": 128})
    refused(layout, "sentence_bert_config.json: max_seq_length: expected 256, found 128")
    edit(layout.path / "sentence" / "sentence_bert_config.json", {"max_seq_length": 256})
    edit(layout.path / "sentence" / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    refused(layout, "1_Pooling/config.json: expected pooling_mode_mean_tokens alone, found pooling_mode_cls_token, p")


def test_towers_in_each_other_s_place(layout: OfficialLayout) -> None:
    eva, dino, spare = (layout.path / f"{name}.safetensors" for name in ("eva_vit_g", "dinov2", "spare"))
    eva.rename(spare)
    dino.rename(eva)
    spare.rename(dino)
    refused(layout, "eva_vit_g.safetensors: a tower of another size: .* width 32 .*, found 2, 24 and 14")


def test_tokenizers(layout: OfficialLayout) -> None:
    tokenizer = layout.path / "llm" / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text("{}")
    refused(layout, "llm/tokenizer.json: not a tokenizer")
    longer = json.loads(whole)
    longer["model"]["vocab"] |= {f"word{n}": 1000 + n for n in range(9)}
    tokenizer.write_text(json.dumps(longer))
    refused(layout, "llm: the tokenizer has 329 entries, the embedding only 320 rows", "another model")
    tokenizer.unlink()
    refused(layout, "llm: no tokenizer.json", "--vicuna")
    (layout.path / "llm" / "tokenizer.model").write_bytes(b"\x0a\x0e")
    refused(layout, "llm: no tokenizer.json, only tokenizer.model", "save_pretrained")
    tokenizer.write_text(whole)
    (layout.path / "sentence" / "tokenizer.json").unlink()
    refused(layout, "sentence: no tokenizer.json", "--sentence")


class RunsCode:
    """A pickle of this creates a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["MoME_ckpt", "eva_vit_g", "dinov2"])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(layout: OfficialLayout, file: str) -> None:
    trap = layout.path / "trap"
    layout.pickle(file, lambda held: {"model": dict(held), "config": RunsCode(trap)})
    refused(layout, rf"{file}.pth: refused, it wants to run '.*mkdir': a pickle can run any code")
    assert not trap.exists()


def test_pickles_of_something_else(layout: OfficialLayout) -> None:
    path = layout.pickle("MoME_ckpt", lambda held: list(held.values())[:2])
    refused(layout, "MoME_ckpt.pth: expected a dict of tensors, found list")
    torch.save({"epoch": 1, "weights": {"x": torch.ones(1)}}, path)
    refused(layout, "MoME_ckpt.pth: tensor 'epoch': expected a tensor, found int")
    torch.save({"model": {"x": torch.ones(1), "y": "text"}}, path)
    refused(layout, "MoME_ckpt.pth: tensor 'y': expected a tensor, found str")


def test_a_zip_bomb_is_refused_before_it_is_inflated(layout: OfficialLayout) -> None:
    path = layout.pickle("MoME_ckpt")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * (64 << 20))
    assert path.stat().st_size < 1 << 20
    refused(layout, "'archive/data.pkl' is compressed or too large, which torch.save never does")


@pytest.mark.parametrize("file", ["MoME_ckpt.safetensors", "dinov2.pth", "llm/model.safetensors"])
def test_truncated_files(layout: OfficialLayout, file: str) -> None:
    if file.endswith(".pth"):
        layout.pickle(file.removesuffix(".pth"))
    path = layout.path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(layout, f"{file}: .*", "incomplete")


def test_files_and_directories_of_the_wrong_kind(layout: OfficialLayout) -> None:
    eva = layout.path / "eva_vit_g.safetensors"
    eva.rename(layout.path / "kept")
    eva.mkdir()
    refused(layout, "eva_vit_g.safetensors: expected the eva file, found a directory")
    eva.rmdir()
    shutil.copy(layout.path / "kept", layout.path / "eva_vit_g.onnx")
    refused(layout, "eva_vit_g.onnx: expected the eva file with the ending .pth, .pt, .bin, .safetensors")
    (layout.path / "eva_vit_g.onnx").unlink()
    shutil.copy(layout.path / "kept", layout.path / "eva_vit_g.pth")
    refused(layout, "eva_vit_g.pth: expected a torch file")
    (layout.path / "eva_vit_g.pth").unlink()
    (layout.path / "kept").rename(eva)
    shutil.rmtree(layout.path / "pix2struct")
    refused(layout, "pix2struct: no such directory")
    shutil.copy(eva, layout.path / "pix2struct")
    refused(layout, "pix2struct: expected a checkpoint directory, found a file")
