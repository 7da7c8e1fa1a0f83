"""The three towers: against the authors' numbers, and against transformers' models of the same architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.dino_positions import resize_positions
from moiie_export.model.mome.dinov2 import DinoTower
from moiie_export.model.mome.eva import EvaTower
from moiie_export.model.mome.pix2struct import Pix2StructTower
from moiie_export.mome_config import DinoConfig, EvaConfig, Pix2StructConfig
from moiie_runtime.errors import MoiieError
from tests import mome_official as official


def random_weights(model: torch.nn.Module, seed: int) -> Any:
    """Large enough that every part matters; transformers initialises with 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def test_eva_equals_the_authors(mome_case: Any) -> None:
    case = mome_case("eva_vit")
    tower = EvaTower(EvaConfig(32, 139, 3, 4, 224, 14, 1e-6, 1e-5))
    official.fill(tower, official.eva(case.tensors("state_dict.safetensors")))
    case.close(tower(case.waves(224, 32)), "output")


def test_dino_equals_the_authors(mome_case: Any) -> None:
    case = mome_case("dino_vit")
    tower = DinoTower(DinoConfig(32, 128, 2, 2, 448, 14, 1e-6))
    official.fill(tower, official.dino(case.tensors("state_dict.safetensors"), tower_grid := 32))
    found = tower(case.waves(448, 64))
    assert found.shape == (1, tower_grid**2, 32)
    case.close(found[:, ::4], "x_norm_patchtokens_stride4")


@pytest.mark.parametrize(("grid", "key"), [(32, "pos_table_448"), (16, "pos_table_224")])
def test_position_tables_equal_the_authors(mome_case: Any, grid: int, key: str) -> None:
    case = mome_case("dino_vit")
    table = case.tensors("state_dict.safetensors")["pos_embed"].numpy()
    resized = resize_positions(table, grid)
    np.testing.assert_allclose(resized, case.expected[key], atol=1e-5, rtol=0, strict=True)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])
    to_size = F.interpolate(
        torch.from_numpy(table[:, 1:]).view(1, 37, 37, -1).permute(0, 3, 1, 2), grid, mode="bicubic"
    )
    plain = to_size.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    assert float((plain - case.expected[key][:, 1:]).abs().max()) > 0.1  # the scale factor matters


@pytest.mark.parametrize(("stored", "grid"), [(37, 31), (5, 9), (7, 2), (1, 3), (2, 2)])
def test_position_tables_equal_torchs_resize_by_a_factor(stored: int, grid: int) -> None:
    table = torch.randn(1, 1 + stored**2, 3, generator=torch.Generator().manual_seed(stored))
    factor = (grid + 0.1) / stored
    square = table[:, 1:].view(1, stored, stored, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    assert expected.shape[2:] == (grid, grid)
    found = resize_positions(table.numpy(), grid)
    if stored == grid:  # the authors leave it alone
        np.testing.assert_array_equal(found, table)
    else:
        np.testing.assert_allclose(found[:, 1:], expected.flatten(2).transpose(1, 2), atol=2e-5)


@pytest.mark.parametrize("rows", [1, 4, 1370 + 4])
def test_a_table_that_is_no_square_is_refused(rows: int) -> None:
    """1374 rows are a tower with four registers."""
    with pytest.raises(MoiieError, match=f"{rows - 1} rows behind the class token's"):
        resize_positions(np.zeros((1, rows, 2), np.float32), 32)


def test_eva_equals_transformers() -> None:
    """Blip2VisionModel is the same tower; its own final norm is skipped by reading the last hidden state (spec 2)."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "image_size": 28, "patch_size": 14}
    config = Blip2VisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=3)
    theirs = random_weights(Blip2VisionModel(config), 1)
    ours = EvaTower(EvaConfig(24, 40, 2, 3, 28, 14, config.layer_norm_eps, 1e-5))
    renamed = {
        name.replace("encoder.", "")
        .replace("layer_norm", "norm")
        .replace("self_attn.projection", "attention.output")
        .replace("self_attn", "attention"): value
        for name, value in theirs.state_dict().items()
        if not name.startswith("post_layernorm")
    }
    official.fill(ours, renamed)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inner = theirs.encoder(theirs.embeddings(pixels)).last_hidden_state
    np.testing.assert_allclose(ours(pixels), inner, atol=1e-5, rtol=1e-5)


def test_dino_equals_transformers(tmp_path: Path) -> None:
    """Read as save_pretrained leaves it: names in memory change from release to release."""
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {"hidden_size": 24, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    theirs = random_weights(Dinov2Model(Dinov2Config(**sizes, num_hidden_layers=2, num_attention_heads=3)), 3)
    ours = DinoTower(DinoConfig(24, 48, 2, 3, 56, 14, theirs.config.layer_norm_eps))
    theirs.save_pretrained(tmp_path)
    saved = official.read(tmp_path / "model.safetensors")
    state = {name: value for name, value in saved.items() if "mask_token" not in name}
    for index in range(2):
        attention = f"encoder.layer.{index}.attention."
        for leaf in ("weight", "bias"):
            split = [state.pop(f"{attention}attention.{name}.{leaf}") for name in ("query", "key", "value")]
            state[f"{attention}qkv.{leaf}"] = torch.cat(split)
    renamed = {
        name.replace("encoder.layer.", "layers.")
        .replace("patch_embeddings.projection", "patch_projection")
        .replace("output.dense", "output")
        .replace(".lambda1", ""): value
        for name, value in state.items()
    }
    official.fill(ours, renamed)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(ours(pixels), theirs(pixels).last_hidden_state[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("real", [11, 1])
def test_pix2struct_on_real_patches_equals_transformers_on_padded_ones(real: int) -> None:
    """Spec 2: without padding there is nothing to mask. The heads' width is not the hidden size divided by heads."""
    from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

    sizes: dict[str, Any] = {"hidden_size": 24, "d_kv": 5, "d_ff": 40, "seq_len": 16, "patch_embed_hidden_size": 48}
    config = Pix2StructVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=3)
    theirs = random_weights(Pix2StructVisionModel(config), 5)
    ours = Pix2StructTower(Pix2StructConfig(24, 2, 3, 5, 40, 16, 14, 4, config.layer_norm_eps))
    official.fill(ours, official.pix2struct(theirs.state_dict()))
    generator = torch.Generator().manual_seed(6)
    flat = torch.zeros(2, 14, 50)
    flat[:, :real, 2:] = torch.randn(2, real, 48, generator=generator)
    flat[:, :real, :2] = torch.randint(1, 16, (2, real, 2), generator=generator).float()
    mask = torch.zeros(2, 14)
    mask[:, :real] = 1
    expected = theirs(flat, attention_mask=mask).last_hidden_state[:, :real]
    np.testing.assert_allclose(ours(flat[:, :real]), expected, atol=1e-5, rtol=1e-5)
