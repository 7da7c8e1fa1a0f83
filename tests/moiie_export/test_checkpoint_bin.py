"""PyTorch pickles: read by rows like safetensors, never executed."""

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_bin import BinFile
from moiie_runtime.errors import MissingDependency, MoiieError

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parents[1] / "golden" / "moiie_phi3"


def write_checkpoint(directory: Path, state: Any, name: str = "pytorch_model.bin") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "test"}')
    torch.save(state, directory / name)
    return directory / name


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return {
        name: torch.from_numpy(value) for name, value in load_file(GOLDEN / "checkpoint" / "model.safetensors").items()
    }


def assert_equal(directory: Path, expected: dict[str, Any]) -> None:
    with Checkpoint.open(directory) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        for name, value in expected.items():
            assert checkpoint.tensors[name].shape == tuple(value.shape)
            np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value.float().numpy(), strict=True)
            np.testing.assert_array_equal(
                checkpoint.rows(name, len(value) // 2, len(value)), value[len(value) // 2 :].float()
            )


@pytest.mark.parametrize(
    ("dtype", "name"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")]
)
def test_a_single_pickle_reads_like_its_state_dict(
    tmp_path: Path, golden: dict[str, Any], dtype: str, name: str
) -> None:
    state = {key: value.to(getattr(torch, dtype)) for key, value in golden.items()}
    write_checkpoint(tmp_path, state)
    assert_equal(tmp_path, state)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert {entry.dtype for entry in checkpoint.tensors.values()} == {name}
        assert set(checkpoint.file_hashes()) == {"config.json", "pytorch_model.bin"}


def test_sharded_pickles_read_like_their_state_dict(tmp_path: Path, golden: dict[str, Any]) -> None:
    names = sorted(golden)
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    for shard, tensors in shards.items():
        write_checkpoint(tmp_path, {name: golden[name] for name in tensors}, shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index))
    assert_equal(tmp_path, golden)
    index["weight_map"]["gone"] = "pytorch_model-00002-of-00002.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(MoiieError, match=r"pytorch_model-00002-of-00002.bin: tensor 'gone' is missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(MoiieError, match=r"1 of 2 shards are missing: pytorch_model-00001-of-00002.bin"):
        Checkpoint.open(tmp_path)


def test_parameters_shared_transposed_scalar_and_empty_tensors_are_read(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "parameter": torch.nn.Parameter(weight),
        "tied": weight,
        "transposed": weight.t(),
        "transposed_bf16": weight.t().bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(4),
    }
    write_checkpoint(tmp_path, state)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name in ("parameter", "tied"):
            np.testing.assert_array_equal(checkpoint.rows(name, 0, 2), weight.numpy())
        for name in ("transposed", "transposed_bf16"):
            np.testing.assert_array_equal(checkpoint.rows(name, 1, 3), weight.t()[1:3].numpy())
        np.testing.assert_array_equal(checkpoint.rows("scalar", 0, 1), np.array([2.5], np.float32), strict=True)
        assert checkpoint.rows("empty", 0, 0).shape == (0, 3)
        assert checkpoint.raw_dtype("ids") == "I64"
        rows = checkpoint.rows("tied", 0, 2)
        rows[:] = 0  # a copy: neither the file nor the mapping changes
        np.testing.assert_array_equal(checkpoint.rows("tied", 0, 2), weight.numpy())
        with pytest.raises(MoiieError, match="'ids': expected F64, F32, F16, BF16, found I64"):
            checkpoint.rows("ids", 0, 1)
        with pytest.raises(MoiieError, match="'tied' has 2 rows, not 1:3"):
            checkpoint.rows("tied", 1, 3)
    with pytest.raises(MoiieError, match="'tied': not in this file, or the file was closed"):
        checkpoint.rows("tied", 0, 1)


class RunsCode:
    """A pickle of this creates a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = write_checkpoint(tmp_path / "c", {"w": torch.ones(2), "x": RunsCode(trap)})
    with pytest.raises(MoiieError) as caught:
        Checkpoint.open(path.parent)
    assert (
        caught.value.message
        == f"{path}: refused, it wants to run '{os.mkdir.__module__}.mkdir': a pickle can run any code"
    )
    assert "unless you know who made it" in str(caught.value.hint)
    path.write_bytes(pickle.dumps({"x": RunsCode(trap)}))
    with pytest.raises(MoiieError, match="a bare pickle"):
        Checkpoint.open(path.parent)
    assert not trap.exists()
    torch.load(write_checkpoint(tmp_path / "c", RunsCode(trap)), weights_only=False)
    assert trap.exists()  # so the trap does spring when code runs


def test_the_environment_cannot_allow_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write_checkpoint(tmp_path / "c", {"x": RunsCode(tmp_path / "trap")})
    with pytest.raises(MoiieError, match="refused, it wants to run"):
        Checkpoint.open(tmp_path / "c")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([torch.ones(2)], "expected a dict of tensors, found list"),
        ({0: torch.ones(2)}, "expected a dict of tensors"),
        ({"state_dict": {"w": torch.ones(2)}}, "tensor 'state_dict': expected a tensor, found dict"),
        ({"w": torch.ones(2), "epoch": 3}, "tensor 'epoch': expected a tensor, found int"),
        ({"w": torch.ones(2, 2).to_sparse()}, "tensor 'w': expected a dense tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "tensor 'w': expected a dense tensor, found torch.complex64"),
        ({"w": torch.ones(1).expand(1 << 40)}, "tensor 'w': expected 4398046511104 bytes"),
    ],
)
def test_what_is_not_a_flat_dict_of_dense_tensors_is_refused(tmp_path: Path, state: Any, reason: str) -> None:
    path = write_checkpoint(tmp_path, state)
    with pytest.raises(MoiieError, match=reason) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {"w": torch.ones(1000)})
    whole = path.read_bytes()
    for length in (0, 3, 10, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MoiieError, match=r"pytorch_model.bin: (expected a torch file|a damaged torch file)"):
            Checkpoint.open(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(MoiieError, match="a damaged torch file"):
        Checkpoint.open(tmp_path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(MoiieError, match=r"a bare pickle, as torch before 1.6"):
        Checkpoint.open(tmp_path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """A small file could otherwise inflate to any size."""
    path = write_checkpoint(tmp_path, {"w": torch.ones(2)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(MoiieError, match="is compressed or too large"):
        Checkpoint.open(tmp_path)


def test_a_trainer_s_file_is_read_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {"model": {"w": torch.ones(2)}, "epoch": 3})
    file = BinFile(path, ("state_dict", "model"))
    assert list(file.header) == ["w"]
    assert file.rows("w", 0, 2).tolist() == [1, 1]
    file.close()
    with pytest.raises(MoiieError, match="tensor 'model': expected a tensor, found"):
        Checkpoint.open(tmp_path)
    path = write_checkpoint(tmp_path, {"model": torch.ones(2)})  # a tensor of that name is a tensor
    file = BinFile(path, ("model",))
    assert list(file.header) == ["model"]
    file.close()


def test_without_torch_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"w": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match="needs torch") as caught:
        Checkpoint.open(tmp_path)
    assert "moiie-export[export]" in str(caught.value.hint)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_rows_takes_memory_for_a_block_not_for_the_file(tmp_path: Path, dtype: str) -> None:
    rows, columns, step = 32_768, 1024, 64
    write_checkpoint(tmp_path, {"w": torch.zeros(rows, columns, dtype=getattr(torch, dtype))})
    before = anonymous_bytes()
    peak = before
    with Checkpoint.open(tmp_path) as checkpoint:
        for start in range(0, rows, step):
            assert not checkpoint.rows("w", start, start + step).any()
            peak = max(peak, anonymous_bytes())
    assert peak - before < 16 << 20  # the file has 64 MiB or more
