"""The published sizes, from headers alone: the authors' names, the published counts, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from moiie_export.checkpoint import TensorEntry
from moiie_export.convert.keys import Constant, Layout, pieces_of
from moiie_export.convert.plan import Plan, make_plan
from moiie_export.convert.settings import load_settings, pretrained_positions
from moiie_export.convert.sources import MOME, Weights
from moiie_export.mome_config import MomeConfig
from moiie_export.mome_published import TRAINABLE_VALUES
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_runtime.errors import MoiieError
from tests.mome_layout import GOLDEN

Shapes = dict[str, tuple[int, ...]]


class Headers:
    """A source of which only names and shapes are looked at."""

    def __init__(self, shapes: Shapes) -> None:
        self.path = Path("nowhere")
        self.tensors = {name: TensorEntry(name, shape, "F32", "nowhere") for name, shape in shapes.items()}

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        raise AssertionError("planning reads no values")

    def close(self) -> None:
        pass


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def selector(name: str, size: int) -> Shapes:
    """Spec 1.1 and 7: an ADT under the authors' names."""
    shapes: Shapes = {f"{name}.reference_points": (1, 256, 2), f"{name}.position_embeddings": (1, 256, size)}
    for layer in (f"{name}.layers.{index}" for index in range(6)):
        for leaf in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{leaf}_proj", size, size)
        shapes |= linear(f"{layer}.encoder_attn.sampling_offsets", 64, size)
        shapes |= linear(f"{layer}.encoder_attn.attention_weights", 32, size)
        for leaf in ("value_proj", "output_proj"):
            shapes |= linear(f"{layer}.encoder_attn.{leaf}", size, size)
        shapes |= linear(f"{layer}.fc1", 1024, size) | linear(f"{layer}.fc2", size, 1024)
        for leaf in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            shapes |= norm(f"{layer}.{leaf}", size)
    return shapes


def trained(stage: int) -> Shapes:
    """What the authors' trainer keeps, written down from spec 1 and 7 and from nothing else."""
    shapes = norm("clip_ln", 1408) | linear("clip_proj", 4096, 1408)
    shapes |= selector("dino_selector", 1024) | linear("dino_llm_proj", 4096, 1024)
    shapes |= selector("pix_selector", 768) | linear("pix_llm_proj", 4096, 768)
    shapes |= linear("move_router.router.0", 384, 384) | linear("move_router.router.2", 3, 384)
    for layer in (f"llm_model.model.layers.{index}.mlp.adapter" for index in range(32)):
        for adapter in [f"{layer}.adapters.{k}" for k in range(4)] if stage == 2 else [layer]:
            shapes |= linear(f"{adapter}.down_proj", 64, 4096) | linear(f"{adapter}.up_proj", 4096, 64)
            shapes[f"{adapter}.scale"] = (1,)
        if stage == 2:
            shapes |= linear(f"{layer}.router_mlp.0", 384, 384) | linear(f"{layer}.router_mlp.2", 4, 384)
    return shapes


def published() -> tuple[MomeConfig, int]:
    raw, config = load_settings(None)
    return config, pretrained_positions(raw)


def plan(checkpoint: Shapes) -> Plan:
    config, positions = published()
    layout = Layout(False, "", "", positions)
    shapes: dict[str, Shapes] = {name: {} for name in ("vicuna", "eva", "dino", "pix2struct", "sentence")}
    for weight in build_mome_weight_map(config, config.text.vocab_size, {}).weights:
        for part in weight.parts:
            for piece in pieces_of(part.tensor, part.shape, layout):
                if not isinstance(piece, Constant) and piece.source != MOME:
                    shapes[piece.source][piece.tensor] = piece.shape
    shapes["dino"]["mask_token"] = (1, 1024)
    sources: dict[str, Weights] = {name: Headers(each) for name, each in shapes.items()}
    return make_plan(config, positions, {MOME: Headers(checkpoint), **sources})


def test_a_second_stage_checkpoint_of_the_published_size() -> None:
    made = plan(trained(2))
    assert made.trainable_values == sum(map(prod, trained(2).values())) == TRAINABLE_VALUES
    assert not made.single_adapter
    assert made.dropped == {MOME: 0, "vicuna": 0, "eva": 0, "dino": 1, "pix2struct": 0, "sentence": 0}


def test_a_first_stage_checkpoint_of_the_published_size() -> None:
    made = plan(trained(1))
    # one adapter of 528449 values a layer instead of four, and no router of 149380
    assert made.trainable_values == TRAINABLE_VALUES - 32 * (3 * 528_449 + 149_380)
    assert made.single_adapter
    assert sum(tensor.bytes for tensor in made.tensors) == sum(tensor.bytes for tensor in plan(trained(2)).tensors)


def test_one_value_too_few_is_said_in_numbers() -> None:
    shapes = trained(2)
    del shapes["llm_model.model.layers.31.mlp.adapter.adapters.3.scale"]
    with pytest.raises(MoiieError, match="31.*scale.*expected 168340611 trained values in all, found 168340610"):
        plan(shapes)


def golden_names() -> Iterator[tuple[str, str]]:
    """(source, name) of every tensor in the authors' golden files."""
    encoders = GOLDEN / "encoders"
    for source, path in (
        (MOME, GOLDEN / "MoME_ckpt.safetensors"),
        ("vicuna", GOLDEN / "llm" / "model.safetensors"),
        ("eva", encoders / "eva_vit_g.safetensors"),
        ("dino", encoders / "dinov2.safetensors"),
        ("pix2struct", encoders / "pix2struct" / "model.safetensors"),
    ):
        with safe_open(path, "np") as file:
            yield from ((source, name) for name in file.keys())  # noqa: SIM118 - not a mapping


def test_every_name_in_the_authors_files_is_the_origin_of_a_published_one() -> None:
    """Layers are numbered alike in the small model and the published one."""
    config, positions = published()
    layout, origins = Layout(False, "", "", positions), set()
    for weight in build_mome_weight_map(config, config.text.vocab_size, {}).weights:
        for part in weight.parts:
            for piece in pieces_of(part.tensor, part.shape, layout):
                if not isinstance(piece, Constant):
                    origins.add((piece.source, piece.tensor))
    unknown = [name for name in golden_names() if name not in origins]
    assert unknown == [("dino", "mask_token")]
    # and the other way round: what the published model asks for differs from the small files in numbers only
    shape = {(source, re.sub(r"\d+", "N", name)) for source, name in golden_names()}
    asked = {(source, re.sub(r"\d+", "N", name)) for source, name in origins if source != "sentence"}
    assert asked == shape - {("dino", "mask_token")}
