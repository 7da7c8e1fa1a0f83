"""Round-to-nearest and the forms with a scale per row: how far off, what is refused, what blocks of rows change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.quantize import methods
from moiie_export.quantize.methods import methods_of, quantizer, register
from moiie_export.quantize.packing import Quantized, restore
from moiie_export.quantize.rtn import rtn
from moiie_export.quantize.scheme import FORMATS, GROUP_SIZES, Scheme
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.quantize.w8a8 import input_scale
from moiie_runtime.errors import MoiieError

GROUPED = [Scheme(kind, group) for kind in ("int4", "int8") for group in GROUP_SIZES]
PER_ROW = [Scheme("fp8"), Scheme("w8a8")]


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def seen(inputs: np.ndarray) -> InputStatistics:
    return InputStatistics(len(inputs), np.abs(inputs).mean(axis=0), inputs.T @ inputs / len(inputs), inputs[:512])


def quantized(weight: np.ndarray, scheme: Scheme) -> Quantized:
    return quantizer("rtn", scheme.format)(weight, scheme, seen(normal(8, weight.shape[1])), name="w")


def simplest(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """max|w| over the highest number, rounded: what everyone does."""
    groups = weight.reshape(-1, scheme.group_size or weight.shape[1])
    top = -scheme.lowest - 1
    scale = np.abs(groups).max(axis=1, keepdims=True) / top
    return (np.clip(np.rint(groups / scale), -top, top) * scale).reshape(weight.shape)


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
def test_less_squared_error_than_the_simplest_rounding(scheme: Scheme) -> None:
    weight = normal(64, 512)
    error = np.square(restore(rtn(weight, scheme), scheme) - weight).mean()
    assert error < (0.87 if scheme.bits == 4 else 1.01) * np.square(simplest(weight, scheme) - weight).mean()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(GROUPED), st.integers(1, 5), st.integers(1, 3), st.integers(-40, 40), st.integers(0, 10**6))
def test_no_number_is_far_off_at_any_magnitude(
    scheme: Scheme, rows: int, groups: int, exponent: int, seed: int
) -> None:
    """Within a step and a half of a group's own scale, also where float16 has few digits left for the scale."""
    weight = normal(rows, groups * scheme.group_size, seed) * np.float32(10.0 ** (exponent / 10))
    made = rtn(weight, scheme)
    assert made.values.min() >= scheme.lowest
    assert made.values.max() <= -scheme.lowest - 1
    assert (made.scales > 0).all()
    steps = np.repeat(made.scales.astype(np.float32), scheme.group_size, axis=1)
    assert (np.abs(restore(made, scheme) - weight) <= 1.5 * steps).all()


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
def test_a_group_whose_scale_is_below_float16_is_not_lost(scheme: Scheme) -> None:
    tiny = np.finfo(np.float16).smallest_subnormal
    weight = np.full((1, scheme.group_size), 3 * tiny, np.float32)
    made = rtn(weight, scheme)
    np.testing.assert_allclose(restore(made, scheme), weight, rtol=0, atol=0.5 * tiny)


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
def test_numbers_on_the_grid_come_back_exactly(scheme: Scheme) -> None:
    """What was quantised once is not changed by doing it again with the whole range in use."""
    rng = np.random.default_rng(3)
    numbers = rng.integers(scheme.lowest, -scheme.lowest, (4, 2 * scheme.group_size)).astype(np.float32)
    numbers.reshape(-1, scheme.group_size)[:, :2] = scheme.lowest, -scheme.lowest - 1
    weight = numbers * np.float32(0.25)
    np.testing.assert_array_equal(restore(rtn(weight, scheme), scheme), weight)


@pytest.mark.parametrize("scheme", [*GROUPED, *PER_ROW], ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    weight = normal(3, 256)
    weight[1] = 0
    weight[2, : scheme.group_size or 256] = 0
    made = quantized(weight, scheme)
    per_row = made.scales.reshape(3, -1)
    assert (per_row[1] == 1).all()
    assert per_row[2, 0] == 1
    assert not made.values[1].any()
    assert not restore(made, scheme)[1].any()


@pytest.mark.parametrize("scheme", [*GROUPED, *PER_ROW], ids=str)
def test_blocks_of_rows_give_the_same_bytes_as_the_whole(scheme: Scheme) -> None:
    weight = normal(11, 256, seed=5)
    whole = quantized(weight, scheme)
    for size in (1, 4, 10):
        blocks = [quantized(weight[start : start + size], scheme) for start in range(0, 11, size)]
        np.testing.assert_array_equal(np.concatenate([block.values for block in blocks]), whole.values, strict=True)
        np.testing.assert_array_equal(np.concatenate([block.scales for block in blocks]), whole.scales, strict=True)


@pytest.mark.parametrize("scheme", [*GROUPED, *PER_ROW], ids=str)
def test_the_weight_is_not_changed_and_may_be_read_only(scheme: Scheme) -> None:
    weight = normal(4, 256)
    weight.setflags(write=False)
    before = weight.copy()
    quantized(weight, scheme)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinite values"), (-np.inf, "infinite values")])
def test_a_weight_that_is_not_finite_is_named(format_: str, bad: float, kind: str) -> None:
    weight = normal(5, 256)
    weight[3, 77] = bad
    for method in methods_of(format_):
        scheme = Scheme(format_, 64 if format_ in ("int4", "int8") else 0)
        with pytest.raises(MoiieError) as caught:
            quantizer(method, format_)(weight, scheme, seen(normal(8, 256)), name="decoder.lm_head.weight")
        assert caught.value.message == f"decoder.lm_head.weight: the weight holds {kind}"


def test_a_weight_too_large_for_a_float16_scale_is_named() -> None:
    weight = normal(2, 64)
    weight[1, 3] = 9e5
    with pytest.raises(MoiieError, match="w: 900000 is too large for a float16 scale"):
        rtn(weight, Scheme("int4", 32), name="w")
    rtn(weight, Scheme("int8", 32), name="w")


@pytest.mark.parametrize("format_", ["int4", "int8"])
def test_rows_that_do_not_divide_are_refused_by_every_method(format_: str) -> None:
    for method in methods_of(format_):
        with pytest.raises(MoiieError, match="w: rows of 96 do not divide into groups of 64"):
            quantizer(method, format_)(normal(2, 96), Scheme(format_, 64), None, name="w")


def test_fp8_uses_the_whole_range_of_each_row() -> None:
    weight = normal(6, 100) * np.float32([[1e-6], [1e-3], [1], [1e3], [1e6], [1e30]])
    made = quantized(weight, Scheme("fp8"))
    assert (np.abs(restore(made, Scheme("fp8"))).max(axis=1) / made.scales).tolist() == [448.0] * 6
    relative = np.abs(restore(made, Scheme("fp8")) - weight) / np.abs(weight)
    normal_numbers = np.abs(weight) / made.scales[:, None] >= 2.0**-6
    assert relative[normal_numbers].max() <= 2.0**-4 + 1e-6  # three bits of mantissa, half a step


def test_w8a8_cuts_an_outlier_of_the_inputs() -> None:
    """One number at 300 among 512 x 64 of size 1: a step that holds it would round the others to 0 or 2."""
    inputs = normal(512, 64)
    plain = input_scale(seen(inputs), "w")
    assert np.abs(inputs).max() / 127 * 0.6 <= plain <= np.abs(inputs).max() / 127
    inputs[5, 5] = 300
    assert 127 * input_scale(seen(inputs), "w") < 299
    assert input_scale(seen(inputs * 0), "w") == 1


@pytest.mark.parametrize(
    "stats", [None, InputStatistics(0, np.zeros(64, np.float32), None, np.zeros((0, 64), np.float32))]
)
def test_w8a8_needs_inputs(stats: InputStatistics | None) -> None:
    with pytest.raises(MoiieError, match="proj.weight: w8a8 rounds a layer's inputs too, and calibration saw none"):
        quantizer("rtn", "w8a8")(normal(2, 64), Scheme("w8a8"), stats, name="proj.weight")


def test_methods_by_format() -> None:
    assert {format_: methods_of(format_) for format_ in FORMATS} == {
        "int4": ("rtn", "awq", "gptq"),
        "int8": ("rtn", "awq", "gptq"),
        "fp8": ("rtn",),
        "w8a8": ("rtn",),
    }
    with pytest.raises(MoiieError, match="method 'gptq' for fp8: expected one of rtn"):
        quantizer("gptq", "fp8")


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_ADDED", {})
    register("mine", ("int8",), rtn)
    assert quantizer("mine", "int8") is rtn
    assert methods_of("int8")[-1] == "mine"
    with pytest.raises(MoiieError, match="method 'mine' for int8 exists already"):
        register("mine", ("int4", "int8"), rtn)
    assert "mine" not in methods_of("int4")
    with pytest.raises(MoiieError, match="no format 'int5'"):
        register("other", ("int5",), rtn)
