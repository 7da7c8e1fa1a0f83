"""Polygraphy's Comparator judges both sides as we do."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from moiie_export.parity.comparator import SessionRunner
from moiie_export.parity.polygraphy import compare, compare_with_polygraphy
from moiie_export.recipe_parity import Bounds
from moiie_runtime.backends.session import TensorSpec
from tests.exports import SMALLEST, exported


class Made:
    """A session that gives what it was made with."""

    def __init__(self, **outputs: np.ndarray) -> None:
        self._made = outputs
        self.inputs = {"x": TensorSpec("float32", ("n",))}
        self.outputs = {name: TensorSpec(each.dtype.name, each.shape) for name, each in outputs.items()}

    def run(self, feeds: Any, outputs: Any = None) -> dict[str, np.ndarray]:
        return {name: self._made[name].copy() for name in outputs}

    def unbind(self) -> None:
        pass

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        self.inputs = {}


def judged(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray], **bounds: float) -> dict[str, Any]:
    first, second = (
        SessionRunner(name, lambda each=each: Made(**each), {"x": TensorSpec("float32", ("n",))}, lambda feeds: None)
        for name, each in (("a", wanted), ("b", found))
    )
    first.component = "graph"
    checks = compare(first, second, {"x": np.zeros(2, np.float32)}, Bounds(**bounds))
    return OrderedDict((check.stage, check) for check in checks)


def test_an_error_is_a_share_of_the_largest_number() -> None:
    wanted = np.array([50.0, -100.0, 1.0], np.float32)
    found = wanted + np.array([0, 0.5, 0], np.float32)
    for bound, passed in ((0.0051, True), (0.0049, False)):
        check = judged({"logits": wanted}, {"logits": found}, logits_error=bound)["logits"]
        assert check.passed is passed
        assert check.value == pytest.approx(0.005, rel=1e-3)
        assert check.bound == bound


def test_every_output_has_the_bound_of_its_kind() -> None:
    arrays = {"logits": "logits_error", "present.0.key": "kv_error", "router_logits.1": "hidden_error"}
    arrays |= {"image_features": "vision_error"}
    wanted = {name: np.ones(3, np.float32) for name in arrays if name != "present.0.key"}
    for name, bound in arrays.items():
        if name in wanted:
            checks = judged(wanted, {**wanted, name: wanted[name] * 1.5}, **{bound: 0.9})
            assert checks[name].passed, name
            assert not judged(wanted, {**wanted, name: wanted[name] * 1.5})[name].passed, name


def test_routes_are_equal_or_not_and_infinities_are_where_they_were() -> None:
    ids = np.array([[0, 1], [1, 2]], np.int32)
    logits = np.array([[0.5, -np.inf], [1, 2]], np.float32)
    both = {"expert_ids.0": ids, "router_logits.0": logits}
    assert all(check.passed for check in judged(both, both).values())
    assert not judged(both, {**both, "expert_ids.0": ids + 1})["expert_ids.0"].passed
    assert not judged(both, {**both, "router_logits.0": np.where(np.isinf(logits), 0, logits)})[
        "router_logits.0"
    ].passed


def test_numbers_that_are_none_never_pass() -> None:
    wanted = {"logits": np.ones(3, np.float32)}
    assert not judged(wanted, {"logits": np.full(3, np.nan, np.float32)})["logits"].passed


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    source = exported(SMALLEST)
    copy = Path(shutil.copytree(source.bundle, tmp_path_factory.mktemp("polygraphy") / "bundle"))
    return SimpleNamespace(bundle=copy, checkpoint=source.checkpoint)


def test_a_bundle_is_its_checkpoint(pair: SimpleNamespace) -> None:
    report = compare_with_polygraphy(pair.bundle, pair.checkpoint, None, None, lambda *_: None)
    assert report, report.summary()
    stages = {(check.where, check.stage) for check in report.checks}
    assert {
        ("vision_encoder", "image_features"),
        ("decoder_prefill", "logits"),
        ("decoder_decode", "present.0.key"),
    } <= stages
    assert all(check.value is not None and 0 <= check.value < 1e-4 for check in report.checks)


def test_another_model_is_not(pair: SimpleNamespace, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair.bundle, tmp_path / "bundle"))
    path = other / "onnx" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    next(each for each in norm.attribute if each.name == "epsilon").f = 10.0
    onnx.save(model, path)
    report = compare_with_polygraphy(other, pair.checkpoint, None, None, lambda *_: None)
    failed = {check.where for check in report.checks if not check.passed}
    assert failed == {"decoder_decode"}
