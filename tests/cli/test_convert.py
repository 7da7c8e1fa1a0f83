"""`moiie convert`: what it says, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Moiie
from tests.mome_layout import OfficialLayout, first_stage, write_layout


@pytest.fixture
def layout(tmp_path: Path) -> OfficialLayout:
    return write_layout(tmp_path)


def test_the_directory_is_the_output_and_the_rest_goes_to_stderr(moiie: Moiie, layout: OfficialLayout) -> None:
    output = layout.path / "out"
    result = moiie("convert", *layout.arguments, "-o", output)
    assert (result.code, result.out) == (0, f"{output}\n")
    assert "1056099 trained values" in result.err
    assert "first-stage" not in result.err
    assert (output / "config.json").is_file()


def test_json_is_one_document(moiie: Moiie, layout: OfficialLayout) -> None:
    layout.tensors("MoME_ckpt", first_stage)
    result = moiie("convert", *layout.arguments, "-o", layout.path / "out", "--json")
    assert result.code == 0
    document = result.document
    assert (document["stage"], document["files"]) == (1, ["model.safetensors"])
    assert document["checkpoint"] == str(layout.path / "out")
    assert document["dropped"]["sentence"] == 3


def test_a_first_stage_checkpoint_is_said_to_be_one(moiie: Moiie, layout: OfficialLayout) -> None:
    layout.tensors("MoME_ckpt", first_stage)
    assert "all adapters of a layer are equal" in moiie("convert", *layout.arguments, "-o", layout.path / "out").err


def test_errors_have_a_hint_and_no_output(moiie: Moiie, layout: OfficialLayout) -> None:
    layout.tensors("dinov2", lambda held: {**held, "patch_embed.proj.weight": torch.zeros(768, 3, 14, 14)})
    result = moiie("convert", *layout.arguments, "-o", layout.path / "out")
    assert (result.code, result.out) == (1, "")
    assert result.error.endswith("found 2, 768 and 14")
    assert "dinov2_vitl14_pretrain.pth" in result.hint
    assert not (layout.path / "out").exists()


def test_without_sizes_the_published_ones_are_expected(moiie: Moiie, layout: OfficialLayout) -> None:
    arguments = layout.arguments[:-2]
    result = moiie("convert", *arguments, "-o", layout.path / "out")
    assert result.code == 1
    assert "another model: hidden_size: expected 4096, found 32" in result.error
    assert "--config" in result.hint


@pytest.mark.parametrize("missing", ["--vicuna", "--eva", "--dino", "--pix2struct", "--sentence", "-o"])
def test_every_source_is_needed(moiie: Moiie, layout: OfficialLayout, missing: str) -> None:
    arguments = [*layout.arguments, "-o", "out"]
    index = arguments.index(missing)
    result = moiie("convert", *arguments[:index], *arguments[index + 2 :])
    assert result.code == 2
    assert missing in result.error
