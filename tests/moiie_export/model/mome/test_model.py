"""The published model on the meta device: parameters counted part by part (spec 1.4), and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moiie_export.config_reader import ConfigReader
from moiie_export.model.mome.encoders import VisionClip, VisionDino, VisionPix2Struct, vision_expert
from moiie_export.model.mome.model import MomeModel
from moiie_export.mome_config import MomeConfig
from moiie_export.mome_parser import parse_mome
from moiie_export.mome_published import PUBLISHED

KEY_BIASES = 39 * 1408
"""EVA has no key biases; the fused ones are zeros."""
RESIZED = (37**2 - 32**2 + 1) * 1024
"""DINOv2's stored position table and mask token beside the resized table."""
POOLER = 384 * 384 + 384
"""BERT's pooler, which a mean of tokens does not use."""

COUNTS = {
    "vision_clip.tower": 985_894_528 + KEY_BIASES,
    "vision_clip.norm": 2 * 1408,
    "vision_clip.projector": 5_774_080 - 2 * 1408,
    "vision_dino.tower": 304_368_640 - RESIZED,
    "vision_dino.adt": 51_270_720,
    "vision_dino.projector": 4_198_400,
    "vision_pix2struct.tower": 91_835_904,
    "vision_pix2struct.adt": 31_376_960,
    "vision_pix2struct.projector": 3_149_824,
    "router.sentence_encoder": 22_713_216 - POOLER,
    "router.move": 148_995,
    "router.mole": 32 * 149_380,
    "mole": 32 * 4 * 528_449,
    "embed_tokens": 32000 * 4096,
    "decoder": 6_738_415_616 - 32000 * 4096,
}


@pytest.fixture(scope="module")
def config() -> MomeConfig:
    return parse_mome(ConfigReader(dict(PUBLISHED), "config.json"))


@pytest.fixture(scope="module")
def published(config: MomeConfig) -> MomeModel:
    with torch.device("meta"):
        return MomeModel(config)


@pytest.mark.parametrize("part", COUNTS)
def test_the_published_model_has_the_published_size(published: MomeModel, part: str) -> None:
    assert sum(parameter.numel() for parameter in published.get_submodule(part).parameters()) == COUNTS[part]


def test_every_parameter_belongs_to_a_counted_part_and_there_is_nothing_else(published: MomeModel) -> None:
    """Buffers would lose their data on the meta device."""
    assert sum(parameter.numel() for parameter in published.parameters()) == sum(COUNTS.values())
    assert list(published.buffers()) == []


def test_one_module_an_expert_by_the_kind_of_its_tower(published: MomeModel, config: MomeConfig) -> None:
    kinds = {"vision_clip": VisionClip, "vision_dino": VisionDino, "vision_pix2struct": VisionPix2Struct}
    assert {expert.component: type(published.get_submodule(expert.component)) for expert in config.experts} == kinds


@pytest.mark.parametrize("index", range(3))
def test_an_adt_in_the_wrong_place_is_refused(config: MomeConfig, index: int) -> None:
    expert: Any = config.experts[index]
    wrong = replace(expert, adt=None if expert.adt else config.experts[1].adt)
    with pytest.raises(TypeError, match=f"vision expert {expert.name}"), torch.device("meta"):
        vision_expert(config, wrong)


def test_a_cache_holds_one_pair_a_layer(golden_mome: MomeModel) -> None:
    cache = golden_mome.new_cache(3, 7)
    assert [tuple(buffer.shape) for pair in cache for buffer in pair] == [(3, 4, 7, 8)] * 4
    assert not any(buffer.any() for pair in cache for buffer in pair)
