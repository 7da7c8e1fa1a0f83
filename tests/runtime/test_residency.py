from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from moiie_runtime.residency import WeightView, release_pages, weight_views
from moiie_runtime.tensors import TensorFile, save_tensors

PAGE = mmap.PAGESIZE


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    rng = np.random.default_rng(0)
    save_tensors(
        path,
        {
            "a": rng.random((3, 5), np.float32),
            "layers.1.experts.down_proj": rng.random((4, 2, 4 * PAGE), np.float32),
            "z": rng.random(7, np.float32),
        },
    )
    return path


def test_a_view_of_one_expert_is_its_row_of_the_stacked_tensor(weights):
    file, data = TensorFile(weights), weights.read_bytes()
    whole, expert = weight_views(file.header, ["a", "layers.1.experts.2.down_proj"])
    assert whole == WeightView((3, 5), file.header["a"].offset, 60)
    assert expert.shape == (2, 4 * PAGE)
    found = np.frombuffer(data[expert.offset : expert.offset + expert.nbytes], np.float32).reshape(expert.shape)
    np.testing.assert_array_equal(found, file["layers.1.experts.down_proj"][2])


def test_names_the_file_does_not_have_are_left_out(weights):
    names = ["b", "layers.1.experts.4.down_proj", "layers.2.experts.0.down_proj", "experts.x.a"]
    assert list(weight_views(TensorFile(weights).header, names)) == []


def resident(path: Path) -> int:
    """Bytes of the file that are mapped in and present."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="needs madvise and /proc")
def test_released_pages_leave_and_come_back_unchanged(weights):
    file = TensorFile(weights)
    expected = np.frombuffer(weights.read_bytes(), np.uint8)
    mapped = np.memmap(weights, np.uint8, "r")
    np.testing.assert_array_equal(mapped, expected)
    before = resident(weights)
    assert before >= len(expected)
    views = list(weight_views(file.header, ["layers.1.experts.0.down_proj", "layers.1.experts.3.down_proj", "z"]))
    released = release_pages(weights, views)
    size = views[0].nbytes
    # Two mappings of the file; of each expert all whole pages, of `z` none.
    assert 4 * (size - 2 * PAGE) <= released <= 4 * size
    assert before - resident(weights) >= 2 * (size - 2 * PAGE)
    np.testing.assert_array_equal(mapped, expected)


def test_nothing_is_released_of_a_file_that_is_not_mapped(tmp_path):
    (tmp_path / "w").write_bytes(b"\0" * 8 * PAGE)
    assert release_pages(tmp_path / "w", [WeightView((8 * PAGE,), 0, 8 * PAGE)]) == 0
