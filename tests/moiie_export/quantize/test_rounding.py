"""The compiled rounding and torch's give the same bytes, whatever the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.quantize import rounding
from moiie_export.quantize.packing import stored_arrays
from moiie_export.quantize.rounding import round_stored
from moiie_export.quantize.rtn import rtn
from moiie_export.quantize.scheme import GROUP_SIZES, Scheme
from moiie_runtime.errors import MoiieError
from moiie_runtime.native import compiling

SCHEMES = [Scheme(kind, group) for kind in ("int4", "int8") for group in GROUP_SIZES]
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
WIDTHS = [0, 128, *(bits for bits, flag in ((256, " avx2 "), (512, " avx512f ")) if flag in FLAGS)]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch):
    """`rtn` as it is without a compiler."""

    def run(weight: np.ndarray, scheme: Scheme, **options: str):
        with monkeypatch.context() as without:
            without.setattr(rounding, "_function", lambda: None)
            return rtn(weight, scheme, **options)

    return run


def numbers(rows: int, columns: int, exponent: int, seed: int) -> np.ndarray:
    """Groups of every kind: normal, on a grid (many ties), zero, of one sign, with an outlier."""
    random = np.random.default_rng(seed)
    found = random.standard_normal((rows, columns)).astype(np.float32) * np.float32(10.0**exponent)
    kinds = random.integers(0, 5, rows)
    found[kinds == 1] = np.rint(found[kinds == 1] * 4 / 10.0**exponent) * np.float32(10.0**exponent / 8)
    found[kinds == 2] = 0
    found[kinds == 3] = np.abs(found[kinds == 3])
    found[kinds == 4, ::37] *= 100
    return found.astype(np.float32)


def test_it_is_compiled_here() -> None:
    assert rounding._function() is not None


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(-9, 3),
    st.integers(0, 10**6),
    st.sampled_from(WIDTHS),
)
def test_same_bytes(scheme: Scheme, rows: int, groups: int, exponent: int, seed: int, registers: int) -> None:
    weight = numbers(rows, groups * scheme.group_size, exponent, seed)
    brains = (weight.view(np.uint32) >> 16).astype(np.uint16)
    widened = (brains.astype(np.uint32) << 16).view(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "REGISTERS", registers)
        compiled = [stored_arrays(rtn(each, scheme), scheme) for each in (weight, widened)]
        stored = [round_stored(each, scheme) for each in (weight, brains)]
        patch.setattr(rounding, "_function", lambda: None)
        wanted = [stored_arrays(rtn(each, scheme), scheme) for each in (weight, widened)]
        assert round_stored(weight, scheme) is None
    for found in (compiled, stored):
        for each, expected in zip(found, wanted, strict=True):
            assert each is not None
            assert {name: array.tobytes() for name, array in each.items()} == {
                name: array.tobytes() for name, array in expected.items()
            }


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_what_cannot_be_stored_at_once(scheme: Scheme) -> None:
    weight = numbers(3, 2 * scheme.group_size, 0, 1)
    assert round_stored(weight, scheme) is not None
    assert round_stored(weight.astype(np.float16), scheme) is None, "another type"
    assert round_stored(weight[:, ::2], scheme) is None, "not in one piece"
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        weight[2, -1] = bad
        assert round_stored(weight, scheme) is None
        assert round_stored((weight.view(np.uint32) >> 16).astype(np.uint16), scheme) is None


def test_same_bytes_of_many_numbers(by_torch) -> None:
    weight = numbers(512, 2048, -2, 5)
    for scheme in SCHEMES:
        compiled, wanted = rtn(weight, scheme), by_torch(weight, scheme)
        np.testing.assert_array_equal(compiled.values, wanted.values)
        np.testing.assert_array_equal(compiled.scales.view(np.uint16), wanted.scales.view(np.uint16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e6])
@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_the_same_errors(scheme: Scheme, bad: float, by_torch) -> None:
    weight = numbers(3, 2 * scheme.group_size, 0, 1)
    weight[1, -1] = bad * (10 if scheme.bits == 8 and bad == 1e6 else 1)
    with pytest.raises(MoiieError) as compiled:
        rtn(weight, scheme, name="layer.weight")
    with pytest.raises(MoiieError) as wanted:
        by_torch(weight, scheme, name="layer.weight")
    assert str(compiled.value) == str(wanted.value)
    assert "layer.weight" in str(compiled.value)


def test_without_a_compiler_torch_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(4, 64, 0, 2)
    wanted = rtn(weight, SCHEMES[0])
    monkeypatch.setattr(compiling, "COMPILERS", ())
    rounding._function.cache_clear()
    try:
        assert rounding._function() is None
        np.testing.assert_array_equal(rtn(weight, SCHEMES[0]).values, wanted.values)
    finally:
        rounding._function.cache_clear()
