"""The CPU operators beside ONNX Runtime's own: layers of experts and dense ones, 1024 wide, int4 in groups of 32.

usage: native.py [--tokens 1 256] [--threads 2] [--rounds 15] [--json FILE]

Layers are chained so that weights come from memory, not from a cache. All sessions live in one process, one at a time is
run and their samples alternate; idle pools do not spin. A sample during which other processes took more than 6 % of the CPU
is not counted. Decode is judged by the weight bytes of the chosen experts a second, prefill by multiply-adds a second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from moiie_runtime.native import library
from moiie_runtime.native_packing import pack_stored
from tests.bench.quiet import foreign_share, usage
from tests.bench.record import append, environment, show
from tests.bench.rounds import ratio, summarise

HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 1024, 2816, 4, 2, 32
LAYERS = 8
DENSE_LAYERS = LAYERS * EXPERTS  # as many bytes of weights
FFN_WEIGHTS = 3 * HIDDEN * INNER
BITS_PER_WEIGHT = 4 + 16 / GROUP
OURS = "moiie.cpu"


@dataclass(frozen=True)
class Weight:
    """An int4 weight as a bundle stores it."""

    stored: np.ndarray
    scales: np.ndarray

    @property
    def unsigned(self) -> np.ndarray:
        return (self.stored ^ np.int8(-120)).view(np.uint8)


def weight(rows: int, columns: int, rng: np.random.Generator) -> Weight:
    """Random values whose product with a vector has about its size."""
    stored = rng.integers(-128, 128, (rows, columns // 2), np.int8)
    return Weight(stored, np.full((rows, columns // GROUP), 1 / (4.6 * columns**0.5), np.float16))


class Graph:
    """A chain of layers x -> x + layer(x)."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.x = "x"

    def constant(self, name: str, value: np.ndarray) -> str:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.weights.append(helper.make_tensor(name, kind, value.shape, value.tobytes(), raw=True))
        return name

    def node(self, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def add(self, y: str) -> None:
        self.x = self.node("Add", [self.x, y])

    def session(self, inputs: dict[str, tuple[int, list[Any]]], threads: int) -> ort.InferenceSession:
        values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        out = helper.make_tensor_value_info(self.x, TensorProto.FLOAT, ["T", HIDDEN])
        graph = helper.make_graph(self.nodes, "layers", values, [out], self.weights)
        domains = [helper.make_opsetid(name, version) for name, version in (("", 21), ("com.microsoft", 1), (OURS, 1))]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(str(library()))
        return ort.InferenceSession(model.SerializeToString(), options)


def experts_of_ours(graph: Graph, layer: int, banks: list[tuple[Weight, Weight]]) -> None:
    up = [graph.constant(f"u{layer}.{e}", pack_stored(u.stored, u.scales, 4, True)) for e, (u, _) in enumerate(banks)]
    down = [graph.constant(f"d{layer}.{e}", pack_stored(d.stored, d.scales, 4)) for e, (_, d) in enumerate(banks)]
    inputs = [graph.x, "ids", "weights", *up, *down]
    sizes = {"H": HIDDEN, "I": INNER, "bits_gate_up": 4, "bits_down": 4, "group_gate_up": GROUP, "group_down": GROUP}
    graph.add(graph.node("QExperts", inputs, OURS, **sizes, experts=list(range(EXPERTS))))


def experts_of_onnxruntime(graph: Graph, layer: int, banks: list[tuple[Weight, Weight]]) -> None:
    inputs = [graph.x, "logits"]
    for part, name in enumerate("ud"):
        values = np.stack([bank[part].unsigned for bank in banks])
        scales = np.stack([bank[part].scales for bank in banks]).astype(np.float32)
        if name == "u":  # rows g0, u0, g1, u1 ..
            values, scales = (np.stack(np.split(each, 2, 1), 2).reshape(each.shape) for each in (values, scales))
        inputs += [graph.constant(f"{name}{layer}", values), graph.constant(f"{name}{layer}.scales", scales), ""]
    attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    attributes |= {"k": TOP_K, "normalize_routing_weights": 1, "expert_weight_bits": 4, "block_size": GROUP}
    graph.add(graph.node("QMoE", inputs[:-1], "com.microsoft", **attributes, accuracy_level=4))


def dense_of_ours(graph: Graph, layer: int, up: Weight, down: Weight) -> None:
    sizes = {"bits": 4, "group": GROUP}
    u = graph.constant(f"u{layer}", pack_stored(up.stored, up.scales, 4, True))
    d = graph.constant(f"d{layer}", pack_stored(down.stored, down.scales, 4))
    inner = graph.node("QLinear", [graph.x, u], OURS, N=2 * INNER, K=HIDDEN, swiglu=1, **sizes)
    graph.add(graph.node("QLinear", [inner, d], OURS, N=HIDDEN, K=INNER, **sizes))


def dense_of_onnxruntime(graph: Graph, layer: int, up: Weight, down: Weight) -> None:
    def linear(x: str, name: str, w: Weight) -> str:
        rows, columns = w.stored.shape[0], w.stored.shape[1] * 2
        values = graph.constant(name, w.unsigned.reshape(rows, columns // GROUP, GROUP // 2))
        scales = graph.constant(f"{name}.scales", w.scales.astype(np.float32))
        sizes = {"N": rows, "K": columns, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        return graph.node("MatMulNBits", [x, values, scales], "com.microsoft", **sizes)

    both = linear(graph.x, f"u{layer}", up)
    parts = [f"gate{layer}", f"up{layer}"]
    graph.nodes.append(helper.make_node("Split", [both], parts, axis=1, num_outputs=2))
    gate = graph.node("QuickGelu", [parts[0]], "com.microsoft", alpha=1.0)
    graph.add(linear(graph.node("Mul", [gate, parts[1]]), f"d{layer}", down))


Session = tuple[ort.InferenceSession, Callable[[int], dict[str, np.ndarray]]]


def moe_sessions(threads: int) -> dict[str, Session]:
    """Our layers of experts and ONNX Runtime's, on the same weights."""
    graphs = {"ours": Graph(), "QMoE": Graph()}
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        banks = [(weight(2 * INNER, HIDDEN, rng), weight(HIDDEN, INNER, rng)) for _ in range(EXPERTS)]
        experts_of_ours(graphs["ours"], layer, banks)
        experts_of_onnxruntime(graphs["QMoE"], layer, banks)
    x = {"x": (TensorProto.FLOAT, ["T", HIDDEN])}
    routes = {"ids": (TensorProto.INT32, ["T", TOP_K]), "weights": (TensorProto.FLOAT, ["T", TOP_K])}
    logits = {"logits": (TensorProto.FLOAT, ["T", EXPERTS])}

    def ours(tokens: int) -> dict[str, np.ndarray]:
        scores = routing(tokens)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K].astype(np.int32)
        chosen = np.exp(np.take_along_axis(scores, ids, 1))
        return {"x": hidden(tokens), "ids": ids, "weights": chosen / chosen.sum(1, keepdims=True)}

    return {
        "ours": (graphs["ours"].session(x | routes, threads), ours),
        "QMoE": (graphs["QMoE"].session(x | logits, threads), lambda t: {"x": hidden(t), "logits": routing(t)}),
    }


def dense_sessions(threads: int) -> dict[str, Session]:
    """Our dense layers and ONNX Runtime's, on the same weights."""
    graphs = {"ours": Graph(), "MatMulNBits": Graph()}
    for layer in range(DENSE_LAYERS):
        rng = np.random.default_rng(layer)
        up, down = weight(2 * INNER, HIDDEN, rng), weight(HIDDEN, INNER, rng)
        dense_of_ours(graphs["ours"], layer, up, down)
        dense_of_onnxruntime(graphs["MatMulNBits"], layer, up, down)
    x = {"x": (TensorProto.FLOAT, ["T", HIDDEN])}
    return {name: (graph.session(x, threads), lambda t: {"x": hidden(t)}) for name, graph in graphs.items()}


def hidden(tokens: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((tokens, HIDDEN), np.float32)


def routing(tokens: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((tokens, EXPERTS), np.float32)


def sample(session: Session, tokens: int, layer_weights: int) -> dict[str, float]:
    """One sample: the median of a few runs."""
    run, feeds = session[0], session[1](tokens)
    before, times = usage(os.getpid()), []
    while len(times) < 3 or sum(times) < 0.3:  # the clocks of /proc tick 100 times a second
        started = time.perf_counter()
        run.run(None, feeds)
        times.append(time.perf_counter() - started)
    foreign = foreign_share(before, usage(os.getpid()), os.cpu_count() or 1)
    seconds = sorted(times)[len(times) // 2]
    return {
        "seconds": seconds,
        "best_seconds": min(times),
        "gbyte_per_second": layer_weights * BITS_PER_WEIGHT / 8 / seconds / 1e9,
        "gmac_per_second": layer_weights * tokens / seconds / 1e9,
        "foreign": foreign,
    }


def measure(kind: str, sessions: dict[str, Session], tokens: int, rounds: int) -> dict[str, Any]:
    """Alternating samples of the sessions at one number of tokens, their medians and ratios."""
    weights = LAYERS * TOP_K * FFN_WEIGHTS if kind == "moe" else DENSE_LAYERS * FFN_WEIGHTS
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sessions}
    for session in sessions.values():
        sample(session, tokens, weights)
    for number in range(rounds):
        for name, session in sessions.items():
            taken[name].append({**sample(session, tokens, weights), "round": number})
    metrics = ("seconds", "best_seconds", "gbyte_per_second", "gmac_per_second")
    peer = next(name for name in sessions if name != "ours")
    return {
        "engines": {name: summarise(samples, metrics) for name, samples in taken.items()},
        "best": {name: min(each["best_seconds"] for each in samples) for name, samples in taken.items()},
        "peer": peer,
        "speed_over_peer": ratio(taken[peer], taken["ours"], "seconds"),
        "samples": taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for kind, make in (("moe", moe_sessions), ("dense", dense_sessions)):
        sessions = make(arguments.threads)
        rows = []
        for tokens in arguments.tokens:
            found = measure(kind, sessions, tokens, arguments.rounds)
            head = {"benchmark": "native", "kind": kind, "tokens": tokens, "threads": arguments.threads}
            append(arguments.json, {**head, **environment(("onnxruntime",)), **found})
            for name, each in found["engines"].items():
                best = found["best"][name] * 1e3
                figures = [each["seconds"] and each["seconds"] * 1e3, each["gbyte_per_second"], each["gmac_per_second"]]
                rows.append([f"{kind} {name}", tokens, *figures, best, f"{each['kept']}/{each['taken']}"])
            rows.append(
                [f"  speed over {found['peer']}", tokens, found["speed_over_peer"]["paired"], None, None, None, None]
            )
        show("CPU operators", ["layers", "tokens", "ms", "GB/s", "GMAC/s", "best ms", "quiet"], rows)


if __name__ == "__main__":
    main()
