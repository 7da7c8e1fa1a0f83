"""The decoder's half of a weight map: embedding, attention, feed-forward or experts, head (spec moiie.md, 4.1)."""

from __future__ import annotations

from collections.abc import Iterator

from moiie_export.model_config import ModelConfig, MoeConfig
from moiie_export.weights import CHECKPOINT, Part, Shape, Weight


def whole(name: str, tensor: str, shape: Shape, *, keep_float32: bool = False, source: str = CHECKPOINT) -> Weight:
    """A weight that is one checkpoint tensor; vectors are always float32."""
    return Weight(name, shape, (Part(source, tensor, shape),), keep_float32 or len(shape) == 1)


def decoder_weights(config: ModelConfig, rows: int, prefix: str = "") -> Iterator[Weight]:
    """Embedding, layers, final norm and head, under the names of LLaMA and Phi-3 in the checkpoint.

    Args:
        config: the model, its vocabulary already cut to the tokenizer's length.
        rows: rows of embedding and head in the checkpoint, at least the vocabulary.
        prefix: what stands in front of the checkpoint's names.
    """
    yield _vocabulary(config, "embed_tokens.weight", f"{prefix}model.embed_tokens.weight", rows)
    for index in range(config.text.num_hidden_layers):
        yield from _layer(config, index, f"{prefix}model.layers.{index}.", f"decoder.layers.{index}.")
    yield whole("decoder.norm.weight", f"{prefix}model.norm.weight", (config.text.hidden_size,))
    yield _vocabulary(config, "decoder.lm_head.weight", f"{prefix}lm_head.weight", rows)


def _vocabulary(config: ModelConfig, name: str, tensor: str, rows: int) -> Weight:
    kept, width = config.text.vocab_size, config.text.hidden_size
    part = Part(CHECKPOINT, tensor, (rows, width), kept if kept != rows else None)
    return Weight(name, (kept, width), (part,))


def _layer(config: ModelConfig, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    text = config.text
    hidden, heads, kv_heads, dim = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield whole(ours + norm, theirs + norm, (hidden,))
    split = [("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim)]
    parts = _fused(config, theirs + "self_attn.", "qkv_proj", split)
    yield Weight(ours + "self_attn.qkv_proj.weight", ((heads + 2 * kv_heads) * dim, hidden), parts)
    output = "self_attn.o_proj.weight"
    yield whole(ours + output, theirs + output, (hidden, heads * dim))
    if config.moe is not None and index in config.moe.layers:
        yield from _expert_weights(config, config.moe, theirs + "mlp.", ours + "mlp.")
        return
    gate_up, down = "mlp.gate_up_proj.weight", "mlp.down_proj.weight"
    yield Weight(ours + gate_up, (2 * text.intermediate_size, hidden), _gate_up(config, theirs + "mlp."))
    yield whole(ours + down, theirs + down, (hidden, text.intermediate_size))


def _fused(config: ModelConfig, prefix: str, fused: str, split: list[tuple[str, int]]) -> tuple[Part, ...]:
    """Parts of a fused projection, which the checkpoint may hold fused or split."""
    if config.text.fused_projections:
        split = [(fused, sum(rows for _, rows in split))]
    return tuple(Part(CHECKPOINT, f"{prefix}{name}.weight", (rows, config.text.hidden_size)) for name, rows in split)


def _gate_up(config: ModelConfig, prefix: str) -> tuple[Part, ...]:
    rows = config.text.intermediate_size
    return _fused(config, prefix, "gate_up_proj", [("gate_proj", rows), ("up_proj", rows)])


def _expert_weights(config: ModelConfig, moe: MoeConfig, theirs: str, ours: str) -> Iterator[Weight]:
    text = config.text
    hidden, inner, ids = text.hidden_size, text.intermediate_size, moe.reachable
    gates = {moe.gates[m]: len(moe.expert_groups[m]) for m in ("language", "vision") if moe.gates}
    for gate, rows in gates.items():
        yield whole(f"{ours}{gate}.weight", f"{theirs}{gate}.weight", (rows, hidden), keep_float32=True)
    gate_up = [part for e in ids for part in _gate_up(config, f"{theirs}{moe.experts[e]}.")]
    down = [Part(CHECKPOINT, f"{theirs}{moe.experts[e]}.down_proj.weight", (hidden, inner)) for e in ids]
    for name, shape, parts in (("gate_up_proj", (2 * inner, hidden), gate_up), ("down_proj", (hidden, inner), down)):
        views = {f"{ours}experts.{e}.{name}": i for i, e in enumerate(ids)}
        yield Weight(f"{ours}experts.{name}", (len(ids), *shape), tuple(parts), views=views)
