"""What the tests of the CPU operators share: random weights, sessions of one node, and the same arithmetic in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from moiie_runtime.native import library
from moiie_runtime.native_packing import pack

ISAS = ("portable", "avx2", "avx512", "amx")
REFUSALS = (Fail, InvalidArgument, RuntimeException)
AMX_ROWS = 48
"""From so many rows on, the tile unit does a product, with activations and weights in bfloat16."""
_KINDS = {
    np.dtype("float32"): TensorProto.FLOAT,
    np.dtype("int32"): TensorProto.INT32,
    np.dtype("uint8"): TensorProto.UINT8,
}


@dataclass(frozen=True)
class Weight:
    """values int8 [N, K] and float16 scales [N, K/group]."""

    values: np.ndarray
    scales: np.ndarray
    bits: int

    @property
    def dense(self) -> np.ndarray:
        group = self.values.shape[1] // self.scales.shape[1]
        return self.values.astype(np.float32) * np.repeat(self.scales.astype(np.float32), group, 1)

    def packed(self, swiglu: bool = False) -> np.ndarray:
        return pack(self.values, self.scales, self.bits, swiglu)


def random_weight(rng: np.random.Generator, rows: int, columns: int, bits: int, group: int) -> Weight:
    limit = 1 << (bits - 1)
    values = rng.integers(-limit, limit, (rows, columns)).astype(np.int8)
    return Weight(values, rng.uniform(0.1, 1, (rows, columns // group)).astype(np.float16) / np.float16(limit), bits)


def session(operator: str, feeds: Mapping[str, np.ndarray | None], threads: int = 2, **attributes: Any) -> Any:
    """A session of one node whose inputs are all inputs of the graph; None leaves an optional one out."""
    values = [
        helper.make_tensor_value_info(name, _KINDS[value.dtype], None)
        for name, value in feeds.items()
        if value is not None
    ]
    names = ["" if value is None else name for name, value in feeds.items()]
    node = helper.make_node(operator, names, ["y"], domain="moiie.cpu", **attributes)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("moiie.cpu", 1)]
    model = helper.make_model(helper.make_graph([node], "one", values, [out]), opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(operator: str, feeds: Mapping[str, np.ndarray | None], threads: int = 2, **attributes: Any) -> np.ndarray:
    given = {name: value for name, value in feeds.items() if value is not None}
    return session(operator, feeds, threads, **attributes).run(None, given)[0]


def need_isa(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """Make new sessions use this instruction set; skip where the processor has not got it."""
    monkeypatch.setenv("MOIIE_CPU_ISA", isa)
    feeds = {"x": np.zeros((1, 32), np.float32), "w": np.zeros(18 * 32, np.uint8)}
    try:
        run("QLinear", feeds, N=1, K=32, bits=4, group=32)
    except REFUSALS as error:
        if "this processor or system has no" not in str(error):
            raise
        pytest.skip(f"no {isa} here")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x, 2, -1)
    return silu(gate) * up


def product(x: np.ndarray, weight: Weight, isa: str) -> np.ndarray:
    """x times the weight, transposed, in float64 but with the roundings that the operators make."""
    if isa == "amx" and x.shape[0] >= AMX_ROWS:
        return bfloat16(x).astype(np.float64) @ bfloat16(weight.dense).T.astype(np.float64)
    return int8_strips(x).astype(np.float64) @ weight.dense.T.astype(np.float64)


def int8_strips(x: np.ndarray) -> np.ndarray:
    """Rounded to 8 bits against the largest magnitude of each 32 columns."""
    strips = x.reshape(x.shape[0], x.shape[1] // 32, 32)
    peak = np.abs(strips).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, where=peak > 1e-30, out=np.zeros_like(peak))
    return (np.rint(strips * inverse) * (peak / np.float32(127))).reshape(x.shape)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected magnitude."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
