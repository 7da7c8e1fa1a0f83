"""The weight map of MoME: names of a converted checkpoint (spec mome.md, section 7) on the left of the seam.

On the right are the parameters of the reference model. Projections of one input are fused in rows, adapters and routers of
all layers are stacked. What half precision ruins stays float32: vectors, positions, everything that routes, and the
offsets of the deformable sampling, which are coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from moiie_export.decoder_weights import decoder_weights, whole
from moiie_export.mome_config import AdtConfig, DinoConfig, EvaConfig, MomeConfig, Pix2StructConfig, SentenceConfig
from moiie_export.weights import CHECKPOINT, Part, Shape, Weight, WeightMap

LANGUAGE = "language_model."
_UNREACHABLE = (
    (re.compile(r".*rotary_emb\.inv_freq"), "a buffer that is computed from rope_theta"),
    (re.compile(r"sentence_encoder\.pooler\..*"), "BERT's pooler; the sentence embedding is a mean of tokens"),
    (re.compile(r"sentence_encoder\.embeddings\.position_ids"), "a buffer that counts positions"),
)


def build_mome_weight_map(config: MomeConfig, checkpoint_rows: int, names: Mapping[str, Iterable[str]]) -> WeightMap:
    """Map every tensor of a converted checkpoint to the bundle.

    Args:
        config: the model, its vocabulary already cut to the tokenizer's length.
        checkpoint_rows: rows of embedding and head in the checkpoint, at least the vocabulary.
        names: "checkpoint" -> tensor names in its files.
    """
    weights = [
        *_vision_weights(config),
        *_router_weights(config),
        *decoder_weights(config, checkpoint_rows, LANGUAGE),
        *_adapter_weights(config),
    ]
    unreachable = {
        tensor: reason
        for tensor in names.get(CHECKPOINT, ())
        for pattern, reason in _UNREACHABLE
        if pattern.fullmatch(tensor)
    }
    return WeightMap(tuple(weights), unreachable)


def _linear(
    ours: str, theirs: str | Sequence[str], shape: tuple[int, int], *, bias: bool = True, exact: bool = False
) -> Iterator[Weight]:
    """A linear layer made of one or more, stacked in rows; `shape` is that of each; `exact` keeps it float32."""
    sources = [theirs] if isinstance(theirs, str) else theirs
    rows, columns = shape
    yield _joined(f"{ours}.weight", [f"{name}.weight" for name in sources], (rows, columns), exact=exact)
    if bias:
        yield _joined(f"{ours}.bias", [f"{name}.bias" for name in sources], (rows,))


def _joined(ours: str, theirs: Sequence[str], shape: Shape, *, exact: bool = False) -> Weight:
    parts = tuple(Part(CHECKPOINT, name, shape) for name in theirs)
    return Weight(ours, (len(parts) * shape[0], *shape[1:]), parts, exact or len(shape) == 1)


def _stacked(ours: str, theirs: Sequence[str], shape: Shape, *, exact: bool) -> Weight:
    parts = tuple(Part(CHECKPOINT, name, shape) for name in theirs)
    return Weight(ours, (len(parts), *shape), parts, exact)


def _norm(ours: str, theirs: str, size: int) -> Iterator[Weight]:
    for leaf in ("weight", "bias"):
        yield whole(f"{ours}.{leaf}", f"{theirs}.{leaf}", (size,))


def _vision_weights(config: MomeConfig) -> Iterator[Weight]:
    for expert in config.experts:
        tower, ours, theirs = expert.tower, f"{expert.component}.", f"{expert.name}_tower."
        if isinstance(tower, EvaConfig):
            yield from _eva(tower, f"{ours}tower.", theirs)
            yield from _norm(f"{ours}norm", f"move.{expert.name}.norm", tower.hidden_size)
        elif isinstance(tower, DinoConfig):
            yield from _dino(tower, f"{ours}tower.", theirs)
        else:
            yield from _pix2struct(tower, f"{ours}tower.", theirs)
        if expert.adt is not None:
            yield from _adt(expert.adt, (config.queries, tower.hidden_size), f"{ours}adt.", f"move.{expert.name}.adt.")
        shape = (config.text.hidden_size, tower.hidden_size)
        yield from _linear(f"{ours}projector", f"move.{expert.name}.projector", shape)


def _eva(tower: EvaConfig, ours: str, theirs: str) -> Iterator[Weight]:
    size, inner, tokens = tower.hidden_size, tower.intermediate_size, 1 + tower.grid**2
    embeddings = "embeddings."
    for name, shape in (("class_embedding", (1, 1, size)), ("position_embedding", (1, tokens, size))):
        yield whole(ours + embeddings + name, theirs + embeddings + name, shape, keep_float32=True)
    patches = f"{embeddings}patch_embedding"
    yield from _patches(ours + patches, theirs + patches, (size, 3, tower.patch_size, tower.patch_size))
    for index in range(tower.num_hidden_layers):
        layer, block = f"{ours}layers.{index}.", f"{theirs}encoder.layers.{index}."
        yield from _norm(f"{layer}norm1", f"{block}layer_norm1", size)
        yield from _linear(f"{layer}attention.qkv", f"{block}self_attn.qkv", (3 * size, size))
        yield from _linear(f"{layer}attention.output", f"{block}self_attn.projection", (size, size))
        yield from _norm(f"{layer}norm2", f"{block}layer_norm2", size)
        yield from _linear(f"{layer}mlp.fc1", f"{block}mlp.fc1", (inner, size))
        yield from _linear(f"{layer}mlp.fc2", f"{block}mlp.fc2", (size, inner))


def _dino(tower: DinoConfig, ours: str, theirs: str) -> Iterator[Weight]:
    size, inner, tokens = tower.hidden_size, tower.intermediate_size, 1 + tower.grid**2
    embeddings = "embeddings."
    for name, shape in (("cls_token", (1, 1, size)), ("position_embeddings", (1, tokens, size))):
        yield whole(ours + embeddings + name, theirs + embeddings + name, shape, keep_float32=True)
    kernel = (size, 3, tower.patch_size, tower.patch_size)
    yield from _patches(f"{ours}embeddings.patch_projection", f"{theirs}embeddings.patch_embeddings.projection", kernel)
    for index in range(tower.num_hidden_layers):
        layer, block = f"{ours}layers.{index}.", f"{theirs}encoder.layer.{index}."
        split = [f"{block}attention.attention.{name}" for name in ("query", "key", "value")]
        yield from _norm(f"{layer}norm1", f"{block}norm1", size)
        yield from _linear(f"{layer}attention.qkv", split, (size, size))
        yield from _linear(f"{layer}attention.output", f"{block}attention.output.dense", (size, size))
        yield whole(f"{layer}layer_scale1", f"{block}layer_scale1.lambda1", (size,))
        yield from _norm(f"{layer}norm2", f"{block}norm2", size)
        yield from _linear(f"{layer}mlp.fc1", f"{block}mlp.fc1", (inner, size))
        yield from _linear(f"{layer}mlp.fc2", f"{block}mlp.fc2", (size, inner))
        yield whole(f"{layer}layer_scale2", f"{block}layer_scale2.lambda1", (size,))
    yield from _norm(f"{ours}layernorm", f"{theirs}layernorm", size)


def _patches(ours: str, theirs: str, kernel: Shape) -> Iterator[Weight]:
    yield whole(f"{ours}.weight", f"{theirs}.weight", kernel)
    yield whole(f"{ours}.bias", f"{theirs}.bias", kernel[:1])


def _pix2struct(tower: Pix2StructConfig, ours: str, theirs: str) -> Iterator[Weight]:
    size, heads = tower.hidden_size, tower.num_attention_heads * tower.d_kv
    for name in ("row_embedder", "column_embedder"):
        table = f"embeddings.{name}.weight"
        yield whole(ours + table, theirs + table, (tower.seq_len, size), keep_float32=True)
    patches = "embeddings.patch_projection"
    yield from _linear(ours + patches, theirs + patches, (size, 3 * tower.patch_size**2))
    for index in range(tower.num_hidden_layers):
        layer, block = f"{ours}layers.{index}.", f"{theirs}encoder.layer.{index}."
        split = [f"{block}attention.{name}" for name in ("query", "key", "value")]
        yield whole(f"{layer}pre_attention_layer_norm.weight", f"{block}pre_attention_layer_norm.weight", (size,))
        yield from _linear(f"{layer}attention.qkv", split, (heads, size), bias=False)
        yield from _linear(f"{layer}attention.output", f"{block}attention.output", (size, heads), bias=False)
        yield whole(f"{layer}pre_mlp_layer_norm.weight", f"{block}pre_mlp_layer_norm.weight", (size,))
        gates = [f"{block}mlp.wi_0", f"{block}mlp.wi_1"]
        yield from _linear(f"{layer}mlp.wi", gates, (tower.d_ff, size), bias=False)
        yield from _linear(f"{layer}mlp.wo", f"{block}mlp.wo", (size, tower.d_ff), bias=False)
    yield whole(f"{ours}layernorm.weight", f"{theirs}layernorm.weight", (size,))


def _adt(adt: AdtConfig, queries: tuple[int, int], ours: str, theirs: str) -> Iterator[Weight]:
    """`queries` is their number and width."""
    number, size = queries
    samples = adt.num_heads * adt.num_points
    for name, width in (("reference_points", 2), ("position_embeddings", size)):
        yield whole(ours + name, theirs + name, (1, number, width), keep_float32=True)
    for index in range(adt.num_layers):
        layer, block = f"{ours}layers.{index}.", f"{theirs}layers.{index}."
        query_key = [f"{block}self_attn.q_proj", f"{block}self_attn.k_proj"]
        yield from _linear(f"{layer}self_attn.qk_proj", query_key, (size, size))
        for name in ("self_attn.v_proj", "self_attn.out_proj"):
            yield from _linear(layer + name, block + name, (size, size))
        offsets, weights = "encoder_attn.sampling_offsets", "encoder_attn.attention_weights"
        yield from _linear(layer + offsets, block + offsets, (2 * samples, size), exact=True)
        yield from _linear(layer + weights, block + weights, (samples, size))
        for name in ("encoder_attn.value_proj", "encoder_attn.output_proj"):
            yield from _linear(layer + name, block + name, (size, size))
        yield from _linear(f"{layer}fc1", f"{block}fc1", (adt.ffn_dim, size))
        yield from _linear(f"{layer}fc2", f"{block}fc2", (size, adt.ffn_dim))
        for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            yield from _norm(layer + name, block + name, size)


def _router_weights(config: MomeConfig) -> Iterator[Weight]:
    size, mole = config.sentence.hidden_size, config.mole
    yield from _sentence(config.sentence, "router.sentence_encoder.", "sentence_encoder.")
    for name, shape in (
        ("fc1", (config.move_router_hidden, size)),
        ("fc2", (len(config.experts), config.move_router_hidden)),
    ):
        yield from _linear(f"router.move.{name}", f"move.router.{name}", shape, exact=True)
    for name, shape in (("fc1", (mole.router_hidden, size)), ("fc2", (mole.num_experts, mole.router_hidden))):
        layers = [f"{LANGUAGE}model.layers.{layer}.mlp.mole.router.{name}" for layer in mole.layers]
        for leaf, each in (("weight", shape), ("bias", shape[:1])):
            yield _stacked(f"router.mole.{name}.{leaf}", [f"{layer}.{leaf}" for layer in layers], each, exact=True)


def _sentence(encoder: SentenceConfig, ours: str, theirs: str) -> Iterator[Weight]:
    size, inner = encoder.hidden_size, encoder.intermediate_size
    for name, rows in (
        ("word_embeddings", encoder.vocab_size),
        ("position_embeddings", encoder.max_position_embeddings),
        ("token_type_embeddings", encoder.type_vocab_size),
    ):
        table = f"embeddings.{name}.weight"
        yield whole(ours + table, theirs + table, (rows, size), keep_float32=True)
    yield from _norm(f"{ours}embeddings.norm", f"{theirs}embeddings.LayerNorm", size)
    for index in range(encoder.num_hidden_layers):
        layer, block = f"{ours}layers.{index}.", f"{theirs}encoder.layer.{index}."
        split = [f"{block}attention.self.{name}" for name in ("query", "key", "value")]
        yield from _linear(f"{layer}attention.qkv", split, (size, size), exact=True)
        yield from _linear(f"{layer}attention.output", f"{block}attention.output.dense", (size, size), exact=True)
        yield from _norm(f"{layer}norm1", f"{block}attention.output.LayerNorm", size)
        yield from _linear(f"{layer}mlp.fc1", f"{block}intermediate.dense", (inner, size), exact=True)
        yield from _linear(f"{layer}mlp.fc2", f"{block}output.dense", (size, inner), exact=True)
        yield from _norm(f"{layer}norm2", f"{block}output.LayerNorm", size)


def _adapter_weights(config: MomeConfig) -> Iterator[Weight]:
    """The banks that the runtime takes one adapter a layer from."""
    hidden, narrow = config.text.hidden_size, config.mole.bottleneck
    for layer in config.mole.layers:
        experts = [f"{LANGUAGE}model.layers.{layer}.mlp.mole.experts.{k}" for k in range(config.mole.num_experts)]
        for name, shape in (("down_proj", (narrow, hidden)), ("up_proj", (hidden, narrow))):
            weights, biases = [f"{e}.{name}.weight" for e in experts], [f"{e}.{name}.bias" for e in experts]
            yield _stacked(f"mole.{layer}.{name}.weight", weights, shape, exact=False)
            yield _stacked(f"mole.{layer}.{name}.bias", biases, shape[:1], exact=True)
        yield _joined(f"mole.{layer}.scale", [f"{e}.scale" for e in experts], (1,))
