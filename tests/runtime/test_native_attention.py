"""Attend and Route of the CPU kernels, beside the same arithmetic in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from moiie_runtime.native import library
from tests.runtime.native_ops import REFUSALS, need_isa

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}
Arrays = Mapping[str, np.ndarray]


def run(
    operator: str, feeds: Arrays, results: Sequence[tuple[str, str]], threads: int = 2, **attributes: Any
) -> list[Any]:
    """All outputs of one node; `results` are their names and types."""
    inputs = [helper.make_tensor_value_info(name, _TYPES[array.dtype.name], None) for name, array in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, _TYPES[kind], None) for name, kind in results]
    names = [name for name, _ in results]
    node = helper.make_node(operator, list(feeds), names, domain="moiie.cpu", **attributes)
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moiie.cpu", 1)]
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library()))
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))


@dataclass(frozen=True)
class Case:
    """Heads, key heads, head size, capacity, window (0: none), tokens a row, and what each row holds already."""

    heads: int
    key_heads: int
    size: int
    capacity: int
    window: int
    tokens: int
    lengths: tuple[int, ...]

    def feeds(self, dtype: str) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        rows, width = len(self.lengths) * self.tokens, (self.heads + 2 * self.key_heads) * self.size
        buffers = (len(self.lengths), self.key_heads, self.capacity, self.size)
        angles = rng.random((self.capacity, self.size // 2))
        return {
            "qkv": rng.standard_normal((rows, width)).astype(np.float32),
            "keys": rng.standard_normal(buffers).astype(dtype),
            "values": rng.standard_normal(buffers).astype(dtype),
            "past_lengths": np.array(self.lengths, np.int64),
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
        }

    @property
    def attributes(self) -> dict[str, int]:
        return {
            "num_heads": self.heads,
            "kv_num_heads": self.key_heads,
            "head_size": self.size,
            "local_window_size": self.window,
        }

    def expected(self, feeds: Arrays) -> list[np.ndarray]:
        """Output, keys and values: written down from the definition, one token and head at a time."""
        keys, values = (feeds[name].astype(np.float64) for name in ("keys", "values"))
        tokens = feeds["qkv"].astype(np.float64).reshape(len(self.lengths), self.tokens, -1, self.size)
        out = np.empty((len(self.lengths), self.tokens, self.heads, self.size))
        for row, length in enumerate(self.lengths):
            places = np.arange(length, length + self.tokens)
            turned = rotated(tokens[row], feeds["cosines"][places, None], feeds["sines"][places, None])
            keys[row, :, places] = turned[:, self.heads : self.heads + self.key_heads]
            values[row, :, places] = tokens[row, :, self.heads + self.key_heads :]
            for token, place in enumerate(places):
                oldest = max(0, place + 1 - self.window) if self.window else 0
                for head in range(self.heads):
                    group = head * self.key_heads // self.heads
                    scores = keys[row, group, oldest : place + 1] @ turned[token, head] / np.sqrt(self.size)
                    weights = np.exp(scores - scores.max())
                    out[row, token, head] = weights / weights.sum() @ values[row, group, oldest : place + 1]
        return [out.reshape(-1, self.heads * self.size), keys, values]


def rotated(heads: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


CASES = {
    "a token a row": Case(4, 2, 16, 64, 0, 1, (5, 17)),
    "a token behind many": Case(4, 2, 64, 300, 0, 1, (256,)),
    "a head size between": Case(4, 4, 96, 160, 40, 37, (0, 100)),
    "a prompt in several tiles": Case(8, 2, 32, 200, 0, 150, (3,)),
    "a window shorter than a block": Case(4, 1, 128, 420, 30, 3, (390, 1)),
    "eight rows, which other loops take": Case(8, 1, 16, 80, 0, 1, (70,)),
    "into the last slot": Case(2, 2, 16, 8, 0, 3, (5,)),
}


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_the_definition(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_isa(monkeypatch, isa)
    case = CASES[name]
    feeds = case.feeds("float32")
    found = run("Attend", feeds, [("out", "float32"), ("k", "float32"), ("v", "float32")], **case.attributes)
    for got, wanted in zip(found, case.expected(feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_buffers_may_hold_half_precision(name: str) -> None:
    case = CASES[name]
    feeds = case.feeds("float16")
    found = run("AttendHalf", feeds, [("out", "float32"), ("k", "float16"), ("v", "float16")], **case.attributes)
    out, keys, values = case.expected(feeds)
    for got, wanted in zip(
        found[1:], (keys, values), strict=True
    ):  # one unit in the last place where rounding is a tie
        np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=2**-10, atol=1e-7)
    np.testing.assert_allclose(found[0], out, rtol=0, atol=4e-3)


def test_threads_do_not_change_a_bit() -> None:
    case = CASES["a prompt in several tiles"]
    results = [("out", "float32"), ("k", "float32"), ("v", "float32")]
    one, two = (run("Attend", case.feeds("float32"), results, threads, **case.attributes) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past_lengths": np.array([6], np.int64)}, "3 tokens behind 6 do not fit a buffer of 8"),
        ({"past_lengths": np.array([-1], np.int64)}, "do not fit"),
        ({"past_lengths": np.array([0, 0], np.int64)}, "past_lengths must be"),
        ({"qkv": np.zeros((3, 95), np.float32)}, "qkv must be"),
        ({"cosines": np.zeros((7, 8), np.float32)}, "tables must be"),
        ({"values": np.zeros((1, 2, 9, 16), np.float32)}, "keys and values must be"),
    ],
)
def test_wrong_shapes_are_refused(change: Arrays, message: str) -> None:
    case = CASES["into the last slot"]
    with pytest.raises(REFUSALS, match=message):
        run(
            "Attend",
            {**case.feeds("float32"), **change},
            [("out", "float32"), ("k", "float32"), ("v", "float32")],
            **case.attributes,
        )


def test_a_head_size_between_vectors_is_refused() -> None:
    case = CASES["into the last slot"]
    with pytest.raises(REFUSALS, match="multiple of 16"):
        run(
            "Attend",
            case.feeds("float32"),
            [("out", "float32"), ("k", "float32"), ("v", "float32")],
            **{**case.attributes, "head_size": 24},
        )


ROUTED = [("logits", "float32"), ("ids", "int32"), ("weights", "float32")]
GROUPS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "language_experts": [1, 2, 3], "vision_experts": [0, 1, 2]}


@pytest.mark.parametrize("tokens", [0, 1, 5, 200])
def test_each_modality_is_routed_by_its_gate(tokens: int) -> None:
    rng = np.random.default_rng(1)
    feeds = {
        "x": rng.standard_normal((tokens, 40)).astype(np.float32),
        "gate": rng.standard_normal((3, 40)).astype(np.float32),
        "modality": rng.integers(0, 2, tokens).astype(np.int32),
        "gate_vis": rng.standard_normal((3, 40)).astype(np.float32),
    }
    logits, ids, weights = run("Route", feeds, ROUTED, **GROUPS)
    wanted = np.full((tokens, 4), -np.inf)
    for row, kind in enumerate(feeds["modality"]):
        group, gate = (GROUPS["vision_experts"], "gate_vis") if kind else (GROUPS["language_experts"], "gate")
        wanted[row, group] = feeds[gate].astype(np.float64) @ feeds["x"][row]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(ids, order)
    shares = np.exp(np.take_along_axis(wanted, order, 1) - wanted.max(axis=1, keepdims=True, initial=-1e30))
    np.testing.assert_allclose(weights, shares / shares.sum(axis=1, keepdims=True), atol=1e-5)


def test_of_equal_logits_the_lower_id_is_first() -> None:
    feeds = {"x": np.ones((1, 8), np.float32), "gate": np.ones((3, 8), np.float32)}
    _, ids, weights = run("Route", feeds, ROUTED, **GROUPS)
    assert ids.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_a_gate_of_another_size_is_refused() -> None:
    feeds = {"x": np.ones((1, 8), np.float32), "gate": np.ones((2, 8), np.float32)}
    with pytest.raises(REFUSALS, match=r"a gate must be \[3, 8\]"):
        run("Route", feeds, ROUTED, **GROUPS)
