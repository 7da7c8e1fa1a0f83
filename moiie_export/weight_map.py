"""The weight map of MoIIE and its siblings: tensor names of spec moiie.md, 4.1, on the left of the seam."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from moiie_export.model_config import ModelConfig, MoeConfig, VisionConfig
from moiie_export.weights import Part, Shape, Weight, WeightMap

CHECKPOINT, TOWER = "checkpoint", "vision_tower"

_TOWER_IN_CHECKPOINT = "model.vision_tower.vision_tower.vision_model."
_TOWER_ALONE = "vision_model."


def build_weight_map(config: ModelConfig, checkpoint_rows: int, names: Mapping[str, Iterable[str]]) -> WeightMap:
    """Map every tensor of the files to the bundle.

    Args:
        config: the model, its vocabulary already cut to the tokenizer's length.
        checkpoint_rows: rows of embedding and head in the checkpoint, at least the vocabulary.
        names: source ("checkpoint", "vision_tower") -> tensor names in its files.
    """
    weights = [
        *_vision_weights(config, frozenset(names.get(TOWER, ()))),
        _vocabulary(config, "embed_tokens.weight", "model.embed_tokens.weight", checkpoint_rows),
        *_decoder_weights(config),
        _vocabulary(config, "decoder.lm_head.weight", "lm_head.weight", checkpoint_rows),
    ]
    used = {part.tensor for weight in weights for part in weight.parts}
    unreachable = {
        tensor: reason
        for source, tensors in names.items()
        for tensor in tensors
        if tensor not in used and (reason := _unreachable(config, source, tensor)) is not None
    }
    return WeightMap(tuple(weights), unreachable)


def _whole(name: str, tensor: str, shape: Shape, *, keep_float32: bool = False, source: str = CHECKPOINT) -> Weight:
    """A weight that is one checkpoint tensor; vectors are always float32."""
    return Weight(name, shape, (Part(source, tensor, shape),), keep_float32 or len(shape) == 1)


def _vocabulary(config: ModelConfig, name: str, tensor: str, rows: int) -> Weight:
    kept, width = config.text.vocab_size, config.text.hidden_size
    part = Part(CHECKPOINT, tensor, (rows, width), kept if kept != rows else None)
    return Weight(name, (kept, width), (part,))


def _vision_weights(config: ModelConfig, tower_names: frozenset[str]) -> Iterator[Weight]:
    vision = config.vision
    # transformers 5 saves a tower alone without the module name in front
    alone = "" if "embeddings.patch_embedding.weight" in tower_names else _TOWER_ALONE
    source, prefix = (CHECKPOINT, _TOWER_IN_CHECKPOINT) if config.vision_weights_in_checkpoint else (TOWER, alone)
    for name, shape in _tower_shapes(vision):
        ours = name.replace("encoder.layers.", "layers.")
        positions = "position_embedding" in name
        yield _whole(f"vision_encoder.tower.{ours}", prefix + name, shape, keep_float32=positions, source=source)
    for index in range(config.projector_layers):
        width = config.text.hidden_size
        inner = vision.feature_size if index == 0 else width
        for leaf, shape in (("weight", (width, inner)), ("bias", (width,))):
            yield _whole(f"vision_encoder.projector.{2 * index}.{leaf}", _projector(config, index, leaf), shape)


def _projector(config: ModelConfig, index: int, leaf: str) -> str:
    """`linear` is a bare layer in the checkpoint, `mlpNx_gelu` a sequence with activations between."""
    inner = "" if config.projector == "linear" else f"{2 * index}."
    return f"model.mm_projector.{inner}{leaf}"


def _tower_shapes(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    size, wide = vision.hidden_size, vision.intermediate_size
    yield "embeddings.patch_embedding.weight", (size, 3, vision.patch_size, vision.patch_size)
    yield "embeddings.patch_embedding.bias", (size,)
    yield "embeddings.position_embedding.weight", (vision.image_tokens, size)
    for index in range(vision.layers_used):
        layer = f"encoder.layers.{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{norm}.weight", (size,)
            yield f"{layer}.{norm}.bias", (size,)
        matrices = [(f"self_attn.{p}_proj", size, size) for p in ("q", "k", "v", "out")]
        for name, rows, columns in [*matrices, ("mlp.fc1", wide, size), ("mlp.fc2", size, wide)]:
            yield f"{layer}.{name}.weight", (rows, columns)
            yield f"{layer}.{name}.bias", (rows,)


def _decoder_weights(config: ModelConfig) -> Iterator[Weight]:
    text = config.text
    hidden, heads, kv_heads, dim = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    for index in range(text.num_hidden_layers):
        theirs, ours = f"model.layers.{index}.", f"decoder.layers.{index}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield _whole(ours + norm, theirs + norm, (hidden,))
        split = [("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim)]
        parts = _fused(config, theirs + "self_attn.", "qkv_proj", split)
        yield Weight(ours + "self_attn.qkv_proj.weight", ((heads + 2 * kv_heads) * dim, hidden), parts)
        output = "self_attn.o_proj.weight"
        yield _whole(ours + output, theirs + output, (hidden, heads * dim))
        if config.moe is not None and index in config.moe.layers:
            yield from _expert_weights(config, config.moe, theirs + "mlp.", ours + "mlp.")
        else:
            yield Weight(
                ours + "mlp.gate_up_proj.weight",
                (2 * text.intermediate_size, hidden),
                _gate_up(config, theirs + "mlp."),
            )
            down = "mlp.down_proj.weight"
            yield _whole(ours + down, theirs + down, (hidden, text.intermediate_size))
    yield _whole("decoder.norm.weight", "model.norm.weight", (hidden,))


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
        yield _whole(f"{ours}{gate}.weight", f"{theirs}{gate}.weight", (rows, hidden), keep_float32=True)
    gate_up = [part for e in ids for part in _gate_up(config, f"{theirs}{moe.experts[e]}.")]
    down = [Part(CHECKPOINT, f"{theirs}{moe.experts[e]}.down_proj.weight", (hidden, inner)) for e in ids]
    for name, shape, parts in (("gate_up_proj", (2 * inner, hidden), gate_up), ("down_proj", (hidden, inner), down)):
        views = {f"{ours}experts.{e}.{name}": i for i, e in enumerate(ids)}
        yield Weight(f"{ours}experts.{name}", (len(ids), *shape), tuple(parts), views=views)


def _unreachable(config: ModelConfig, source: str, tensor: str) -> str | None:
    """Why no graph can reach a tensor of the files; None when it should be reachable and is unknown."""
    if source == TOWER:
        return _unreachable_in_tower(config.vision, tensor.removeprefix(_TOWER_ALONE), tensor)
    if tensor.startswith("model.vision_tower."):
        if not config.vision_weights_in_checkpoint:
            return "unfreeze_vision_tower is false: the separate vision tower's weights count, not this copy"
        return _unreachable_in_tower(config.vision, tensor.removeprefix(_TOWER_IN_CHECKPOINT), tensor)
    if tensor.endswith("rotary_emb.inv_freq"):
        return "a buffer that is computed from rope_theta"
    return None if config.moe is None else _dead_expert(config.moe, tensor)


def _dead_expert(moe: MoeConfig, tensor: str) -> str | None:
    dead = [expert for expert in range(moe.num_experts) if expert not in moe.reachable]
    for layer in moe.layers:
        for expert in dead:
            if tensor.startswith(f"model.layers.{layer}.mlp.{moe.experts[expert]}."):
                return f"dead expert {expert}: no gate row of either modality leads to it"
    return None


def _unreachable_in_tower(vision: VisionConfig, name: str, tensor: str) -> str | None:
    if tensor.startswith(("text_model.", "logit_scale", "logit_bias")):
        return "the text half of SigLIP"
    if name.startswith("head."):
        return "SigLIP's pooling head; patches are taken before it"
    if name.startswith("post_layernorm."):
        return f"SigLIP's final norm; hidden_states[{vision.select_layer}] is taken before it"
    for index in range(vision.layers_used, vision.num_hidden_layers):
        if name.startswith(f"encoder.layers.{index}."):
            return f"SigLIP's layer {index} comes after hidden_states[{vision.select_layer}]"
    if name == "embeddings.position_ids":
        return "a buffer that counts positions"
    return None
