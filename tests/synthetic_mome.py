"""A MoME checkpoint of any size with random weights, for benchmarks: the golden tokenizer, the real sentence tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from moiie_export.convert.settings import load_settings
from moiie_export.families import family_of
from moiie_export.weights import CHECKPOINT
from moiie_runtime.tensors import save_tensors
from tests.mome_golden import minilm
from tests.mome_layout import GOLDEN

SIZES: dict[str, Any] = {
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 320,
    },
    "vision_experts": [
        {
            "name": "clip",
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 768,
        },
        {
            "name": "dino",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        },
        {
            "name": "pix2struct",
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "d_kv": 24,
            "d_ff": 256,
        },
    ],
}
"""Small enough for a CPU; the pictures are as large, and the adapters' share of the decoder is as in the published model."""


def write_mome_checkpoint(directory: Path, sizes: dict[str, Any], seed: int = 0) -> None:
    """Write a converted checkpoint: config.json, both tokenizers, model.safetensors in float32."""
    directory.mkdir(parents=True)
    override = directory.with_suffix(".json")
    override.write_text(json.dumps(sizes), encoding="utf-8")
    raw, config = load_settings(override)
    weight_map = family_of(config).weight_map(config, config.text.vocab_size, {CHECKPOINT: ()})
    random = np.random.default_rng(seed)
    tensors = {
        part.tensor: _values(part.tensor, part.shape, random) for weight in weight_map.weights for part in weight.parts
    }
    save_tensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "llm" / name, directory / name)
    (directory / "sentence_encoder").mkdir()
    shutil.copy(minilm() / "tokenizer.json", directory / "sentence_encoder" / "tokenizer.json")


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Matrices that keep the size of what they multiply, norms around 1, reference points inside the map."""
    if name.endswith("reference_points"):
        return random.uniform(0, 1, shape).astype(np.float32)
    values = random.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values / np.float32(max(1, np.prod(shape[1:])) ** 0.5)
    norm = "norm" in name.lower() and name.endswith("weight")
    return values * np.float32(0.02) + np.float32(1 if norm or name.endswith(("scale", "lambda1")) else 0)
