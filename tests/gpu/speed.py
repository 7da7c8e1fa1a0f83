"""Speed of the expert kernels beside a device copy, cuBLAS and PyTorch, all measured in the same run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moiie_plugins.launch import OLDEST_SM
from moiie_plugins.run import run
from tests.gpu import peers
from tests.gpu.numerics import Place
from tests.plugins.experts import Case, Layer, make_case

Call = Callable[[], Any]
MODELS = {"Phi-3": (3072, 8192), "LLaMA-3": (4096, 14336)}
TOY = {"toy": (64, 64)}
Formats = Mapping[str, tuple[torch.dtype, int, int]]
"""Name -> type of activations, bits of weights, columns a scale (0 with 8 bits: fp8)."""
FORMATS = {"float16": (torch.float16, 16, 32), "bfloat16": (torch.bfloat16, 16, 32), "int8": (torch.float16, 8, 32)}
FORMATS |= {"fp8": (torch.float16, 8, 0), "int4": (torch.float16, 4, 32)}
GOALS = {("decode", "float16"): 0.8, ("decode", "int4"): 0.7, ("prefill", "float16"): 0.65}
TOP_K, EXPERTS, PREFILL_TOKENS = 2, 4, 800


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, and the fraction of what the device does at best in the same run."""

    what: str
    seconds: float
    fraction: float | None = None
    of: str = ""
    goal: float | None = None


def _timed(calls: list[Call], place: Place, rounds: int = 15) -> float:
    """Median seconds of one call. On a GPU the calls are captured into one graph, so that the host is not measured."""
    for call in calls:
        call()
    if place.device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _median(graph.replay, rounds) / len(calls)


def _median(replay: Call, rounds: int) -> float:
    """Median seconds by the device's clock."""
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def copy_bandwidth(place: Place) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    count = 1 << (12 if place.toy else 30)
    source = torch.zeros(count, dtype=torch.int8, device=place.device)
    target = torch.empty_like(source)
    return 2 * count / _timed([lambda: target.copy_(source)], place)


def _bytes_read(case: Case) -> int:
    """Of the weights and scales of one token's experts."""
    banks = [tensor for name, tensor in case.tensors.items() if name.startswith(("gate_up", "down"))]
    return sum(bank.nbytes for bank in banks) * TOP_K // EXPERTS


def _decode_calls(case: Case, place: Place) -> list[Call]:
    """Steps whose experts alternate, so that no weight is still in the cache from the step before."""
    calls = []
    for ids in ([0, 1], [2, 3]) * (1 if place.toy else 4):
        tensors = {**case.tensors, "expert_ids": torch.tensor([ids], dtype=torch.int32, device=place.device)}
        out = torch.empty_like(case.tensors["hidden"])
        calls.append(lambda tensors=tensors, out=out: run(case.op, tensors, out, case.attributes, place.sm))
    return calls


def decode_rows(place: Place, formats: Formats) -> Iterator[Row]:
    """One token through two of four experts, by weight format."""
    bandwidth = copy_bandwidth(place)
    yield Row(f"device copy, {bandwidth / 1e9:.0f} GB/s", 0.0)
    ids = torch.tensor([[0, 1]], device=place.device)
    for (model, (hidden, intermediate)), (name, form) in itertools.product(_models(place), formats.items()):
        case = make_case(Layer(hidden, intermediate, (0, 1, 2, 3), *form), ids)
        seconds = _timed(_decode_calls(case, place), place)
        fraction = _bytes_read(case) / seconds / bandwidth
        yield Row(f"decode {model} {name}", seconds, fraction, "copy", GOALS.get(("decode", name)))
        if name == "float16":
            others = {"loop": peers.loop, "gathered": peers.gathered}
            yield from _beside(f"decode {model}", case, place, seconds, others)


def prefill_rows(place: Place, formats: Formats) -> Iterator[Row]:
    """A picture's and a question's tokens: most are vision tokens, in one run, which only vision experts see."""
    tokens = 24 if place.toy else PREFILL_TOKENS
    random = torch.Generator(place.device).manual_seed(0)
    scores = torch.rand(tokens, EXPERTS, generator=random, device=place.device)
    scores[: tokens * 9 // 10, 3] = -1
    scores[tokens * 9 // 10 :, 0] = -1
    ids = scores.topk(TOP_K).indices
    for (model, (hidden, intermediate)), (name, form) in itertools.product(_models(place), formats.items()):
        case = make_case(Layer(hidden, intermediate, (0, 1, 2, 3), *form), ids)
        banks: peers.Banks = (case.meant[0].to(form[0]), case.meant[1].to(form[0]))
        arguments = (case.tensors["hidden"], case.tensors["expert_ids"], case.tensors["expert_weights"], banks)
        best = _timed([lambda arguments=arguments: peers.products(*arguments)], place)
        out = torch.empty_like(case.tensors["hidden"])
        seconds = _timed([lambda case=case, out=out: run(case.op, case.tensors, out, case.attributes, place.sm)], place)
        yield Row(f"prefill {model} {name}", seconds, best / seconds, "cuBLAS", GOALS.get(("prefill", name)))
        if name in ("float16", "bfloat16"):
            others = {"loop": peers.loop, "grouped": peers.grouped}
            yield from _beside(f"prefill {model} {name}", case, place, seconds, others)


def _models(place: Place) -> list[tuple[str, tuple[int, int]]]:
    return list((TOY if place.toy else MODELS).items())


def _beside(what: str, case: Case, place: Place, ours: float, others: dict[str, peers.Peer]) -> Iterator[Row]:
    """Others on the same layer, and compiled; `fraction` is their time over ours: above 1 we are faster."""
    dtype = case.tensors["hidden"].dtype
    banks = (case.meant[0].to(dtype), case.meant[1].to(dtype))
    arguments = (case.tensors["hidden"], case.tensors["expert_ids"], case.tensors["expert_weights"], banks)
    candidates = dict(others)
    if not place.toy:
        candidates |= {f"{name}, torch.compile": torch.compile(peer) for name, peer in others.items()}
    for name, peer in candidates.items():
        timed = _timed_by_host if name.startswith(peers.WAITS) else _timed
        try:
            seconds = timed([lambda peer=peer: peer(*arguments)], place)
        except Exception as error:  # a peer that this PyTorch has not, or cannot compile, is a remark
            remark = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
            yield Row(f"{what}: PyTorch {name}: {remark}", 0.0)
            continue
        yield Row(f"{what}: PyTorch {name}", seconds, seconds / ours, "ours")


def _timed_by_host(calls: list[Call], place: Place) -> float:
    """Median seconds of calls that are launched one by one."""
    if place.device.type != "cuda":
        return _timed(calls, place)
    for _ in range(3):
        calls[0]()
    torch.cuda.synchronize()
    return _median(calls[0], 15)


def rows(place: Place, formats: Sequence[str] = ()) -> Iterator[Row]:
    """Everything, for all formats of weights or some, of those that the GPU has."""
    wanted = {name: FORMATS[name] for name in formats or FORMATS if place.sm >= OLDEST_SM.get(name, 0)}
    yield from decode_rows(place, wanted)
    yield from prefill_rows(place, wanted)
