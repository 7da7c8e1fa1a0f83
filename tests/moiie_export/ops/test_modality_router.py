"""ModalityRouter: each modality's gate, spread to global expert ids, -inf elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moiie_export.ops.modality_router import modality_router

Run = Callable[..., list[np.ndarray]]
HIDDEN = 12

# experts, language ids, vision ids: MoIIE with 4, with 8 (one dead), kept apart, disordered, one expert each
GROUPS = [
    (4, [1, 2, 3], [0, 1, 2]),
    (8, [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]),
    (7, [3, 4, 5, 6], [0, 1, 2]),
    (5, [4, 0], [3, 1, 2]),
    (2, [1], [0]),
]


def make(tokens: int, language: list[int], vision: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.standard_normal((tokens, HIDDEN)).astype(np.float32),
        "w_language": rng.standard_normal((len(language), HIDDEN)).astype(np.float32),
        "token_modality": rng.integers(0, 2, tokens).astype(np.int32),
        "w_vision": rng.standard_normal((len(vision), HIDDEN)).astype(np.float32),
    }


def route(inputs: dict[str, np.ndarray], experts: int, language: list[int], vision: list[int]) -> np.ndarray:
    t: dict[str, Any] = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors = (t["hidden"], t["w_language"], t.get("token_modality"), t.get("w_vision"))
    return modality_router(*tensors, language, vision, experts).numpy()


def by_hand(inputs: dict[str, np.ndarray], experts: int, language: list[int], vision: list[int]) -> np.ndarray:
    """Token by token: row g of a gate is the g-th id of its modality's list."""
    logits = np.full((len(inputs["hidden"]), experts), -np.inf, np.float32)
    for t, x in enumerate(inputs["hidden"]):
        is_vision = "token_modality" in inputs and inputs["token_modality"][t] == 1
        gate, ids = (inputs["w_vision"], vision) if is_vision else (inputs["w_language"], language)
        for row, expert in zip(gate, ids, strict=True):
            logits[t, expert] = row @ x
    return logits


def check(run_body: Run, inputs: dict[str, np.ndarray], groups: tuple[int, list[int], list[int]]) -> None:
    experts, language, vision = groups
    attributes = {"language_experts": language, "vision_experts": vision, "num_experts": experts}
    expected = by_hand(inputs, *groups)
    for found in (route(inputs, *groups), run_body("ModalityRouter", attributes, inputs)[0]):
        np.testing.assert_allclose(found, expected, atol=1e-5, strict=True)  # infinities must be at the same places


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("modality", ["mixed", "vision", "language"])
def test_two_gates(run_body: Run, tokens: int, groups: tuple[int, list[int], list[int]], modality: str) -> None:
    inputs = make(tokens, groups[1], groups[2])
    if modality != "mixed":
        inputs["token_modality"][:] = modality == "vision"
    check(run_body, inputs, groups)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("groups", GROUPS)
def test_one_gate_routes_every_token_as_language(
    run_body: Run, tokens: int, groups: tuple[int, list[int], list[int]]
) -> None:
    inputs = make(tokens, groups[1], groups[2])
    check(run_body, {name: inputs[name] for name in ("hidden", "w_language")}, groups)


def test_any_modality_but_one_is_language(run_body: Run) -> None:
    inputs = make(5, [1, 2, 3], [0, 1, 2])
    inputs["token_modality"] = np.array([0, 1, 2, -1, 32000], np.int32)
    check(run_body, inputs, GROUPS[0])


def test_a_gate_full_of_nan_does_not_reach_the_other_modality(run_body: Run) -> None:
    """Both gates are computed for all tokens; the choice between them must not be a multiplication by 0."""
    inputs = make(6, [1, 2, 3], [0, 1, 2])
    inputs["token_modality"] = np.array([0, 1] * 3, np.int32)
    inputs["w_vision"][:] = np.nan
    attributes = {"language_experts": [1, 2, 3], "vision_experts": [0, 1, 2], "num_experts": 4}
    for found in (route(inputs, *GROUPS[0]), run_body("ModalityRouter", attributes, inputs)[0]):
        assert np.isfinite(found[::2, 1:]).all()
        assert np.isnan(found[1::2, :3]).all()


def test_the_logits_are_float32_where_the_gates_are_float16() -> None:
    half = [torch.ones(2, HIDDEN, dtype=torch.float16), torch.ones(2, HIDDEN, dtype=torch.float16)]
    logits = modality_router(*half, None, None, [0, 1], [0, 1], 3)
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[12.0, 12.0, -float("inf")]] * 2


@pytest.mark.parametrize("gates", [1, 2])
def test_the_fake_agrees_with_the_op(gates: int) -> None:
    t = {name: torch.from_numpy(value) for name, value in make(5, [1, 2, 3], [0, 1, 2]).items()}
    second = (t["token_modality"], t["w_vision"]) if gates == 2 else (None, None)
    torch.library.opcheck(modality_router, (t["hidden"], t["w_language"], *second, [1, 2, 3], [0, 1, 2], 4))
