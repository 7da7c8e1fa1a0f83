"""The weight map of MoIIE and its siblings: tensor names of spec moiie.md, 4.1, on the left of the seam."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from moiie_export.decoder_weights import decoder_weights, whole
from moiie_export.model_config import MoeConfig, MoiieConfig, VisionConfig
from moiie_export.weights import CHECKPOINT, TOWER, Shape, Weight, WeightMap

_TOWER_IN_CHECKPOINT = "model.vision_tower.vision_tower.vision_model."
_TOWER_ALONE = "vision_model."


def build_weight_map(config: MoiieConfig, checkpoint_rows: int, names: Mapping[str, Iterable[str]]) -> WeightMap:
    """Map every tensor of the files to the bundle.

    Args:
        config: the model, its vocabulary already cut to the tokenizer's length.
        checkpoint_rows: rows of embedding and head in the checkpoint, at least the vocabulary.
        names: source ("checkpoint", "vision_tower") -> tensor names in its files.
    """
    weights = [
        *_vision_weights(config, frozenset(names.get(TOWER, ()))),
        *decoder_weights(config, checkpoint_rows),
    ]
    used = {part.tensor for weight in weights for part in weight.parts}
    unreachable = {
        tensor: reason
        for source, tensors in names.items()
        for tensor in tensors
        if tensor not in used and (reason := _unreachable(config, source, tensor)) is not None
    }
    return WeightMap(tuple(weights), unreachable)


def _vision_weights(config: MoiieConfig, tower_names: frozenset[str]) -> Iterator[Weight]:
    vision = config.vision
    # transformers 5 saves a tower alone without the module name in front
    alone = "" if "embeddings.patch_embedding.weight" in tower_names else _TOWER_ALONE
    source, prefix = (CHECKPOINT, _TOWER_IN_CHECKPOINT) if config.vision_weights_in_checkpoint else (TOWER, alone)
    for name, shape in _tower_shapes(vision):
        ours = name.replace("encoder.layers.", "layers.")
        positions = "position_embedding" in name
        yield whole(f"vision_encoder.tower.{ours}", prefix + name, shape, keep_float32=positions, source=source)
    for index in range(config.projector_layers):
        width = config.text.hidden_size
        inner = vision.feature_size if index == 0 else width
        for leaf, shape in (("weight", (width, inner)), ("bias", (width,))):
            yield whole(f"vision_encoder.projector.{2 * index}.{leaf}", _projector(config, index, leaf), shape)


def _projector(config: MoiieConfig, index: int, leaf: str) -> str:
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


def _unreachable(config: MoiieConfig, source: str, tensor: str) -> str | None:
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
