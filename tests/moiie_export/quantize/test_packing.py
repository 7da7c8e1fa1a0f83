"""Stored forms: numbers and scales to bytes and back, for every format and group."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moiie_export.quantize.packing import (
    Quantized,
    dequantize,
    e4m3_values,
    pack_int4,
    restore,
    stored_arrays,
    stored_specs,
    unpack_int4,
)
from moiie_export.quantize.scheme import FORMATS, GROUP_SIZES, Scheme
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, TensorWriter

SCHEMES = [Scheme(kind, group) for kind in ("int4", "int8") for group in GROUP_SIZES] + [Scheme("fp8"), Scheme("w8a8")]
NIBBLES = st.integers(-8, 7)


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        np.int8,
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=9).map(lambda s: (*s[:-1], 2 * s[-1])),
        elements=NIBBLES,
    )
)
def test_packing_int4_and_back(values: np.ndarray) -> None:
    packed = pack_int4(values)
    assert packed.dtype == np.int8
    assert packed.shape == (*values.shape[:-1], values.shape[-1] // 2)
    np.testing.assert_array_equal(unpack_int4(packed), values, strict=True)
    np.testing.assert_array_equal(pack_int4(unpack_int4(packed)), packed, strict=True)


def test_the_low_nibble_is_the_even_column_and_negative_numbers_are_complements() -> None:
    packed = pack_int4(np.array([[1, 2], [-8, 7], [-1, 0]], np.int8)).view(np.uint8)
    assert packed.tolist() == [[0x21], [0x78], [0x0F]]


def test_packing_is_that_of_onnx() -> None:
    """ml_dtypes holds one number a byte; onnx packs them."""
    from onnx import numpy_helper

    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    raw = numpy_helper.from_array(values.astype(ml_dtypes.int4)).raw_data
    assert pack_int4(values).tobytes() == raw


def test_every_byte_is_a_pair() -> None:
    every = np.arange(256, dtype=np.uint8).view(np.int8)
    np.testing.assert_array_equal(pack_int4(unpack_int4(every)), every)


def test_an_odd_row_has_no_pairs() -> None:
    with pytest.raises(MoiieError, match="expected an even row length, found 3"):
        pack_int4(np.zeros((2, 3), np.int8))


def test_float8_numbers_are_those_of_ml_dtypes() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3_values(), theirs, strict=True)


def random_quantized(scheme: Scheme, rows: int, columns: int) -> Quantized:
    rng = np.random.default_rng(rows)
    values = rng.integers(scheme.lowest, -scheme.lowest, (rows, columns)).astype(np.int8)
    if scheme.grouped:
        return Quantized(values, (rng.random((rows, columns // scheme.group_size)) + 0.1).astype(np.float16))
    if scheme.format == "fp8":
        values[values & 127 == 127] = 0
    step = np.float32(0.5) if scheme.format == "w8a8" else None
    return Quantized(values, (rng.random(rows) + 0.1).astype(np.float32), step)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_weight_in_a_file_is_number_times_scale(tmp_path, scheme: Scheme, rows: int) -> None:  # type: ignore[no-untyped-def]
    columns = 3 * (scheme.group_size or 7)
    made, shape = random_quantized(scheme, rows, columns), (rows, columns)
    specs = {f"w{suffix}": spec for suffix, spec in stored_specs(shape, scheme).items()}
    ordered = dict(sorted(specs.items(), key=lambda item: {"F32": 0, "F16": 1}.get(item[1][0], 2)))
    parts = {f"w{suffix}": array for suffix, array in stored_arrays(made, scheme).items()}
    with TensorWriter(tmp_path / "w.safetensors", ordered) as writer:
        for name in ordered:
            writer.write(parts[name], name)
    file = TensorFile(tmp_path / "w.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in file.header.items()} == specs
    stored = parts["w"] if scheme.format == "fp8" else file["w"]
    found = dequantize(stored, file["w.scales"], scheme)
    numbers = e4m3_values()[made.values.view(np.uint8)] if scheme.format == "fp8" else made.values
    per_scale = scheme.group_size or columns
    expected = np.empty(shape, np.float32)
    for row, column in np.ndindex(shape):
        scale = made.scales.reshape(rows, -1)[row, column // per_scale]
        expected[row, column] = np.float32(numbers[row, column]) * np.float32(scale)
    np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal(restore(made, scheme), expected, strict=True)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_stack_is_stored_as_its_experts_one_after_another(scheme: Scheme) -> None:
    columns = 2 * (scheme.group_size or 9)
    specs = stored_specs((3, 4, columns), scheme)
    experts = [random_quantized(scheme, 4, columns) for _ in range(3)]
    for suffix, (_, shape) in specs.items():
        parts = [stored_arrays(expert, scheme)[suffix] for expert in experts]
        if suffix != ".input_scale":
            assert np.concatenate([part.reshape(-1) for part in parts]).reshape(shape).shape == shape
    stack = np.stack([stored_arrays(expert, scheme)[""] for expert in experts])
    scales = np.stack([expert.scales for expert in experts])
    found = dequantize(stack, scales, scheme)
    np.testing.assert_array_equal(found, np.stack([restore(expert, scheme) for expert in experts]), strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 32), "format 'int3': expected one of int4, int8, fp8, w8a8"),
        (("int4",), "group_size 0 for int4: expected one of 32, 64, 128"),
        (("int8", 16), "group_size 16 for int8: expected one of 32, 64, 128"),
        (("fp8", 32), "group_size 32 for fp8: it has one scale per row"),
    ],
)
def test_schemes_that_do_not_exist(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(MoiieError) as caught:
        Scheme(*arguments)  # type: ignore[arg-type]
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (576, "groups that divide it: 32, 64"),
        (96, "groups that divide it: 32"),
        (100, "none of 32, 64, 128 divides it: keep this tensor in float16 or float32"),
        (0, "none of 32, 64, 128 divides it: keep this tensor in float16 or float32"),
    ],
)
def test_a_row_that_does_not_divide_names_the_groups_that_do(columns: int, hint: str) -> None:
    with pytest.raises(MoiieError) as caught:
        Scheme("int4", 128).check_row(columns, "decoder.layers.0.mlp.down_proj.weight")
    assert caught.value.message.startswith(f"decoder.layers.0.mlp.down_proj.weight: rows of {columns} do not divide")
    assert caught.value.hint == hint


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_that_fit(format_: str) -> None:
    scheme = Scheme(format_, 64 if format_ in ("int4", "int8") else 0)
    scheme.check_row(192, "w")
    assert scheme.groups(192) == (3 if scheme.grouped else 1)
    assert (scheme.bits, scheme.lowest) == ((4, -8) if format_ == "int4" else (8, -128))
    if not scheme.grouped:
        scheme.check_row(7, "w")
