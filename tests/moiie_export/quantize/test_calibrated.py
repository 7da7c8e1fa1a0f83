"""AWQ and GPTQ: never worse than round-to-nearest on the inputs seen, much better on inputs with structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_export.quantize.awq import Consumer, divided, multiplied, search_scale
from moiie_export.quantize.gptq import gptq
from moiie_export.quantize.methods import quantizer
from moiie_export.quantize.packing import Quantized, restore
from moiie_export.quantize.rtn import rtn
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.statistics import InputStatistics
from moiie_runtime.errors import MoiieError

SCHEMES = [Scheme("int4", 32), Scheme("int4", 64), Scheme("int8", 32)]
METHODS = ["awq", "gptq"]


def seen(inputs: np.ndarray, gram: bool = True) -> InputStatistics:
    moment = inputs.T @ inputs / np.float32(len(inputs)) if gram else None
    return InputStatistics(len(inputs), np.abs(inputs).mean(axis=0), moment, inputs[:512])


def structured(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Inputs as layers see them: few directions, channels of very different size, two of them enormous."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(7).standard_normal((max(1, columns // 8), columns))
    sizes = np.exp(np.random.default_rng(8).standard_normal(columns) * 0.8)
    sizes[[3, columns // 2]] *= 12
    mixed = rng.standard_normal((rows, len(basis))) @ basis + 0.5 * rng.standard_normal((rows, columns))
    return (mixed * sizes).astype(np.float32)


def weight(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) / 30).astype(np.float32)


def loss(made: Quantized, scheme: Scheme, true: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Per row, mean squared change of the outputs, from the inputs themselves in float64."""
    change = restore(made, scheme).astype(np.float64) - true
    error: np.ndarray = np.square(inputs.astype(np.float64) @ change.T).mean(axis=0)
    return error


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_on_structured_inputs_the_order_is_rtn_awq_gptq(scheme: Scheme) -> None:
    """On inputs that calibration did not see."""
    inputs, fresh, true = structured(600, 256), structured(300, 256, seed=9), weight(96, 256)
    found = {}
    for method in ("rtn", *METHODS):
        made = quantizer(method, scheme.format)(true, scheme, seen(inputs), name="w")
        assert (made.method, made.note) == (method, "")
        assert made.scales.dtype == np.float16
        assert (made.scales > 0).all()
        assert made.values.min() >= scheme.lowest
        assert made.values.max() < -scheme.lowest
        found[method] = loss(made, scheme, true, fresh).sum()
    assert found["awq"] < 0.8 * found["rtn"]
    assert found["gptq"] < 0.4 * found["awq"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_row_is_worse_than_by_rounding_to_nearest(data: st.DataObject) -> None:
    """Whatever the inputs: one token, the same token many times, silent channels, a weight of zeros, no gram."""
    scheme, method = data.draw(st.sampled_from(SCHEMES)), data.draw(st.sampled_from(METHODS))
    seed, tokens = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 80))
    rng = np.random.default_rng(seed)
    inputs = structured(tokens, 128, seed) * np.float32(10.0 ** data.draw(st.integers(-6, 6)))
    if data.draw(st.booleans()):
        inputs[:, rng.integers(0, 128, 40)] = 0
    if data.draw(st.booleans()):
        inputs[:] = inputs[0]
    true = weight(data.draw(st.integers(1, 6)), 128, seed) * np.float32(10.0 ** data.draw(st.integers(-4, 3)))
    if data.draw(st.booleans()):
        true[0] = 0
    stats = seen(inputs, data.draw(st.booleans()))
    made = quantizer(method, scheme.format)(true, scheme, stats, name="w")
    nearest = rtn(true, scheme)
    mine = stats.output_error(restore(made, scheme) - true)
    theirs = stats.output_error(restore(nearest, scheme) - true)
    assert (mine <= theirs).all()
    exact, usual = loss(made, scheme, true, inputs), loss(nearest, scheme, true, inputs)
    noise = 1e-5 * np.square(inputs.astype(np.float64) @ np.abs(true.T).astype(np.float64)).mean(axis=0)
    assert (exact <= usual + noise).all()
    assert np.isfinite(restore(made, scheme)).all()


@pytest.mark.parametrize("method", METHODS)
def test_without_inputs_it_rounds_to_nearest_and_says_so(method: str) -> None:
    scheme, true = SCHEMES[0], weight(4, 64)
    nobody = InputStatistics(0, np.zeros(64, np.float32), None, np.zeros((0, 64), np.float32))
    for stats in (None, nobody):
        made = quantizer(method, "int4")(true, scheme, stats, name="w")
        assert (made.method, made.note) == ("rtn", "calibration saw no inputs of this layer")
        np.testing.assert_array_equal(made.values, rtn(true, scheme).values)


@pytest.mark.parametrize("method", METHODS)
def test_where_it_helps_no_row_it_says_so(method: str) -> None:
    """Numbers that the grid holds exactly cannot be bettered."""
    scheme = Scheme("int4", 32)
    numbers = np.tile(np.arange(-8, 8, dtype=np.float32), (3, 4))
    made = quantizer(method, "int4")(numbers / 4, scheme, seen(structured(50, 64)), name="w")
    assert (made.method, made.note) == ("rtn", f"{method} is not better than rtn on the calibration inputs")
    np.testing.assert_array_equal(restore(made, scheme), numbers / 4)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_another_layer_are_refused(method: str) -> None:
    with pytest.raises(MoiieError, match="w: rows of 64, but the statistics are of inputs of 128"):
        quantizer(method, "int4")(weight(2, 64), SCHEMES[0], seen(structured(5, 128)), name="w")


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = structured(5, 64)
    inputs[0, 0] = np.inf
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(MoiieError, match="w: calibration saw inputs that are not finite"),
    ):
        gptq(weight(2, 64), SCHEMES[0], seen(inputs), name="w")


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 64)], ids=str)
def test_gptq_is_the_published_procedure(scheme: Scheme) -> None:
    """Column by column in float64 with the inverse itself, eliminating each column from it (equations 2 and 3)."""
    inputs, true = structured(300, 128), weight(3, 128)
    stats = seen(inputs)
    hessian = stats.second_moment().astype(np.float64)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(128)
    inverse, rest = np.linalg.inv(hessian), true.astype(np.float64)
    expected = np.zeros_like(true)
    for column in range(128):
        if column % scheme.group_size == 0:
            group = rest[:, column : column + scheme.group_size].astype(np.float32)
            scale = rtn(group, scheme).scales[:, 0].astype(np.float64)
        expected[:, column] = np.clip(np.rint(rest[:, column] / scale), scheme.lowest, -scheme.lowest - 1) * scale
        error = (rest[:, column] - expected[:, column]) / inverse[column, column]
        rest[:, column:] -= np.outer(error, inverse[column, column:])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    made = restore(gptq(true, scheme, stats), scheme)
    same = np.isclose(made, expected, rtol=1e-3, atol=1e-7).mean()
    assert same > 0.98, "a tie may fall the other way and its error spread"


def test_a_block_of_rows_is_quantised_as_in_the_whole() -> None:
    scheme, true, stats = SCHEMES[0], weight(40, 128), seen(structured(200, 128))
    for method in METHODS:
        whole = quantizer(method, "int4")(true, scheme, stats)
        parts = [quantizer(method, "int4")(true[start : start + 16], scheme, stats) for start in range(0, 40, 16)]
        values = np.concatenate([part.values for part in parts])
        assert (values == whole.values).mean() > 0.99  # sums are taken in another order, which may decide a tie


def group(count: int, scheme: Scheme) -> list[Consumer]:
    """Experts behind one norm, each with tokens of its own."""
    return [Consumer(weight(48, 128, e), scheme, seen(structured(60 + 50 * e, 128, e)), f"e{e}") for e in range(count)]


@pytest.mark.parametrize("scheme", [Scheme("int4", 64), Scheme("int8", 32)], ids=str)
def test_a_shared_scale_helps_the_experts_and_hurts_none(scheme: Scheme) -> None:
    consumers = group(3, scheme)
    scale = search_scale(consumers)
    assert scale.dtype == np.float32
    assert scale.shape == (128,)
    assert (scale > 0).all()
    assert scale.max() / scale.min() > 1.5
    before, after = [], []
    for consumer in consumers:
        made = restore(rtn(multiplied(consumer.weight, scale), scheme), scheme) / scale
        after.append(consumer.stats.output_error(made - consumer.weight).sum())
        before.append(
            consumer.stats.output_error(restore(rtn(consumer.weight, scheme), scheme) - consumer.weight).sum()
        )
    assert (np.array(after) <= np.array(before) * (1 + 1e-5)).all()
    assert sum(after) < 0.8 * sum(before)


def test_the_scale_changes_nothing_but_rounding() -> None:
    """A norm, two consumers behind it and a float gate; up rows and down."""
    scale = search_scale(group(2, Scheme("int4", 32)))
    rng = np.random.default_rng(0)
    norm, inputs = rng.random(128).astype(np.float32), structured(20, 128).astype(np.float64)
    gate = rng.standard_normal((4, 128)).astype(np.float32)
    np.testing.assert_allclose(
        (inputs * divided(norm, scale)) @ multiplied(gate, scale).T.astype(np.float64),
        (inputs * norm) @ gate.T.astype(np.float64),
        rtol=1e-4,
    )
    up, down = rng.standard_normal((128, 6)).astype(np.float32), rng.standard_normal((5, 128)).astype(np.float32)
    x = rng.standard_normal((7, 6))
    whole = x @ up.T.astype(np.float64) @ down.T
    np.testing.assert_allclose(x @ divided(up, scale).T @ multiplied(down, scale).T, whole, rtol=1e-4, atol=1e-5)


def test_where_no_scale_helps_everyone_it_is_one() -> None:
    """An expert that is exact as it is, and whose few tokens the sum over experts would not notice."""
    scheme = Scheme("int4", 32)
    exact = np.tile(np.arange(-8, 8, dtype=np.float32), (3, 8)) / 4
    consumers = [*group(1, scheme), Consumer(exact, scheme, seen(structured(1, 128) / 1000), "exact")]
    assert (search_scale(consumers[:1]) != 1).any()
    np.testing.assert_array_equal(search_scale(consumers), np.ones(128, np.float32))
    unseen = InputStatistics(0, np.zeros(128, np.float32), None, np.zeros((0, 128), np.float32))
    np.testing.assert_array_equal(search_scale([replace(consumers[0], stats=unseen)]), np.ones(128, np.float32))


def test_an_expert_that_calibration_did_not_reach_has_no_say() -> None:
    scheme = Scheme("int4", 32)
    unseen = InputStatistics(0, np.zeros(128, np.float32), None, np.zeros((0, 128), np.float32))
    consumers = group(2, scheme)
    with_it = search_scale([*consumers, Consumer(weight(4, 128), scheme, unseen, "unseen")])
    np.testing.assert_array_equal(with_it, search_scale(consumers))


def test_awq_behind_a_scale_sees_the_divided_inputs() -> None:
    scheme = Scheme("int4", 64)
    inputs, true = structured(400, 128), weight(64, 128)
    stats = seen(inputs)
    scale = search_scale([Consumer(true, scheme, stats)])
    made = quantizer("awq", "int4")(multiplied(true, scale), scheme, stats.divided(scale))
    alone = quantizer("awq", "int4")(true, scheme, stats)
    with_scale = np.square(inputs @ (restore(made, scheme) / scale - true).T).sum()
    assert with_scale < np.square(inputs @ (restore(alone, scheme) - true).T).sum()


@pytest.mark.parametrize("gram", [True, False])
def test_statistics_know_their_inputs(gram: bool) -> None:
    inputs, change = structured(90, 64), weight(5, 64)
    stats = seen(inputs, gram)
    moment = inputs.astype(np.float64).T @ inputs / 90
    np.testing.assert_allclose(stats.second_moment(), moment, rtol=1e-4, atol=1e-4 * moment.max())
    blocks = [moment[start : start + 32, start : start + 32] for start in (0, 32)]
    np.testing.assert_allclose(stats.group_moments(32), blocks, rtol=1e-4, atol=1e-4 * moment.max())
    expected = np.square(inputs.astype(np.float64) @ change.T).mean(axis=0)
    np.testing.assert_allclose(stats.output_error(change), expected, rtol=1e-3)
    scale = (np.random.default_rng(0).random(64) + 0.5).astype(np.float32)
    smaller = seen(inputs / scale, gram)
    shifted = stats.divided(scale)
    np.testing.assert_allclose(shifted.mean_abs, smaller.mean_abs, rtol=1e-4)
    np.testing.assert_allclose(shifted.output_error(change * scale), stats.output_error(change), rtol=1e-3)


def test_statistics_of_different_widths_are_refused() -> None:
    with pytest.raises(MoiieError, match=r"mean_abs \(4,\), gram None and sample \(2, 5\) are not of one width"):
        InputStatistics(2, np.zeros(4, np.float32), None, np.zeros((2, 5), np.float32))
    with pytest.raises(MoiieError, match="not of one width"):
        InputStatistics(2, np.zeros(4, np.float32), np.zeros((5, 5), np.float32), np.zeros((2, 4), np.float32))
