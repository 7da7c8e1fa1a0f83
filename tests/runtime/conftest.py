"""Bundles that are made by hand: enough to read, encode and refuse, without an export."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moiie_export.prompts import PHI3

GOLDEN = Path(__file__).parent.parent / "golden"
_COMPONENT = {
    "file": "onnx/graph.onnx",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}],
}
_MANIFEST: dict[str, Any] = {
    "schema": 1,
    "name": "by-hand",
    "created_by": {"tool": "moiie-export", "version": "0.1.0"},
    "dtype": "float32",
    "model": {
        "model_type": "bunny-mm-phi3-moe-s",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 352,
        "sliding_window": 2047,
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "layers": [1, 3],
            "expert_groups": {"vision": [0, 1, 2], "language": [1, 2, 3]},
            "routed": True,
        },
    },
    "tokens": {
        "bos": 1,
        "eos": [3],
        "pad": 3,
        "image_marker": "<image>",
        "image_placeholder": -200,
        "image_tokens": 729,
    },
    "modality": {"last_image_token_is_language": True},
    "processor": {
        "image_size": 384,
        "aspect_ratio": "pad",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "rescale_factor": 0.00392156862745098,
        "resample": "bicubic",
    },
    "prompt": {"system": PHI3.system, "stop_string": PHI3.stop_string},
    "generation": {"max_new_tokens": 256, "do_sample": False},
    "embed_tokens": {"file": "onnx/weights.safetensors", "tensor": "embed_tokens.weight"},
    "kv_cache": {"layout": "BNSH", "dtype": "float32", "capacity": 64},
    "components": dict.fromkeys(("vision_encoder", "decoder_prefill", "decoder_decode"), _COMPONENT),
    "residency": {phase: {"weights": [], "bytes": 0} for phase in ("vision_encoder", "prefill", "decode")},
    "files": {
        "onnx/graph.onnx": {"sha256": "0" * 64, "bytes": 0},
        "onnx/weights.safetensors": {"sha256": "0" * 64, "bytes": 0},
    },
    "a_later_key": {"is": "kept"},
}


@pytest.fixture
def manifest() -> dict[str, Any]:
    """A valid bundle.json, to be changed at will."""
    return copy.deepcopy(_MANIFEST)


@pytest.fixture
def write_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Writes a bundle directory: a manifest, a tokenizer and a chat template; no graphs."""

    def write(manifest: dict[str, Any], case: str = "moiie_phi3", template: str = PHI3.template) -> Path:
        root = tmp_path / "bundle"
        root.mkdir(exist_ok=True)
        (root / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
        (root / "chat_template.jinja").write_text(template, encoding="utf-8")
        shutil.copy(GOLDEN / case / "checkpoint" / "tokenizer.json", root)
        return root

    return write
