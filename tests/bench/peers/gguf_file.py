"""A LLaMA-style checkpoint, dense or mixture of experts, as a GGUF file in Q4_0; needs the package gguf."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Load = Callable[[str], np.ndarray]
_PLAIN = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FFN = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its name there, the checkpoint's tensors it is made of, and what is done to them.

    Attributes:
        heads: of a projection whose rows llama.cpp's rotary embedding wants reordered; 0 for none.
        stacked: whether the sources become one tensor [experts, rows, columns].
        quantised: whether it is stored as Q4_0; else as float32.
    """

    name: str
    sources: tuple[str, ...]
    heads: int = 0
    stacked: bool = False
    quantised: bool = True

    def values(self, load: Load) -> np.ndarray:
        """float32 values in the file's order of rows."""
        parts = [load(source).astype(np.float32, copy=False) for source in self.sources]
        value = np.stack(parts) if self.stacked else parts[0]
        return interleaved(value, self.heads) if self.heads else value


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj so that the two halves of each head alternate, as llama.cpp rotates neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def gguf_tensors(config: Mapping[str, Any]) -> Iterator[GgufTensor]:
    """All tensors of the file, from the keys of config.json."""
    yield GgufTensor("token_embd.weight", ("model.embed_tokens.weight",))
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        for source, name in _PLAIN.items():
            yield GgufTensor(f"{theirs}{name}.weight", (f"{ours}{source}.weight",), quantised=False)
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": 0}
        for letter, count in heads.items():
            yield GgufTensor(f"{theirs}attn_{letter}.weight", (f"{ours}self_attn.{letter}_proj.weight",), heads=count)
        yield GgufTensor(f"{theirs}attn_output.weight", (f"{ours}self_attn.o_proj.weight",))
        yield from _feed_forward(config.get("num_experts", 0), theirs, ours + "mlp.")
    yield GgufTensor("output_norm.weight", ("model.norm.weight",), quantised=False)
    yield GgufTensor("output.weight", ("lm_head.weight",))


def _feed_forward(experts: int, theirs: str, ours: str) -> Iterator[GgufTensor]:
    for source, name in _FFN.items():
        if experts:
            parts = tuple(f"{ours}experts.{expert}.{source}.weight" for expert in range(experts))
            yield GgufTensor(f"{theirs}{name}_exps.weight", parts, stacked=True)
        else:
            yield GgufTensor(f"{theirs}{name}.weight", (f"{ours}{source}.weight",))
    if experts:
        yield GgufTensor(f"{theirs}ffn_gate_inp.weight", (f"{ours}gate.weight",), quantised=False)


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write `target` from a checkpoint directory with one float32 model.safetensors."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    with safe_open(checkpoint / "model.safetensors", framework="np") as file:
        for tensor in gguf_tensors(config):
            value = tensor.values(file.get_tensor)
            if tensor.quantised:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(tensor.name, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if config.get("num_experts"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
