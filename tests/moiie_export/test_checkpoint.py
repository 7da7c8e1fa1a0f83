"""Checkpoints as the authors' code saves them: every tensor found and read, every wrong directory refused by name."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moiie_export.checkpoint import Checkpoint, check_finite
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorWriter, save_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
SHARDED = GOLDEN / "moiie_llama3" / "checkpoint"
DIRECTORIES = [*GOLDEN.glob("*/checkpoint"), *GOLDEN.glob("*/vision_tower/*")]
WEIGHTS = {"model.norm.weight": np.ones(3, np.float32), "lm_head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def write_checkpoint(directory: Path, name: str = "model.safetensors", **tensors: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "test"}')
    save_tensors(directory / name, tensors or WEIGHTS)
    return directory


def edit_index(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {tensor: shard for tensor, shard in index["weight_map"].items() if shard is not None}
    path.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHARDED, tmp_path / "checkpoint"))


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: "-".join(path.relative_to(GOLDEN).parts[:2]))
def test_golden_checkpoints_and_towers_read_as_the_safetensors_library_reads_them(directory: Path) -> None:
    expected = {
        name: (value, file.name) for file in directory.glob("*.safetensors") for name, value in load_file(file).items()
    }
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.config == json.loads((directory / "config.json").read_text())
        assert set(checkpoint.tensors) == set(expected)
        for name, (value, file) in expected.items():
            entry = checkpoint.tensors[name]
            assert (entry.name, entry.shape, entry.file) == (name, value.shape, file)
            assert entry.dtype == checkpoint.raw_dtype(name) == "F32"
            np.testing.assert_array_equal(checkpoint.rows(name, 0, len(value)), value, strict=True)
            np.testing.assert_array_equal(checkpoint.rows(name, len(value) // 2, len(value)), value[len(value) // 2 :])


def test_hashes_cover_every_file_that_is_read() -> None:
    with Checkpoint.open(SHARDED) as checkpoint:
        hashes = checkpoint.file_hashes()
    names = [
        "config.json",
        *(f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert hashes == {name: hashlib.sha256((SHARDED / name).read_bytes()).hexdigest() for name in names}
    assert list(hashes) == names


def test_opening_safetensors_does_not_import_torch() -> None:
    code = (
        "import sys; from moiie_export.checkpoint import Checkpoint; c = Checkpoint.open(sys.argv[1]);"
        "c.rows('lm_head.weight', 0, 2); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(SHARDED)], check=True)


def test_safetensors_win_over_pickles_and_a_single_file_over_shards(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"never read")
    (sharded / "pytorch_model.bin.index.json").write_bytes(b"never read")
    with Checkpoint.open(sharded) as checkpoint:
        assert len(checkpoint.tensors) == 129
    save_tensors(sharded / "model.safetensors", WEIGHTS)
    with Checkpoint.open(str(sharded)) as checkpoint:
        assert set(checkpoint.tensors) == set(WEIGHTS)
        assert set(checkpoint.file_hashes()) == {"config.json", "model.safetensors"}


def test_one_safetensors_file_of_any_name_is_accepted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "siglip.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["lm_head.weight"].file == "siglip.safetensors"
    save_tensors(tmp_path / "other.safetensors", WEIGHTS)
    with pytest.raises(MoiieError, match=r"or one safetensors file, found other.safetensors, siglip.safetensors"):
        Checkpoint.open(tmp_path)


def test_links_to_weights_are_followed(tmp_path: Path) -> None:
    """The download cache of the Hub is a directory of links."""
    blobs = write_checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(blobs / name)
    with Checkpoint.open(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.rows("model.norm.weight", 0, 3), [1, 1, 1])


def test_unknown_tensors_and_rows_after_close_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    for request in (lambda: checkpoint.rows("gone", 0, 1), lambda: checkpoint.raw_dtype("gone")):
        with pytest.raises(MoiieError, match="no tensor 'gone' among 2"):
            request()
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(MoiieError, match="after close"):
        checkpoint.rows("lm_head.weight", 0, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "config.json: no such file"),
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": "' + b" " * (16 << 20) + b'"}', "expected at most 16777216 bytes"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MoiieError, match=reason) as caught:
        Checkpoint.open(tmp_path)
    assert "copy config.json" in str(caught.value.hint)


def test_a_truncated_file_and_an_absurd_header_are_refused(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(MoiieError, match=rf"model-00003-of-00004.safetensors: tensor .* found {len(whole) - 1} bytes"):
        Checkpoint.open(sharded)
    shard.write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    with pytest.raises(MoiieError, match=f"model-00003-of-00004.safetensors: the header claims {2**63} bytes"):
        Checkpoint.open(sharded)


def test_missing_shards_are_listed(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    (sharded / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(MoiieError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.message.endswith(
        "2 of 4 shards are missing: model-00002-of-00004.safetensors, model-00004-of-00004.safetensors"
    )
    assert "fetch the missing files" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra.weight": "model-00001-of-00004.safetensors"}, "model-00001.*: tensor 'extra.weight' is missing"),
        ({"model.embed_tokens.weight": None}, "model-00001.*: tensor 'model.embed_tokens.weight': .* does not name it"),
        ({"lm_head.weight": None}, "names 3 shards, but model-00004-of-00004.safetensors lie beside them"),
        (
            {"model.norm.weight": "model-00001-of-00004.safetensors"},
            "model-00001.*: tensor 'model.norm.weight' is missing",
        ),
        (
            {"lm_head.weight": "../model-00004-of-00004.safetensors"},
            "'lm_head.weight': expected a .safetensors file in",
        ),
        ({"lm_head.weight": "/etc/passwd.safetensors"}, "found '/etc/passwd.safetensors'"),
        ({"lm_head.weight": "a\\..\\b.safetensors"}, "expected a .safetensors file in"),
        ({"lm_head.weight": "C:x.safetensors"}, "expected a .safetensors file in"),
        (
            {"lm_head.weight": "pytorch_model.bin"},
            "expected a .safetensors file in this directory, found 'pytorch_model.bin'",
        ),
        ({"lm_head.weight": ""}, "expected a .safetensors file in"),
        ({"lm_head.weight": 4}, "expected a .safetensors file in this directory, found 4"),
        ({"lm_head.weight": ["x"]}, "expected a .safetensors file in"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(sharded: Path, change: dict[str, Any], reason: str) -> None:
    edit_index(sharded, **change)
    with pytest.raises(MoiieError, match=reason):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00004-of-00004.safetensors"
    save_tensors(shard, {**load_file(shard), "model.layers.0.input_layernorm.weight": np.ones(1, np.float32)})
    with pytest.raises(MoiieError, match=r"model-00004.* says it is in model-00001-of-00004.safetensors"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "index", [b"{}", b'{"weight_map": {}}', b'{"weight_map": ["a"]}', b"not json", b'{"weight_map": 1}']
)
def test_a_wrong_index_is_refused(sharded: Path, index: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(MoiieError, match=r"model.safetensors.index.json: (weight_map: expected|not valid JSON)"):
        Checkpoint.open(sharded)


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(MoiieError, match=r"found 4 shards \(model-00001-of-00004.safetensors, ...\) but no model.safe"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("files", "reason", "hint"),
    [
        ([], "no weights: .* found an empty directory", "save_pretrained"),
        (["README.md", "config.json"], "no weights: .* found README.md, config.json", "save_pretrained"),
        (["config.json", "zero_to_fp32.py", "latest"], "no weights", "zero_to_fp32.py . DIR"),
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter without its base model", "merge"),
        (["adapter_model.bin", "config.json"], "a LoRA adapter .*: found adapter_model.bin", "merge"),
        (["config.json", "non_lora_trainables.bin"], "a LoRA adapter .*: found non_lora_trainables.bin", "merge"),
        (["model.safetensors", "adapter_model.safetensors"], "both model.safetensors and adapter_model.safe", "merge"),
        (["config.json", "mm_projector.bin"], "a projector without a model: found only mm_projector.bin", "stage 1"),
    ],
)
def test_directories_without_a_whole_model_are_named(tmp_path: Path, files: list[str], reason: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(MoiieError, match=reason) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (["model.mm_projector.0.weight", "model.mm_projector.0.bias"], "found 2 tensors, all mm_projector"),
        (["base_model.model.lm_head.weight"], "not merged: found tensor 'base_model.model.lm_head.weight'"),
        (["lm_head.weight", "model.q_proj.lora_A.weight"], "not merged: found tensor 'model.q_proj.lora_A.weight'"),
    ],
)
def test_weights_that_are_not_a_whole_model_are_named(tmp_path: Path, tensors: list[str], reason: str) -> None:
    write_checkpoint(tmp_path, **dict.fromkeys(tensors, np.ones(1, np.float32)))
    with pytest.raises(MoiieError, match=reason):
        Checkpoint.open(tmp_path)


def test_weights_without_tensors_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {})
    with pytest.raises(MoiieError, match="the weights hold no tensor"):
        Checkpoint.open(tmp_path)


def test_what_is_not_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoiieError, match="org/model-7b: no such directory") as caught:
        Checkpoint.open("org/model-7b")
    assert "checkpoints are local directories" in str(caught.value.hint)
    assert "hf download org/model-7b --local-dir DIR" in str(caught.value.hint)
    with pytest.raises(MoiieError, match="no such directory") as caught:
        Checkpoint.open(tmp_path / "none")
    assert caught.value.hint == "check the path"
    write_checkpoint(tmp_path)
    with pytest.raises(MoiieError, match="expected a checkpoint directory, found a file") as caught:
        Checkpoint.open(tmp_path / "model.safetensors")
    assert caught.value.hint == f"give {tmp_path}"


def test_every_dtype_is_named_and_only_floats_have_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with TensorWriter(
        tmp_path / "model.safetensors", {"b": ("BF16", (2, 2)), "ids": ("I64", (1, 4)), "s": ("F32", ())}
    ) as writer:
        writer.write(np.array([[0x3F80, 0x4000], [0xC000, 0]], np.uint16))
        writer.write(np.arange(4)[None])
        writer.write(np.array(3, np.float32))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [checkpoint.raw_dtype(name) for name in checkpoint.tensors] == ["BF16", "I64", "F32"]
        np.testing.assert_array_equal(checkpoint.rows("b", 0, 2), np.array([[1, 2], [-2, 0]], np.float32), strict=True)
        np.testing.assert_array_equal(checkpoint.rows("s", 0, 1), np.array([3], np.float32), strict=True)
        with pytest.raises(MoiieError, match="'ids': expected F64, F32, F16, BF16, found I64"):
            checkpoint.rows("ids", 0, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named_by_file_tensor_and_row(tmp_path: Path, value: float) -> None:
    weight = np.ones((6, 3), np.float32)
    weight[4, 1] = weight[5, 0] = value
    write_checkpoint(tmp_path, **{"lm_head.weight": weight})
    with Checkpoint.open(tmp_path) as checkpoint:
        entry = checkpoint.tensors["lm_head.weight"]
        check_finite(checkpoint.rows(entry.name, 0, 4), entry.name, entry.file)
        with pytest.raises(MoiieError) as caught:
            check_finite(checkpoint.rows(entry.name, 3, 6), entry.name, entry.file, first_row=3)
    assert caught.value.message == (
        f"model.safetensors: tensor 'lm_head.weight', row 4: expected finite weights, found {np.float32(value)}"
        " (2 such numbers in rows 3 to 5)"
    )


def test_check_finite_takes_scalars_vectors_and_empty_blocks() -> None:
    check_finite(np.float32(1).reshape(()), "t", "f")
    check_finite(np.zeros((0, 4), np.float32), "t", "f")
    with pytest.raises(MoiieError, match="row 0: expected finite weights, found nan"):
        check_finite(np.array(np.nan), "t", "f")
    with pytest.raises(MoiieError, match="row 12: expected finite weights, found inf"):
        check_finite(np.array([1, 1, np.inf]), "t", "f", first_row=10)
