"""A bundle with an instance router, three vision experts and adapters, made by hand, and graphs that are numpy functions."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import moiie_runtime as mr
from moiie_export.prompts import MOME
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.tensors import save_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "mome" / "end_to_end"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this", "where", "it", "?"]
HIDDEN, LAYERS, ADAPTERS, BOTTLENECK, VOCABULARY = 8, 2, 3, 2, 320
_SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": "bicubic", "kind": "squash"}
EXPERTS: list[dict[str, Any]] = [
    {
        "name": "clip",
        "component": "vision_clip",
        "tokens": 5,
        "cls": True,
        "processor": _SQUASH | {"image_size": 4},
    },
    {
        "name": "dino",
        "component": "vision_dino",
        "tokens": 4,
        "cls": False,
        "processor": _SQUASH | {"image_size": 6},
    },
    {
        "name": "pix2struct",
        "component": "vision_pix2struct",
        "tokens": 4,
        "cls": False,
        "processor": {"kind": "patches", "patch_size": 2, "max_patches": 12, "query_grid": [2, 2]},
    },
]
COMPONENTS = ("router", *(expert["component"] for expert in EXPERTS), "decoder_prefill", "decoder_decode")
_NO_FILE = {"sha256": "0" * 64, "bytes": 0}


def manifest() -> dict[str, Any]:
    """A valid bundle.json."""
    router = {
        "file": "onnx/graph.onnx",
        "inputs": [],
        "outputs": [
            {"name": "move_weights", "dtype": "float32", "shape": ["texts", len(EXPERTS)]},
            {"name": "mole_index", "dtype": "int32", "shape": ["texts", LAYERS]},
        ],
    }
    other = {"file": "onnx/graph.onnx", "inputs": [], "outputs": []}
    phases = [component.removeprefix("decoder_") for component in COMPONENTS]
    return {
        "schema": 1,
        "name": "by-hand",
        "dtype": "float32",
        "model": {
            "model_type": "any",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "vocab_size": VOCABULARY,
            "sliding_window": None,
            "moe": None,
        },
        "tokens": {
            "bos": 1,
            "eos": [2],
            "pad": 0,
            "image_marker": "<image>",
            "image_placeholder": -200,
            "image_tokens": 5,
        },
        "vision_experts": json.loads(json.dumps(EXPERTS)),
        "instance_router": {"component": "router", "tokenizer": "sentence_encoder/tokenizer.json", "max_length": 6},
        "adapters": {"file": "onnx/weights.safetensors", "layers": [0, 1], "num_experts": ADAPTERS},
        "prompt": {"system": MOME.system, "stop_string": MOME.stop_string, "separator": MOME.separator},
        "generation": {"max_new_tokens": 6, "penalty_prompt": "bos"},
        "embed_tokens": {"file": "onnx/weights.safetensors", "tensor": "embed_tokens.weight"},
        "kv_cache": {"layout": "BNSH", "dtype": "float32", "capacity": 256},
        "components": {name: router if name == "router" else other for name in COMPONENTS},
        "residency": {phase: {"weights": [], "bytes": 1000} for phase in phases},
        "files": dict.fromkeys(
            ("onnx/graph.onnx", "onnx/weights.safetensors", "sentence_encoder/tokenizer.json"), _NO_FILE
        ),
    }


def weights(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Embedding table and adapter banks."""
    random = np.random.default_rng(0)
    shapes = {
        "down_proj.weight": (ADAPTERS, BOTTLENECK, HIDDEN),
        "down_proj.bias": (ADAPTERS, BOTTLENECK),
        "up_proj.weight": (ADAPTERS, HIDDEN, BOTTLENECK),
        "up_proj.bias": (ADAPTERS, HIDDEN),
        "scale": (ADAPTERS,),
    }
    tensors = {"embed_tokens.weight": random.standard_normal((VOCABULARY, HIDDEN)).astype(dtype)}
    for layer in range(LAYERS):
        for leaf, shape in shapes.items():
            tensors[f"mole.{layer}.{leaf}"] = random.standard_normal(shape).astype(dtype)
    return tensors


def write(root: Path, data: dict[str, Any] | None = None, tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """The bundle's directory."""
    data = manifest() if data is None else data
    for folder in ("onnx", "sentence_encoder"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "llm" / "tokenizer.json", root)
    (root / "chat_template.jinja").write_text(MOME.template, encoding="utf-8", newline="")
    sentence = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    sentence.normalizer = normalizers.BertNormalizer(lowercase=True)
    sentence.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sentence.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sentence.save(str(root / "sentence_encoder" / "tokenizer.json"))
    (root / "onnx" / "graph.onnx").write_bytes(b"")
    save_tensors(root / "onnx" / "weights.safetensors", dict(weights() if tensors is None else tensors))
    for name, record in data["files"].items():
        data["files"][name] = {**record, "bytes": (root / name).stat().st_size}
    (root / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    return root


class Graphs:
    """Opens a numpy function for each component, and counts what is opened, bound and run.

    Attributes:
        opened: components in the order they were opened.
        runs: runs of each component.
        fed: the feeds of every run, by component.
        bound: how often each input was bound, by component.
        adapters: for each decoder run, the scales of the adapters it saw.
    """

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.runs: Counter[str] = Counter()
        self.fed: dict[str, list[dict[str, np.ndarray]]] = {}
        self.bound: dict[str, Counter[str]] = {}
        self.adapters: list[tuple[str, list[list[float]]]] = []

    def __call__(self, component: str) -> Any:
        self.opened.append(component)
        return _Session(component, self)


class _Session:
    def __init__(self, component: str, graphs: Graphs) -> None:
        names = ["inputs_embeds", "logits_to_keep", "past_lengths"]
        self.inputs = dict.fromkeys(names, TensorSpec("float32", ()))
        self.outputs: dict[str, TensorSpec] = {}
        self._component, self._graphs = component, graphs
        self._buffers: dict[str, np.ndarray] = {}

    def bind(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._buffers[name] = array
        self._graphs.bound.setdefault(self._component, Counter())[name] += 1

    def unbind(self) -> None:
        self._buffers.clear()

    def close(self) -> None:
        self._buffers.clear()

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        self._graphs.runs[self._component] += 1
        self._graphs.fed.setdefault(self._component, []).append(dict(feeds))
        if self._component == "router":
            return route(**feeds)
        if self._component.startswith("vision_"):
            return {"image_features": see(self._component, feeds)}
        return {"logits": self._decode(feeds)}

    def _decode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """What came in and the adapters' scales, mixed so that both change every logit."""
        embeds = feeds["inputs_embeds"]
        scales = [self._buffers[f"adapter.{layer}.scale"] for layer in range(LAYERS)]
        assert {len(buffer) for name, buffer in self._buffers.items() if name.startswith("adapter.")} <= {
            1,
            len(embeds),
        }
        self._graphs.adapters.append((self._component, [scale.tolist() for scale in scales]))
        last = feeds.get("logits_to_keep", np.zeros((len(embeds), 1), np.int64))[:, 0]
        sums = np.array([row[: 1 + stop].sum(axis=0) for row, stop in zip(embeds, last, strict=True)])
        sums = sums + 0.1 * feeds["past_lengths"][:, None]
        directions = np.random.default_rng(1).standard_normal((HIDDEN, VOCABULARY))
        waves = np.cos(np.arange(VOCABULARY) * np.arange(1, LAYERS + 1)[:, None])
        mixed = sum(scale[:, None] * wave for scale, wave in zip(scales, waves, strict=True))
        return (np.sin(sums @ directions) + mixed).astype(np.float32)[:, None]


def route(input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Weights and adapters that follow from the sum of the word pieces."""
    total = (input_ids * attention_mask).sum(axis=1)[:, None]
    scores = np.exp(np.sin(total * np.arange(1, len(EXPERTS) + 1)))
    index = (total + np.arange(LAYERS)) % ADAPTERS
    return {"move_weights": (scores / scores.sum(1, keepdims=True)).astype("f4"), "mole_index": index.astype(np.int32)}


def see(component: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Features that follow from the picture and the encoder."""
    expert = next(each for each in EXPERTS if each["component"] == component)
    values = feeds["flattened_patches"][..., 2:] if "flattened_patches" in feeds else feeds["pixel_values"]
    assert values.shape[0] == 1
    grid = np.arange(expert["tokens"] * HIDDEN).reshape(1, expert["tokens"], HIDDEN)
    return np.sin(grid + len(component) + 5 * values.mean() + values.std()).astype(np.float32)


def load(root: Path, graphs: Graphs, **options: Any) -> mr.VLM:
    """The model over these graphs."""
    return mr.VLM(mr.Bundle.open(root), graphs, **options)


def picture(seed: int = 0, width: int = 9, height: int = 7) -> np.ndarray:
    """A picture [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
