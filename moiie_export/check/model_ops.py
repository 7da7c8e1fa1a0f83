"""The ops of a model with their shapes and storage, from its config and the recipe's rules alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from moiie_export.families import family_of
from moiie_export.families.family import DECODE, HOST, PREFILL
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.mome_config import MomeConfig, Pix2StructConfig
from moiie_export.quantize.rules import Form, Resolved

_PLAIN = ("float32", "float16")


@dataclass(frozen=True)
class OpUse:
    """One kind of op of a model.

    Attributes:
        op: its kind, a row of support.py's table.
        where: the part of the model that has it.
        shape: what matters of its shape, by name.
        format: how its weights are stored; `plain` for float32 and float16.
        group_size: columns that share a scale; 0: none.
    """

    op: str
    where: str
    shape: tuple[tuple[str, int], ...] = ()
    format: str = "plain"
    group_size: int = 0

    def size(self, name: str) -> int:
        """A number of its shape."""
        return dict(self.shape)[name]


@dataclass(frozen=True)
class StoredWeight:
    """A parameter: its graphs, shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    form: Form
    graphs: frozenset[str]
    expert: bool
    decode: bool

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


def stored_weights(config: ModelConfig, resolved: Resolved) -> list[StoredWeight]:
    """Every parameter that a graph uses."""
    users = family_of(config).expected_users
    found = []
    for weight in resolved.weight_map.weights:
        for name, (_, shape) in weight.parameters().items():
            graphs = frozenset(users(name, config)) - {HOST}
            if graphs:
                form = resolved.forms[weight.name]
                found.append(StoredWeight(name, shape, form, graphs, ".experts." in name, DECODE in graphs))
    return found


def model_ops(config: ModelConfig, weights: list[StoredWeight], capacity: int) -> Iterator[OpUse]:
    """The ops of every graph, each kind once."""
    yield from _vision(config)
    yield from dict.fromkeys(_linears(weights))
    text = config.text
    head = ("head_dim", text.head_dim)
    yield OpUse("rms_norm", "decoder", (("hidden", text.hidden_size),))
    yield OpUse("rotary", "decoder", (head,))
    yield OpUse("kv_update", "decoder", (("kv_heads", text.num_key_value_heads), ("capacity", capacity), head))
    window = text.visible_keys or 0
    heads = (("heads", text.num_attention_heads), ("kv_heads", text.num_key_value_heads), head)
    shape = (*heads, ("capacity", capacity), ("window", window))
    yield OpUse("prefill_attention", "decoder", shape)
    yield OpUse("decode_attention", "decoder", shape)
    if config.moe is not None:
        sizes = (("experts", config.moe.num_experts), ("top_k", config.moe.top_k))
        yield OpUse("router", "experts", (*sizes, ("hidden", text.hidden_size)))
        yield from dict.fromkeys(_experts(config, weights, sizes))
    if isinstance(config, MomeConfig):
        yield OpUse("adapter", "decoder", (("bottleneck", config.mole.bottleneck), ("hidden", text.hidden_size)))
        yield OpUse("sentence", "router", (("words", config.sentence.max_length),))


def _vision(config: ModelConfig) -> Iterator[OpUse]:
    if isinstance(config, MoiieConfig):
        tower = config.vision
        head = tower.hidden_size // tower.num_attention_heads
        yield OpUse("encoder_attention", "vision_encoder", (("tokens", tower.image_tokens), ("head_dim", head)))
        if tower.scales:
            yield OpUse("resize", "vision_encoder", (("side", max(tower.scales)),))
    elif isinstance(config, MomeConfig):
        for expert in config.experts:
            tower_ = expert.tower
            patches = isinstance(tower_, Pix2StructConfig)
            tokens = tower_.max_patches if isinstance(tower_, Pix2StructConfig) else tower_.grid**2 + 1
            head = (
                tower_.d_kv
                if isinstance(tower_, Pix2StructConfig)
                else tower_.hidden_size // tower_.num_attention_heads
            )
            yield OpUse("encoder_attention", expert.component, (("tokens", tokens), ("head_dim", head)))
            if expert.adt is not None:
                sizes = (("queries", config.queries), ("points", expert.adt.num_points), ("open_grid", int(patches)))
                yield OpUse("deformable_sample", expert.component, sizes)


def _linears(weights: list[StoredWeight]) -> Iterator[OpUse]:
    for weight in weights:
        if len(weight.shape) == 2 and not weight.expert:
            where = "decoder" if PREFILL in weight.graphs else min(weight.graphs)
            kind = weight.form.format if weight.form.format not in _PLAIN else "plain"
            group = 0 if weight.form.scheme is None else weight.form.scheme.group_size
            yield OpUse("linear", where, (), kind, group)


def _experts(config: ModelConfig, weights: list[StoredWeight], sizes: tuple[tuple[str, int], ...]) -> Iterator[OpUse]:
    text = config.text
    shape = (*sizes, ("hidden", text.hidden_size), ("intermediate", text.intermediate_size))
    for weight in weights:
        if weight.expert:
            kind = weight.form.format if weight.form.format not in _PLAIN else "plain"
            group = 0 if weight.form.scheme is None else weight.form.scheme.group_size
            yield OpUse("experts", "language experts" if weight.decode else "vision experts", shape, kind, group)
