"""Parity of bundles with quantised weights: sound ones pass, and every way of storing something else is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moiie_export.parity import Report, check_parity
from moiie_export.parity.stored import StoredWeights
from moiie_export.parity.weights import SCALE_FACTOR, check_weights
from moiie_export.report.page import render
from moiie_export.source import ModelSource
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError, Unsound
from moiie_runtime.tensors import read_header
from tests.exports import Exported, exported
from tests.moiie_export.parity.conftest import CONTEXT, change_graph, edit_manifest, sign
from tests.moiie_export.parity.conftest import SETTINGS as PLAIN

WEIGHTS = "onnx/weights.safetensors"
SETTINGS = {"layers": 2, "hidden": 64, "intermediate": 96, "vocab": 288, "dtype": "F32"}
RULES = (
    {"match": ("decoder.layers.1.mlp.experts.0.*",), "format": "float16"},
    {"match": ("experts", "dense"), "format": "int4", "group_size": 32},
    {"match": ("attention", "lm_head"), "format": "int8", "group_size": 64},
)
"""Two formats, two groups, and an expert of its own form, so that its stack is stored apart."""
LOOSE = {"logits_error": 1.0, "routing_agreement": 0.5, "top1_agreement": 0.2, "weight_error": 0.15}
"""Random weights have no margins: what a trained model keeps, these lose."""


@pytest.fixture
def base() -> Exported:
    return exported(SETTINGS, max_context=CONTEXT, rules=RULES)


@pytest.fixture
def changed(base: Exported, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may change, with bounds that random weights keep."""
    bundle = Path(shutil.copytree(base.bundle, tmp_path / "bundle"))
    bound(bundle, int4=LOOSE)
    return bundle


def bound(bundle: Path, **kinds: dict[str, float]) -> None:
    """Write bounds into a bundle's manifest."""
    edit_manifest(
        bundle, lambda manifest: [manifest["recipe"]["parity"]["bounds"][kind].update(to) for kind, to in kinds.items()]
    )


def patch(bundle: Path, tensor: str, change: Callable[[np.ndarray], Any]) -> None:
    """Change a stored tensor in place."""
    path = bundle / WEIGHTS
    info = read_header(path)[tensor]
    kinds = {"I8": np.int8, "F16": np.float16, "F32": np.float32}
    stored = np.memmap(path, kinds[info.dtype], "r+", info.offset, info.shape)
    change(stored)
    stored.flush()
    sign(bundle, WEIGHTS)


def first(report: Report) -> tuple[str, int | None, str]:
    """Where a report fails first."""
    failure = report.first_failure
    assert failure is not None, report.summary()
    return failure.stage, failure.layer, failure.note


def test_the_bundle_is_its_checkpoint(base: Exported, changed: Path) -> None:
    report = check_parity(changed, base.checkpoint)
    assert report, report.summary()
    assert report.dtype == "int4, int8, float32"
    graphs = [check for check in report.checks if check.stage == "hidden states"]
    assert max(check.value or 0 for check in graphs) < 1e-4, "the graphs compute what the stored weights say"
    quantised = {check.note.split(",")[0]: check for check in report.checks if check.stage == "quantised weights"}
    assert quantised["decoder.lm_head.weight"].bound == base.recipe.parity.bounds.int8.weight_error
    assert 0.05 < (quantised["decoder.layers.1.mlp.experts.2.down_proj"].value or 0) < 0.15
    assert quantised["decoder.layers.1.mlp.experts.2.down_proj"].layer == 1
    assert 0.002 < (quantised["decoder.lm_head.weight"].value or 0) < 0.01
    stages = {check.stage for check in report.checks}
    assert stages >= {"quantised logits", "quantised routing", "quantised best token", "stored scales"}
    assert "quantised routing" in report.summary()
    document = report.to_dict()
    assert {each["case"] for each in document["quantisation"]["cases"]} == {"picture", "text", "two pictures"}
    routing = document["quantisation"]["routing"]
    assert routing["vision"]["1"]["tokens"] == 3 * 3
    assert 0 < routing["language"]["1"]["same"] <= routing["language"]["1"]["tokens"]
    page = render(document)
    assert "int4 and int8 weights stand for" in page
    assert "same experts by layer" in page


def test_bounds_of_quantisation_are_enforced(base: Exported, changed: Path) -> None:
    bound(changed, int4={"routing_agreement": 1.0, "top1_agreement": 1.0, "logits_error": 1e-6})
    report = check_parity(changed, base.checkpoint)
    assert {check.stage for check in report.failures} >= {"quantised logits", "quantised best token"}
    assert {check.stage for check in report.failures} <= {
        "quantised logits",
        "quantised best token",
        "quantised routing",
    }
    bound(changed, int4={"weight_error": "small"})  # type: ignore[dict-item]
    with pytest.raises(MoiieError, match=r"bounds\.int4: expected a number for each of"):
        check_parity(changed, base.checkpoint)


def test_a_wrong_scale_is_named(base: Exported, changed: Path) -> None:
    """One of thousands, which no average shows."""

    def change(scales: np.ndarray) -> None:
        scales[5, 1] *= np.float16(2)

    patch(changed, "decoder.layers.1.mlp.experts.1.gate_up_proj.scales", change)
    stage, layer, note = first(check_parity(changed, base.checkpoint))
    assert (stage, layer) == ("stored scales", 1)
    assert note.startswith("decoder.layers.1.mlp.experts.1.gate_up_proj: the scale of row 5, group 1 is ")
    assert float(note.split(" is ")[1].split()[0]) > SCALE_FACTOR


def test_swapped_experts_are_named(base: Exported, changed: Path) -> None:
    names = [f"decoder.layers.1.mlp.experts.{expert}.down_proj" for expert in (1, 2)]
    held: dict[str, np.ndarray] = {}
    for name in names:
        for suffix in ("", ".scales"):
            patch(changed, name + suffix, lambda stored, key=name + suffix: held.update({key: np.array(stored)}))
    for name, other in zip(names, reversed(names), strict=True):
        for suffix in ("", ".scales"):
            patch(changed, name + suffix, lambda stored, key=other + suffix: stored.__setitem__(..., held[key]))
    report = check_parity(changed, base.checkpoint)
    failed = {check.note.split(",")[0]: check for check in report.failures if check.stage == "quantised weights"}
    assert failed.keys() == set(names)
    assert all(check.layer == 1 and (check.value or 0) > 1 for check in failed.values())
    assert "layer 1" in report.verdict()


def test_weights_that_are_not_quantised_are_equal_bit_by_bit(base: Exported, changed: Path) -> None:
    name = "decoder.layers.1.mlp.experts.0.down_proj"

    def change(stored: np.ndarray) -> None:
        assert stored.dtype == np.float16
        stored[3, 4] = np.nextafter(stored[3, 4], np.float16(9))

    patch(changed, name, change)
    report = check_parity(changed, base.checkpoint)
    wrong = next(check for check in report.failures if check.stage == "stored weights")
    assert (wrong.layer, wrong.note) == (1, f"{name}: 1 of {64 * 96} elements differ, the first in row 3")


def test_a_node_with_another_group_is_named(base: Exported, changed: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(each for each in model.graph.node if each.op_type == "QuantizedLinear")
        next(each for each in node.attribute if each.name == "group_size").i = 32

    change_graph(changed, "decoder_decode", change)
    stage, layer, note = first(check_parity(changed, base.checkpoint))
    assert (stage, layer) == ("attributes", 0)
    assert note == (
        "decoder.layers.0.self_attn.qkv_proj.weight is read as 8 bits in groups of 32, stored 8 bits in groups of 64"
    )


def test_a_manifest_that_cannot_be_is_refused(base: Exported, changed: Path) -> None:
    def edit(**entry: Any) -> None:
        head = "decoder.lm_head.weight"
        edit_manifest(changed, lambda manifest: manifest["quantization"]["weights"][head].update(entry))

    edit(group_size=48)
    with pytest.raises(Unsound, match=r"quantization\.weights\.decoder\.lm_head\.weight: group_size 48 for int8"):
        check_parity(changed, base.checkpoint)
    edit(group_size=64, format="int4")
    with pytest.raises(Unsound, match=r"tensor decoder\.lm_head\.weight is"):
        check_parity(changed, base.checkpoint)


def test_a_float_bundle_says_nothing_of_quantisation() -> None:
    plain = exported(PLAIN, max_context=CONTEXT)
    manifest = json.loads((plain.bundle / "bundle.json").read_text(encoding="utf-8"))
    assert "quantization" not in manifest
    report = check_parity(plain.bundle, plain.checkpoint)
    assert report, report.summary()
    assert not any("quantised" in check.stage or check.stage == "stored scales" for check in report.checks)
    assert "quantisation" not in report.to_dict()


@pytest.mark.parametrize(("storage", "other"), [("float16", "float32"), ("float32", "float16")])
def test_rules_that_only_choose_between_floats(storage: Any, other: str) -> None:
    rules = [{"match": ("decoder.layers.0.*",), "format": other}]
    made = exported(SETTINGS, storage, max_context=CONTEXT, rules=rules)
    header = read_header(made.bundle / WEIGHTS)
    assert {info.dtype for name, info in header.items() if name.startswith("decoder.layers.")} == {"F32", "F16"}
    with ModelSource.open(made.checkpoint) as source, StoredWeights(Bundle.open(made.bundle), source) as stored:
        assert stored.mixed
        assert not stored.schemes
        assert all(check.passed for check in check_weights(stored, source, storage, made.recipe.parity.bounds))
