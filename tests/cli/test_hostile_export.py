"""`moiie export` of what is broken, or to where it cannot be written: one clear error, and nothing that looks finished."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, save_tensors
from tests.cli.conftest import Moiie
from tests.conftest import ROOT
from tests.exports import SMALLEST
from tests.synthetic import write_checkpoint

EXPERT = "model.layers.0.mlp.experts.2.gate_up_proj.weight"
Spoil = Callable[[Path], object]


def _spoil_tensor(name: str, value: float) -> Spoil:
    def spoil(checkpoint: Path) -> None:
        with TensorFile(checkpoint / "model.safetensors") as file:
            tensors = {each: np.array(file[each]) for each in file}
        tensors[name].reshape(-1)[-1] = value
        save_tensors(checkpoint / "model.safetensors", tensors)

    return spoil


def _cut(name: str) -> Spoil:
    def cut(checkpoint: Path) -> None:
        os.truncate(checkpoint / name, (checkpoint / name).stat().st_size - 1)

    return cut


def _write(name: str, content: bytes) -> Spoil:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def _long_header(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def _shards_without_one(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_checkpoint(checkpoint, **SMALLEST, dtype="F32", shard_bytes=40_000)
    sorted(checkpoint.glob("model-00002-of-*"))[0].unlink()


def _config(**changes: object) -> Spoil:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


def _tower_cut(checkpoint: Path) -> None:
    _cut("model.safetensors")(next((checkpoint.parent / "vision_tower").iterdir()))


def _empty(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


BROKEN: dict[str, tuple[Spoil, str]] = {
    "truncated safetensors": (_cut("model.safetensors"), "model.safetensors"),
    "header length 2^63": (_long_header, "model.safetensors"),
    "no bytes": (_write("model.safetensors", b""), "model.safetensors"),
    "git-lfs pointer": (
        _write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors",
    ),
    "missing shard": (_shards_without_one, "model-00002-of-"),
    "NaN": (_spoil_tensor(EXPERT, float("nan")), f"{EXPERT}', row 95: expected finite weights, found nan"),
    "infinity": (_spoil_tensor(EXPERT, float("-inf")), f"{EXPERT}', row 95: expected finite weights, found -inf"),
    "NaN in the tower": (_spoil_tensor("model.mm_projector.0.bias", float("nan")), "model.mm_projector.0.bias"),
    "truncated tower": (_tower_cut, "vision_tower/siglip-checkpoint/model.safetensors"),
    "config.json is not JSON": (_write("config.json", b"{'a': 1}"), "config.json: not valid JSON"),
    "config.json is a list": (_write("config.json", b"[]"), "config.json: expected a JSON object"),
    "config.json is binary": (_write("config.json", bytes(range(256))), "config.json: not valid JSON"),
    "other sizes": (_config(intermediate_size=64), "experts.0.gate_up_proj.weight: expected shape"),
    "more experts": (_config(num_experts=8), "missing"),
    "rope scaling": (_config(rope_scaling={"type": "longrope"}), "rope_scaling"),
    "unknown model type": (_config(model_type="llava"), "model_type"),
    "broken tokenizer": (_write("tokenizer.json", b"{}"), "tokenizer.json"),
    "empty directory": (_empty, "config.json"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", **SMALLEST, dtype="F32")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint(moiie: Moiie, checkpoint: Path, case: str) -> None:
    spoil, expected = BROKEN[case]
    spoil(checkpoint)
    output = checkpoint.parent / "bundle"
    result = moiie("export", checkpoint, "-o", output)
    _check_refused(result.code, result.out, result.err, output)
    assert expected in result.err
    assert result.hint


def test_a_weight_too_large_for_float16(moiie: Moiie, checkpoint: Path) -> None:
    _spoil_tensor(EXPERT, 1e6)(checkpoint)
    output = checkpoint.parent / "bundle"
    result = moiie("export", checkpoint, "-o", output, "--dtype", "float16")
    _check_refused(result.code, result.out, result.err, output)
    assert "experts" in result.error
    assert "1e+06 does not fit float16" in result.error
    assert result.hint == "export with --dtype float32"


@pytest.mark.parametrize("option", ["--dry-run", "--force"])
def test_a_bundle_that_is_there_stays_when_the_next_export_fails(moiie: Moiie, checkpoint: Path, option: str) -> None:
    """Any bundle: here one of a few bytes, which the export would replace."""
    output = checkpoint.parent / "bundle"
    output.mkdir()
    (output / "bundle.json").write_text('{"stages": {}}', encoding="utf-8")
    _cut("model.safetensors")(checkpoint)
    assert moiie("export", checkpoint, "-o", output, option).code == 1
    assert [path.name for path in output.iterdir()] == ["bundle.json"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle", "checkpoint", "vision_tower"]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("checkpoint", "checkpoint: exists and is not a bundle"),
        ("checkpoint/config.json", "exists and is not a bundle"),
        ("vision_tower", "vision_tower: exists and is not a bundle"),
        (".", "exists and is not a bundle"),
        ("/", "exists and is not a bundle"),
        ("/dev/null", "exists and is not a bundle"),
        ("/dev/null/bundle", "/dev/null is no directory"),
        ("/proc/nowhere/bundle", "cannot be written: No such file or directory"),
        ("checkpoint/config.json/deep/bundle", "config.json is no directory"),
        ("x" * 300, "cannot be written: File name too long"),
        ("bundle.partial", "names ending in .partial mark unfinished work"),
    ],
)
def test_an_output_that_cannot_be(
    moiie: Moiie, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, output: str, expected: str
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    before = _listing(checkpoint.parent)
    result = moiie("export", checkpoint, "-o", output)
    assert (result.code, result.out) == (1, "")
    assert expected in result.error
    assert result.hint
    assert "Traceback" not in result.err
    assert _listing(checkpoint.parent) == before


def test_a_folder_of_that_name_with_partial_is_never_touched(moiie: Moiie, checkpoint: Path) -> None:
    """An export works in OUTPUT.partial, and a checkpoint may be called that."""
    renamed = checkpoint.rename(checkpoint.with_name("model.partial"))
    (checkpoint.parent / "vision_tower" / "siglip-checkpoint").rename(checkpoint.parent / "vision_tower" / "siglip-x")
    before = _listing(checkpoint.parent)
    result = moiie(
        "export",
        renamed,
        "-o",
        checkpoint.parent / "model",
        "--vision-tower",
        checkpoint.parent / "vision_tower/siglip-x",
    )
    assert result.code == 1
    assert "model.partial: exists and is not an unfinished export" in result.error
    assert _listing(checkpoint.parent) == before


def test_an_interrupted_export(moiie: Moiie, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moiie_export.statistics_stage.write_weights", interrupt)
    output = checkpoint.parent / "bundle"
    result = moiie("export", checkpoint, "-o", output)
    assert (result.code, result.err.splitlines()[-1]) == (130, "error: interrupted")
    assert not output.exists()
    refused = moiie("run", output, "-p", "hi")
    assert refused.code == 1
    assert "did not finish" in refused.error
    assert "it resumes" in refused.hint


LIMITED = """
import resource, sys
from moiie_export.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("limit", "file"), [(50_000, "onnx/weights.safetensors.tmp"), (0, "stages.json.tmp")])
def test_a_disk_that_fills_up(checkpoint: Path, limit: int, file: str) -> None:
    """A limit on the size of files fails the same write as a full disk, and later ones too."""
    output = checkpoint.parent / "bundle"
    command = [sys.executable, "-c", LIMITED, str(limit), "export", str(checkpoint), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    _check_refused(done.returncode, done.stdout, done.stderr, output)
    assert f"bundle.partial/{file}: cannot be written: File too large" in done.stderr
    assert "free" in done.stderr.split("hint: ")[1]


def _check_refused(code: int, out: str, err: str, output: Path) -> None:
    assert (code, out) == (1, "")
    assert err.count("error: ") == 1
    assert "hint: " in err
    assert "Traceback" not in err
    assert "unforeseen" not in err
    assert not output.exists()
    assert not output.with_name("bundle.lock").exists()
    partial = output.with_name("bundle.partial")
    for path in (output, partial) if partial.exists() else (output,):
        with pytest.raises(MoiieError, match=r"did not finish|no such bundle"):
            Bundle.open(path)
    if partial.exists():
        assert not (partial / "onnx" / "weights.safetensors").exists()


def _listing(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
