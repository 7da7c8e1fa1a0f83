"""The parity code's own layout of prompts, against the authors' numbers and the spec's examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moiie_export.parity.cases import _modality, lay_out, made_up
from moiie_export.source import ModelSource
from tests.conftest import GoldenCase


def test_layout_of_the_golden_prompts(golden: GoldenCase) -> None:
    with ModelSource.open(golden.checkpoint) as source:
        layout = lay_out(golden.about["prompt"], source)
    expected = golden.expected
    assert layout.ids.tolist() == expected["input_ids"].tolist()
    if "token_type_ids" in expected:
        assert layout.is_image.astype(int).tolist() == expected["token_type_ids"].tolist()
    if "vision_mask" in expected:
        assert layout.modality.tolist() == expected["vision_mask"].tolist()


@pytest.mark.parametrize(
    ("types", "vision"),
    [([0, 1, 1, 1, 0], [0, 1, 1, 0, 0]), ([1] * 5, [1, 1, 1, 1, 0]), ([1], [0]), ([0, 1, 0, 1, 1], [0, 0, 0, 1, 0])],
)
def test_modality_of_appendix_a(types: list[int], vision: list[int]) -> None:
    with ModelSource.open(GoldenCase("moiie_phi3").checkpoint) as source:
        config = source.config
    kinds = [bool(kind) for kind in types]
    assert _modality(kinds, config).tolist() == vision
    assert _modality(kinds, replace(config, last_image_token_is_language=False)).tolist() == types


def test_made_up_pictures_are_always_the_same_and_not_square() -> None:
    pictures = [image for question in made_up() for image in question.images]
    again = [image for question in made_up() for image in question.images]
    assert len(pictures) == 3
    for first, second in zip(pictures, again, strict=True):
        assert isinstance(first, Image.Image)
        assert isinstance(second, Image.Image)
        assert first.width != first.height
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert np.asarray(first).std() > 20
