"""Tensors read as views and row blocks: the same numbers as the safetensors library gives, in bounded memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, TensorWriter, cast_rows, save_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


def bfloat16_bits(values: list[float]) -> Any:
    """Exact for values whose float32 has an empty lower half."""
    bits = np.array(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def write_bfloat16(path: Path, values: list[float], shape: tuple[int, ...]) -> None:
    with TensorWriter(path, {"w": ("BF16", shape)}) as writer:
        writer.write(bfloat16_bits(values).reshape(shape))


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors")))
def test_golden_files_read_as_the_safetensors_library_reads_them(case: str) -> None:
    path = GOLDEN / case / "expected.safetensors"
    theirs = load_file(path)
    with TensorFile(path) as ours:
        assert set(ours) == set(theirs)
        for name, expected in theirs.items():
            assert ours[name].dtype == expected.dtype
            np.testing.assert_array_equal(ours[name], expected, strict=True)
            if expected.dtype == np.float32:
                middle = len(expected) // 2
                np.testing.assert_array_equal(ours.rows(name, middle, len(expected)), expected[middle:], strict=True)


def test_every_numpy_dtype_and_shape_of_the_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    names = "?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"
    tensors = {name: np.arange(6).reshape(2, 3).astype(name) for name in names}
    tensors |= {"scalar": np.array(7, "f4"), "empty": np.zeros((0, 3), "i8"), "none": np.zeros((2, 0), "f2")}
    save_file(tensors, path, metadata={"format": "np"})
    with TensorFile(path) as file:
        assert file.metadata == {"format": "np"}
        assert len(file) == len(tensors)
        assert set(file.keys()) == set(tensors)
        for name, expected in tensors.items():
            assert name in file
            np.testing.assert_array_equal(file[name], expected, strict=True)


def test_views_are_read_only_share_the_mapping_and_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": np.arange(4, dtype=np.float32), "b": np.ones(2, np.int64)})
    file = TensorFile(path)
    view = file["a"]
    assert np.shares_memory(view, file["a"])
    assert not view.flags.writeable
    assert not view.flags.owndata
    file.close()
    file.close()
    np.testing.assert_array_equal(view, [0, 1, 2, 3])
    for read in (lambda: file["a"], lambda: file.rows("a", 0, 1)):
        with pytest.raises(MoiieError, match="'a' was asked for after close"):
            read()


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"odd": np.ones(3, np.uint8), "a": np.arange(4, dtype=np.float32)})
    with TensorFile(path) as file:
        assert file.header["a"].offset % 4 == 3
        np.testing.assert_array_equal(file["a"], [0, 1, 2, 3])
        np.testing.assert_array_equal(file.rows("a", 1, 3), [1, 2])


def test_bfloat16_rows_are_the_upper_halves_of_float32(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = [0.0, -0.0, 1.0, -2.5, 3.0, 2.0**-126, 2.0**127, float("inf"), -float("inf"), 0.15625]
    write_bfloat16(path, values, (5, 2))
    with TensorFile(path) as file:
        rows = file.rows("w", 1, 4)
        np.testing.assert_array_equal(rows, np.array(values, np.float32).reshape(5, 2)[1:4], strict=True)
        assert np.signbit(file.rows("w", 0, 1)[0, 1])
        assert rows.flags.writeable
        with pytest.raises(MoiieError, match="'w' is BF16, which numpy cannot show"):
            file["w"]


def test_bits_are_the_bytes_in_the_file(tmp_path: Path) -> None:
    numbers, halves = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([1.0, -2.0], np.float16)
    with TensorWriter(tmp_path / "f", {"f8": ("F8_E4M3", (2, 3)), "f16": ("F16", (2,))}) as writer:
        writer.write_elements(numbers, "f8")
        writer.write_elements(halves, "f16")
    with TensorFile(tmp_path / "f") as file:
        np.testing.assert_array_equal(file.bits("f8"), numbers, strict=True)
        np.testing.assert_array_equal(file.bits("f16"), halves.view(np.uint8).reshape(2, 2), strict=True)
        with pytest.raises(MoiieError, match="no tensor 'f32'"):
            file.bits("f32")


def test_bfloat16_rows_agree_with_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file_torch = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    save_file_torch({"w": every}, path)
    with TensorFile(path) as file:
        ours = file.rows("w", 0, 256)
    np.testing.assert_array_equal(ours.view(np.uint32), every.to(torch.float32).numpy().view(np.uint32))


@pytest.mark.parametrize("stored", ["f2", "f4", "f8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_are_converted_and_writable(tmp_path: Path, stored: str, dtype: Any) -> None:
    path = tmp_path / "x.safetensors"
    source = np.linspace(-3, 3, 24).reshape(4, 3, 2).astype(stored)
    save_tensors(path, {"w": source})
    with TensorFile(path) as file:
        rows = file.rows("w", 1, 3, dtype)
        np.testing.assert_array_equal(rows, source[1:3].astype(dtype), strict=True)
        rows[:] = 0
        np.testing.assert_array_equal(file["w"], source)


def test_scalars_and_empty_tensors_have_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"s": np.array(2.5, np.float32), "e": np.zeros((0, 3), np.float16), "n": np.zeros((2, 0), "f8")})
    with TensorFile(path) as file:
        np.testing.assert_array_equal(file.rows("s", 0, 1), np.array([2.5], np.float32), strict=True)
        assert file.rows("e", 0, 0).shape == (0, 3)
        assert file.rows("n", 0, 2).shape == (2, 0)
        assert file.rows("n", 1, 1).shape == (0, 0)


@pytest.mark.parametrize(
    ("name", "start", "stop", "dtype", "reason"),
    [
        ("w", 0, 5, np.float32, "'w' has 4 rows, not 0:5"),
        ("w", -1, 2, np.float32, "not -1:2"),
        ("w", 3, 2, np.float32, "not 3:2"),
        ("ids", 0, 1, np.float32, "expected F64, F32, F16, BF16, found I64"),
        ("gone", 0, 1, np.float32, "no tensor 'gone' among 2"),
        ("w", 0, 1, np.float64, "expected dtype float32 or float16, found float64"),
    ],
)
def test_wrong_requests_are_refused(tmp_path: Path, name: str, start: int, stop: int, dtype: Any, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": np.ones((4, 2), np.float32), "ids": np.ones(2, np.int64)})
    with TensorFile(path) as file, pytest.raises(MoiieError, match=reason):
        file.rows(name, start, stop, dtype)


def test_a_number_that_the_narrower_type_cannot_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    wide = np.ones((5, 2), np.float64)
    wide[3, 1] = 1e39
    narrow = np.ones((5, 2), np.float32)
    narrow[4, 0] = -70000.0
    save_tensors(path, {"wide": wide, "narrow": narrow})
    with TensorFile(path) as file:
        with pytest.raises(MoiieError, match=r"x.safetensors: tensor 'wide', row 3: .* too large for float32"):
            file.rows("wide", 2, 5)
        with pytest.raises(MoiieError, match=r"tensor 'narrow', row 4: .* too large for float16") as caught:
            file.rows("narrow", 1, 5, np.float16)
        assert caught.value.hint == "export with dtype float32"
        np.testing.assert_array_equal(file.rows("narrow", 0, 4, np.float16), np.ones((4, 2), np.float16))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_casting_keeps_nan_and_infinity_and_refuses_overflow(values: list[float]) -> None:
    source = np.array(values, np.float32)
    np.testing.assert_array_equal(cast_rows(source, np.float32, "t"), source)
    with np.errstate(over="ignore"):
        expected = source.astype(np.float16)
    if np.isinf(expected[np.isfinite(source)]).any():
        with pytest.raises(MoiieError, match="too large for float16"):
            cast_rows(source, np.float16, "t")
    else:
        np.testing.assert_array_equal(cast_rows(source, np.float16, "t"), expected)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_reading_rows_takes_memory_for_a_block_not_for_the_file(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    rows, columns, step = 16_384, 1024, 64
    writer = TensorWriter(path, {"w": (dtype, (rows, columns))})
    block = np.zeros((1024, columns), np.float32 if dtype == "F32" else np.uint16)
    for _ in range(rows // 1024):
        writer.write(block)
    writer.close()
    with TensorFile(path) as file:
        tracemalloc.start()
        try:
            for start in range(0, rows, step):
                assert not file.rows("w", start, start + step).any()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3 * step * columns * 4 + 200_000


def test_rows_that_are_read_soon_may_be_announced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"matrix": np.arange(12, dtype=np.float32).reshape(4, 3), "scalar": np.float32(2).reshape(())})
    with TensorFile(path) as file:
        for name, start, stop in (
            ("matrix", 0, 4),
            ("matrix", 2, 2),
            ("matrix", 3, 900),
            ("scalar", 0, 1),
            ("none", 0, 1),
        ):
            for advise in (file.will_read, file.has_read):
                advise(name, start, stop)  # whatever it says, nothing fails
        np.testing.assert_array_equal(file.rows("matrix", 1, 3), [[3, 4, 5], [6, 7, 8]])
    file.will_read("matrix", 0, 4)


def test_stored_rows_are_views(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    bits = np.arange(0x3F80, 0x3F80 + 12, dtype=np.uint16).reshape(4, 3)
    with TensorWriter(path, {"brain": ("BF16", bits.shape), "half": ("F16", (2,))}) as writer:
        writer.write(bits)
        writer.write(np.ones(2, np.float16))
    with TensorFile(path) as file:
        found = file.stored_rows("brain", 1, 3)
        np.testing.assert_array_equal(found, bits[1:3])
        assert found.dtype == np.uint16
        assert not found.flags.writeable
        assert not found.flags.owndata
        assert file.stored_rows("half", 0, 1).dtype == np.float16
        with pytest.raises(MoiieError, match="has 4 rows"):
            file.stored_rows("brain", 3, 5)
