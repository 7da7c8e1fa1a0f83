"""Sessions as Polygraphy's runners, and its Comparator as the judge."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polygraphy
import pytest

from moiie_export.parity import comparator
from moiie_export.parity.bisect import _errors
from moiie_export.parity.comparator import (
    SessionRunner,
    judge,
    onnxruntime_runner,
    outputs_of,
    results_of,
    run_both,
    save_results,
)
from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.errors import MissingDependency, MoiieError

INPUTS = {"x": TensorSpec("float32", ("n",))}
FEEDS = {"x": np.zeros(2, np.float32)}
Arrays = dict[str, np.ndarray]


class Doubling:
    """A session that fails when its input is not finite."""

    def __init__(self) -> None:
        self.inputs = INPUTS
        self.outputs = dict.fromkeys(["y", "unwanted"], INPUTS["x"])
        self.unbound = 0

    def run(self, feeds: Arrays, outputs: list[str]) -> Arrays:
        if not np.isfinite(feeds["x"]).all():
            raise MoiieError("not finite")
        return dict.fromkeys(outputs, feeds["x"] * 2)

    def unbind(self) -> None:
        self.unbound += 1


@pytest.mark.parametrize("number", [1.0, np.inf])
def test_what_a_runner_opened_is_closed_whatever_happens(number: float) -> None:
    closed, sessions = [], [Doubling(), Doubling()]

    @contextmanager
    def opened(session: Doubling) -> Iterator[Any]:
        yield session
        closed.append(session)

    runners = [
        SessionRunner(str(place), lambda each=each: opened(each), INPUTS, lambda _: None, ["y"])
        for place, each in enumerate(sessions)
    ]
    feeds = {"x": np.array([number, 1], np.float32)}
    if np.isfinite(number):
        first, second = outputs_of(run_both(*runners, feeds))
        assert {*first} == {*second} == {"y"}
        assert np.array_equal(first["y"], [2, 2])
        assert closed == sessions
    else:
        with pytest.raises(MoiieError, match="not finite"):
            run_both(*runners, feeds)
    assert sessions[0].unbound == 1
    assert all(runner._session is None for runner in runners)


def test_outputs_are_compared_by_their_whole_names() -> None:
    """Polygraphy would compare `hidden.1` with `hidden.10` where the second side has no other."""
    ones, twos = np.ones(3, np.float32), np.full(3, 2, np.float32)
    runs = results_of({"a": {"hidden.1": ones, "hidden.10": twos}, "b": {"hidden.10": twos}})
    assert {*judge(runs, {"hidden.1": 0.1, "hidden.10": 0.1})} == {"hidden.10"}


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = results_of({"a": {"y": np.ones(3)}, "b": {"y": np.zeros(3)}})
    assert not judge(runs, {"y": 0.1})["y"].passed
    save_results(runs, tmp_path / "runs.json")
    assert capfd.readouterr() == ("", "")


def test_a_failure_of_onnx_runtime_is_an_error_that_names_the_graph(tmp_path: Path) -> None:
    runner = onnxruntime_runner("portable decoder", b"no graph", tmp_path)
    with pytest.raises(MoiieError, match="portable decoder: ONNX Runtime failed: .+"):
        run_both(runner, runner, FEEDS)


def test_a_failure_of_polygraphy_is_one_too() -> None:
    runs = results_of({"a": {"y": np.ones(3)}, "b": {"z": np.ones(3)}})
    with pytest.raises(MoiieError, match="a, b: Polygraphy failed: All outputs were skipped"):
        judge(runs, {"y": 0.1})


@pytest.mark.parametrize("there", [True, False])
def test_without_a_polygraphy_that_fits_it_says_what_to_install(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if there:
        monkeypatch.setattr(polygraphy, "__version__", "0.49.9")
    else:
        monkeypatch.setitem(sys.modules, "polygraphy.backend.base", None)
    monkeypatch.delitem(sys.modules, comparator.__name__)
    monkeypatch.setattr(sys.modules["moiie_export.parity"], "comparator", comparator)
    says = r"0\.49\.9 is too old: at least 0\.53" if there else "is not installed"
    with pytest.raises(MissingDependency, match=rf"{says}[^\n]*\n\nhint: pip install 'moiie-export\[polygraphy\]'"):
        importlib.import_module(comparator.__name__)


def plain_error(wanted: np.ndarray, found: np.ndarray) -> float:
    """max|difference| / max(1, max|reference|), over what is a finite number."""
    if wanted.shape != found.shape:
        return np.inf
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    rest = ~(np.isfinite(a) & np.isfinite(b))
    if not np.array_equal(a[rest], b[rest], equal_nan=True):
        return np.inf
    return float(np.abs(a[~rest] - b[~rest]).max(initial=0.0) / np.abs(a[np.isfinite(a)]).max(initial=1.0))


def some_values(seed: int, noise: float) -> tuple[Arrays, Arrays]:
    """Values of all kinds, and what another side gave in their place."""
    random = np.random.default_rng(seed)
    wanted = {
        "single": random.standard_normal((3, 40)).astype(np.float32) * 5,
        "half": random.standard_normal((2, 7)).astype(np.float16),
        "large": random.standard_normal((40, 1000)).astype(np.float32),
        "whole": random.integers(-50, 50, (4, 5)),
        "bytes": random.integers(0, 250, 30).astype(np.uint8),
        "flags": random.random(9) < 0.5,
        "one": np.float32(random.standard_normal()).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "masked": np.array([1.0, -np.inf, np.inf, np.nan, 2.0], np.float32),
    }
    found = {
        name: np.asarray(array + (random.standard_normal(array.shape) * noise).astype(array.dtype))
        if array.dtype.kind == "f"
        else array
        for name, array in wanted.items()
    }
    return wanted, found


def changed(found: Arrays, name: str) -> Arrays:
    array = found[name].copy()
    array.flat[-1] = not array.flat[-1] if array.dtype == bool else array.flat[-1] + 3
    return {**found, name: array}


def check_errors(wanted: Arrays, found: Arrays, bounds: dict[str, float]) -> set[str]:
    """The names that fail; every verdict and every error of one is as the plain formula says."""
    errors = _errors(wanted, found, lambda name: bounds.get(name, 0.01))
    plain = {name: plain_error(wanted[name], found[name]) for name in found}
    assert {name: passed for name, (passed, _) in errors.items()} == {
        name: plain[name] <= bounds.get(name, 0.01) for name in found
    }
    for name, (passed, error) in errors.items():
        assert error == pytest.approx(plain[name], rel=1e-3, abs=1e-7) or passed, name
    largest = max(error for error in plain.values() if error <= 0.01)
    assert max(error for passed, error in errors.values() if passed) == pytest.approx(largest, rel=1e-3, abs=1e-7)
    return {name for name, (passed, _) in errors.items() if not passed}


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3])
def test_errors_are_what_the_formula_says(noise: float) -> None:
    wanted, found = some_values(3, noise)
    assert check_errors(wanted, found, {}) == set()


@pytest.mark.parametrize("name", ["single", "half", "large", "whole", "bytes", "flags", "one", "masked"])
def test_a_wrong_value_of_any_kind_fails_alone(name: str) -> None:
    wanted, found = some_values(4, 1e-4)
    assert check_errors(wanted, changed(found, name), {}) == {name}


def test_shapes_and_numbers_that_are_none_fail() -> None:
    wanted, found = some_values(5, 1e-4)
    found |= {"single": found["single"].T, "half": np.full_like(found["half"], np.nan)}
    found["masked"] = np.where(np.isnan(found["masked"]), np.float32(0), found["masked"])
    assert check_errors(wanted, found, {}) == {"single", "half", "masked"}


def test_what_must_be_equal_must_be_equal() -> None:
    wanted, found = some_values(6, 1e-4)
    assert check_errors(wanted, found, {"whole": 0.0}) == set()
    assert check_errors(wanted, changed(found, "whole"), {"whole": 0.0}) == {"whole"}
