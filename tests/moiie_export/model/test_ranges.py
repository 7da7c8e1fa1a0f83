"""How large activations get: made-up overflows are found where they are, and become float32 islands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from moiie_export.model.ranges import FLOAT16_MAX, INPUT, OUTPUT, RESIDUAL, SCORES, Range, Ranges, measure_ranges
from moiie_export.parity.cases import made_up
from moiie_export.quantize.islands import find_islands, probe, probe_inputs, with_islands
from moiie_export.quantize.rules import resolve
from moiie_export.recipe_parity import ParityCase
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_runtime.errors import Unsound
from tests.moiie_export.conftest import rewrite
from tests.synthetic import write_checkpoint

Tensors = Mapping[str, np.ndarray]
VISION_EXPERT = "decoder.layers.1.mlp.experts.0."


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ModelSource]]:
    """opened(change) -> a synthetic checkpoint with changed tensors."""
    sources: list[ModelSource] = []

    def open_(change: Callable[[dict[str, np.ndarray]], Tensors] = lambda tensors: tensors) -> ModelSource:
        checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=3, vocab=288, dtype="F32")
        rewrite(checkpoint, change)
        sources.append(ModelSource.open(checkpoint))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


def grown(pattern: str, factor: float) -> Callable[[dict[str, np.ndarray]], Tensors]:
    """Every tensor with this in its name, times a factor."""

    def change(tensors: dict[str, np.ndarray]) -> Tensors:
        hit = [name for name in tensors if pattern in name]
        assert hit
        return tensors | {name: tensors[name] * np.float32(factor) for name in hit}

    return change


def by_name(ranges: Ranges) -> dict[tuple[str, str], Range]:
    return {(each.name, each.kind): each for each in ranges.found}


def test_what_fits_is_measured_by_modality_and_expert(opened: Callable[..., ModelSource]) -> None:
    source = opened()
    found = measure_ranges(source, made_up())
    assert not found.exceeding
    assert not found.islands
    ranges = by_name(found)
    assert ranges[f"{VISION_EXPERT}down_proj", INPUT].peaks.keys() == {"vision"}
    assert ranges["decoder.layers.1.mlp.experts.3.down_proj", OUTPUT].peaks.keys() == {"language"}
    assert ranges["decoder.layers.0", RESIDUAL].peaks.keys() == {"language", "vision"}
    assert ranges["vision_encoder.projector.2.weight", OUTPUT].peaks.keys() == {"vision"}
    assert ranges["decoder.lm_head.weight", OUTPUT].peaks.keys() == {"language"}
    assert all(each.peak > 0 for each in found.found)
    down = source.tensor(
        next(w for w in source.weight_map.weights if w.name == "decoder.layers.0.mlp.down_proj.weight")
    )
    bound = ranges["decoder.layers.0.mlp.down_proj.weight", INPUT].peak * np.abs(down).sum(axis=1).max()
    assert ranges["decoder.layers.0.mlp.down_proj.weight", OUTPUT].peak <= bound
    alone = by_name(measure_ranges(source, [each for each in made_up() if not each.images]))
    assert all(each.peaks.keys() <= {"language"} for each in alone.values())
    assert (f"{VISION_EXPERT}down_proj", INPUT) not in alone or not alone[f"{VISION_EXPERT}down_proj", INPUT].peaks


def test_an_overflow_in_one_expert_is_found_there(opened: Callable[..., ModelSource]) -> None:
    """The vision expert's inner product explodes and its output is made small again: nothing else is too large."""

    def change(tensors: dict[str, np.ndarray]) -> Tensors:
        larger = grown("layers.1.mlp.experts.0.gate_up_proj", 3e3)(tensors)
        return grown("layers.1.mlp.experts.0.down_proj", 1e-7)(dict(larger))

    found = measure_ranges(opened(change), made_up())
    exceeding = {(each.name, each.kind): each for each in found.exceeding}
    assert (f"{VISION_EXPERT}down_proj", INPUT) in exceeding
    assert exceeding[f"{VISION_EXPERT}down_proj", INPUT].status == "overflows"
    assert {name for name, _ in exceeding} <= {f"{VISION_EXPERT}down_proj", f"{VISION_EXPERT}gate_up_proj"}
    assert f"{VISION_EXPERT}down_proj" in found.islands


def test_a_residual_that_overflows_makes_islands_of_what_writes_it(opened: Callable[..., ModelSource]) -> None:
    found = measure_ranges(opened(grown("layers.2.mlp.down_proj", 1e6)), made_up()[:1])
    statuses = {(each.name, each.kind): each.status for each in found.found}
    assert statuses["decoder.layers.2", RESIDUAL] == "overflows"
    assert statuses["decoder.layers.1", RESIDUAL] == "fits"
    assert set(found.islands) == {f"decoder.layers.2.{name}.weight" for name in ("mlp.down_proj", "self_attn.o_proj")}
    document = found.to_dict()
    assert document["islands"] == found.islands
    assert document["float16_max"] == FLOAT16_MAX
    named = next(
        each for each in document["tensors"] if each["name"] == "decoder.layers.2" and each["kind"] == RESIDUAL
    )
    assert named["layer"] == 2
    assert named["peaks"]["vision"] > FLOAT16_MAX


def test_statuses() -> None:
    peaks = {FLOAT16_MAX / 2: "fits", FLOAT16_MAX / 2 + 1: "near", FLOAT16_MAX: "near", FLOAT16_MAX + 1: "overflows"}
    for peak, status in peaks.items():
        assert Range("a", INPUT, 0, {"vision": 1.0, "language": peak}).status == status
    assert Range("a", INPUT, 0, {"vision": float("inf")}).to_dict()["peaks"] == {"vision": None}
    scores = Ranges([Range("a", OUTPUT, 0, {"vision": 1.0}), Range("a", SCORES, 0, {"vision": 1e9})], [])
    assert scores.exceeding
    assert scores.islands == [], "an upper bound proves nothing"


def test_islands_are_found_named_and_kept_in_float32(opened: Callable[..., ModelSource]) -> None:
    source = opened(grown("layers.2.mlp.down_proj", 1e6))
    measured = probe(source, [ParityCase("Why?")], lambda *_: None)
    assert find_islands(["auto"], source, measured) == [
        f"decoder.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    named = ["decoder.layers.*.self_attn.o_proj.weight", "decoder.layers.1.mlp.experts.2.down_proj"]
    chosen = find_islands(named, source)
    assert len(chosen) == 4
    assert find_islands(["none"], source) == find_islands([], source) == []
    section = with_islands(QuantizationSection((QuantRule(("*gate_up_proj*", "attention"), "int8"),)), chosen)
    forms = resolve(section, "float16", source.weight_map, source.config).forms
    assert {forms[name].format for name in chosen} == {"float32"}
    assert forms["decoder.layers.1.mlp.experts.1.down_proj"].format == "float16"
    assert forms["decoder.layers.1.mlp.experts.gate_up_proj"].format == "int8"
    assert with_islands(section, ()) is section
    for wanted, message in (
        (["none", "auto"], "`none` stands beside others"),
        (["decoder.layers.9.*"], r"'decoder.layers.9.\*': no weight of a linear layer"),
        (["decoder.norm.weight"], "no weight of a linear layer"),
    ):
        with pytest.raises(Unsound, match=message):
            find_islands(wanted, source)
    with pytest.raises(Unsound, match="calibration.cases, and there are none"):
        probe_inputs(source, ())
