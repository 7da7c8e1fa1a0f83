"""The streaming writer: files that the safetensors library reads, offsets that point at the data, nothing half-written."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, TensorWriter, read_header, read_metadata, save_tensors

SPECS: dict[str, tuple[str, tuple[int, ...]]] = {"w": ("F32", (4, 3)), "e": ("F16", (0, 2)), "s": ("I64", ())}
W = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_all(writer: TensorWriter) -> None:
    writer.write(W[:3])
    writer.write(W[3:])
    writer.write(np.array(5, np.int64))


def test_a_streamed_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, SPECS, {"format": "pt"}) as writer:
        write_all(writer)
    theirs = load_file(path)
    np.testing.assert_array_equal(theirs["w"], W, strict=True)
    np.testing.assert_array_equal(theirs["s"], np.array(5), strict=True)
    assert theirs["e"].shape == (0, 2)
    assert read_metadata(path) == {"format": "pt"}


def test_offsets_sizes_and_digest_describe_the_finished_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = TensorWriter(path, SPECS)
    announced = dict(writer.header)
    write_all(writer)
    with pytest.raises(MoiieError, match="known only after close"):
        _ = writer.sha256
    writer.close()
    writer.close()
    content = path.read_bytes()
    assert writer.nbytes == len(content)
    assert writer.sha256 == hashlib.sha256(content).hexdigest()
    assert read_header(path) == announced
    info = announced["w"]
    assert content[info.offset : info.offset + info.nbytes] == W.tobytes()
    assert info.offset % 64 == 0


def test_the_bytes_do_not_depend_on_blocks_or_memory_layout(tmp_path: Path) -> None:
    contents = set()
    for number, blocks in enumerate(([W], [W[:1], W[1:1], W[1:]], [np.asfortranarray(W)], [np.repeat(W, 2, 0)[::2]])):
        path = tmp_path / f"{number}.safetensors"
        with TensorWriter(path, {"w": ("F32", (4, 3))}) as writer:
            for block in blocks:
                writer.write(block, "w")
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_tensors_keep_the_given_order_and_bfloat16_is_written_as_bits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file_torch = pytest.importorskip("safetensors.torch").load_file
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, {"z": ("BF16", (2,)), "a": ("F32", (1,))}) as writer:
        writer.write(np.array([0x3F80, 0xC020], np.uint16), "z")
        writer.write(np.ones(1, np.float32), "a")
    assert list(read_header(path)) == ["z", "a"]
    assert torch.equal(load_file_torch(path)["z"], torch.tensor([1.0, -2.5], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("array", "name", "reason"),
    [
        (W.astype(np.float64), None, "'w': expected float32, found float64"),
        (W.astype(">f4"), None, "'w': expected float32, found >f4"),
        (W.T, None, r"'w': expected rows of \(4, 3\), found a block \(3, 4\)"),
        (W.reshape(-1), None, "expected rows of"),
        (np.float32(1).reshape(()), None, "expected rows of"),
        (np.ones((5, 3), np.float32), None, "'w': expected 48 more bytes, found 60"),
        (np.array(5, np.int64), "s", "expected tensor 'w' next, found 's'"),
        (W, "v", "tensor 'v' was not announced"),
        (np.zeros((0, 3), np.float32), "gone", "tensor 'gone' was not announced"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, array: Any, name: str | None, reason: str) -> None:
    with TensorWriter(tmp_path / "x.safetensors", SPECS) as writer:
        with pytest.raises(MoiieError, match=reason):
            writer.write(array, name)
        write_all(writer)  # a refused block leaves no trace
    assert load_file(tmp_path / "x.safetensors")["w"].tobytes() == W.tobytes()


def test_more_than_announced_and_writing_after_close_are_refused(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x.safetensors", SPECS) as writer:
        write_all(writer)
        with pytest.raises(MoiieError, match="all tensors are written, found 48 bytes more"):
            writer.write(W)
    with pytest.raises(MoiieError, match="after close"):
        writer.write(W)


def test_closing_early_names_the_unfinished_tensor(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x.safetensors", SPECS)
    writer.write(W[:1])
    with pytest.raises(MoiieError, match="'w': expected 48 bytes, 12 were written; 2 tensors are unfinished"):
        writer.close()
    with pytest.raises(MoiieError, match="known only after close"):
        _ = writer.sha256


def test_an_error_inside_the_block_is_not_hidden_by_closing(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="found float64"), TensorWriter(tmp_path / "x.safetensors", SPECS) as writer:
        writer.write(W.astype(np.float64))  # not "4 tensors are unfinished"
    with pytest.raises(MoiieError, match="expected to end at byte"):
        TensorFile(tmp_path / "x.safetensors")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="cannot be written: No such file") as caught:
        TensorWriter(tmp_path / "none" / "x.safetensors", SPECS)
    assert "bytes are free" in str(caught.value.hint)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_reported_at_the_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    block = np.zeros((1 << 20,), np.float32)
    writer = TensorWriter(path, {"w": ("F32", block.shape)})
    with pytest.raises(MoiieError, match="cannot be written: No space left on device"):
        writer.write(block)


def test_save_tensors_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": W})
    before = path.read_bytes()
    with pytest.raises(MoiieError, match="safetensors has no dtype complex128"):
        save_tensors(path, {"a": W, "b": np.ones(1, complex)})

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MoiieError, match="Input/output error"):
        save_tensors(path, {"a": W + 1})
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_tensors(path, {"a": W + 1})
    np.testing.assert_array_equal(load_file(path)["a"], W + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_vectors_with_gaps_are_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": np.arange(6, dtype=np.float32)[::2]})
    np.testing.assert_array_equal(load_file(path)["a"], [0, 2, 4])
