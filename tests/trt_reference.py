"""A graph in a TensorRT dialect, computed by numpy: what its native layers and plugins mean, written from their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = np.ndarray[Any, Any]


def run_dialect(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of the graph by name."""
    return Dialect(path).run(feeds)


class Dialect:
    """A graph in a TensorRT dialect, ready to run."""

    def __init__(self, path: Path) -> None:
        self._evaluator = _evaluator(onnx.load(path))

    @property
    def inputs(self) -> list[str]:
        """Names."""
        return list(self._evaluator.input_names)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        results = self._evaluator.run(None, dict(feeds))
        return dict(zip(self._evaluator.output_names, results, strict=True))


def _evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Native layers of domain '' are looked up in a domain of their own."""
    for node in model.graph.node:
        if node.op_type.startswith("TRT_"):
            node.domain = "trt"
    model.opset_import.append(onnx.helper.make_opsetid("trt", 1))
    ops = [
        GatherElements,
        KVCacheUpdate,
        NativeUpdate,
        NativeAttention,
        DecodeAttention,
        ExpertDispatch,
        QuantizedExpertDispatch,
        Fp8ExpertDispatch,
    ]
    return ReferenceEvaluator(model, new_ops=ops)


class GatherElements(OpRun):  # type: ignore[misc]
    """onnx's own fails where the index is shorter than the data."""

    op_domain = ""

    def _run(self, data: Array, index: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(data, index, axis),)


def _updated(cache: Array, update: Array, starts: Array) -> Array:
    out = cache.copy()
    for row, start in enumerate(starts):
        out[row, :, start : start + update.shape[2]] = update[row]
    return out


def _attend(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """softmax(q k^T) v without a scale; seen [B, 1, T, S]."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (np.repeat(each.astype(np.float32), groups, axis=1) for each in (key, value))
    scores = np.where(seen, query.astype(np.float32) @ keys.swapaxes(2, 3), -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (shares / shares.sum(axis=-1, keepdims=True) @ values).astype(query.dtype)


class NativeUpdate(OpRun):  # type: ignore[misc]
    op_domain = "trt"

    def _run(self, cache: Array, update: Array, starts: Array, **_: Any) -> tuple[Array]:
        assert starts.dtype == np.int32
        return (_updated(cache, update, starts),)


NativeUpdate.__name__ = "TRT_KVCacheUpdate"


class KVCacheUpdate(OpRun):  # type: ignore[misc]
    op_domain = "moiie"

    def _run(self, cache: Array, update: Array, starts: Array, **_: Any) -> tuple[Array]:
        assert starts.dtype == np.int32
        return (_updated(cache, update, starts),)


class NativeAttention(OpRun):  # type: ignore[misc]
    op_domain = "trt"

    def _run(self, query: Array, key: Array, value: Array, *rest: Any, causal_kind: str = "", **_: Any) -> tuple[Array]:
        mask, _lengths, lengths = (*rest, None, None, None)[:3]
        tokens, slots = query.shape[2], np.arange(key.shape[2])
        seen = np.ones((query.shape[0], 1, tokens, key.shape[2]), bool)
        if lengths is not None:
            assert lengths.dtype == np.int32
            ends = lengths[:, None, None, None]
            seen &= slots < ends
            if causal_kind == "lower_right":
                seen &= slots <= np.arange(tokens)[:, None] + ends - tokens
        if mask is not None:
            assert causal_kind == "none"
            assert mask.dtype == bool
            seen = seen & mask
        return (_attend(query, key, value, seen),)


NativeAttention.__name__ = "TRT_Attention"


class DecodeAttention(OpRun):  # type: ignore[misc]
    op_domain = "moiie"

    def _run(
        self, query: Array, key: Array, value: Array, past: Array, window: int = 0, scale: float = 0.0, **_: Any
    ) -> tuple[Array]:
        tokens, slots = query.shape[2], np.arange(key.shape[2])
        newest = past[:, None, None, None] + np.arange(tokens)[:, None]
        seen = slots <= newest
        if window:
            seen = seen & (slots > newest - window)
        factor = scale or 1 / np.sqrt(query.shape[3])
        return (_attend((query.astype(np.float32) * factor).astype(np.float32), key, value, seen).astype(query.dtype),)


def _experts(hidden: Array, routes: tuple[Array, Array], gate_up: Array, down: Array, experts: list[int]) -> Array:
    out = np.zeros(hidden.shape, np.float32)
    ids, weights = routes
    for row, slot in np.ndindex(*ids.shape):
        if ids[row, slot] in experts:
            bank = experts.index(ids[row, slot])
            gate, up = np.split(gate_up[bank].astype(np.float32) @ hidden[row].astype(np.float32), 2)
            out[row] += weights[row, slot] * (down[bank].astype(np.float32) @ (gate / (1 + np.exp(-gate)) * up))
    return out.astype(hidden.dtype)


class ExpertDispatch(OpRun):  # type: ignore[misc]
    op_domain = "moiie"

    def _run(self, hidden: Array, ids: Array, weights: Array, gate_up: Array, down: Array, **kept: Any) -> tuple[Array]:
        assert ids.dtype == np.int32
        assert weights.dtype == np.float32
        return (_experts(hidden, (ids, weights), gate_up, down, list(kept["experts"])),)


class QuantizedExpertDispatch(OpRun):  # type: ignore[misc]
    op_domain = "moiie"

    def _run(self, hidden: Array, ids: Array, weights: Array, *banks: Array, **kept: Any) -> tuple[Array]:
        plain = [
            _plain(q, scales, kept["bits"], kept["group_size"]) for q, scales in zip(banks[:2], banks[2:], strict=True)
        ]
        return (_experts(hidden, (ids, weights), *plain, list(kept["experts"])),)


class Fp8ExpertDispatch(OpRun):  # type: ignore[misc]
    """Numbers are E4M3, or their bits."""

    op_domain = "moiie"

    def _run(self, hidden: Array, ids: Array, weights: Array, *banks: Array, **kept: Any) -> tuple[Array]:
        assert all(scales.dtype == np.float32 for scales in banks[2:])
        plain = [
            q.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[..., None]
            for q, scales in zip(banks[:2], banks[2:], strict=True)
        ]
        return (_experts(hidden, (ids, weights), *plain, list(kept["experts"])),)


def _plain(q: Array, scales: Array, bits: int, group_size: int) -> Array:
    assert q.dtype == np.int8
    assert scales.dtype == np.float16
    if bits == 4:
        q = np.stack([(q << 4) >> 4, q >> 4], axis=-1).reshape(*q.shape[:-1], -1)
    grouped = q.astype(np.float32).reshape(*scales.shape, group_size) * scales.astype(np.float32)[..., None]
    return grouped.reshape(q.shape)
