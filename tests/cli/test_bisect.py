"""`moiie parity --bisect` and `--polygraphy`: exit codes, what they refuse, what they leave for Polygraphy."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from polygraphy.comparator import RunResults, SimpleCompareFunc
from polygraphy.json import load_json

from moiie_export.builders import BuildRequest, build
from moiie_export.cli import sources
from moiie_export.parity import comparator
from moiie_export.targets import find_target
from tests.cli.conftest import Moiie
from tests.exports import SMALLEST, exported
from tests.moiie_export.test_bundle_readme import polygraphy

BAD = "SimplifiedLayerNormalization"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("bisect") / "bundle"))
    for target in ("cpu", "ort-cuda"):
        build(BuildRequest(copy, find_target(target)), lambda *_: None)
    return copy


@pytest.fixture(scope="module")
def damaged(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine `cpu` has a bad node."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("damaged") / "bundle"))
    path = copy / "engines" / "cpu" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == BAD)
    next(each for each in node.attribute if each.name == "epsilon").f = 9.0
    onnx.save(model, path)
    return copy


def test_a_healthy_engine_exits_0(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    result = moiie("parity", bundle, "--bisect", "--target", "cpu")
    assert result.code == 0, result.err
    assert "decoder_prefill" in result.out
    folder = tmp_path / "differences"
    result = moiie("parity", bundle, "--bisect", "--target", "cpu", "--json", "--save", folder)
    document = result.document
    assert (document["differences"], document["commands"], document["bounds"]) == ([], [], "float32")
    assert set(document["compared"]) == {"vision_encoder", "decoder_prefill", "decoder_decode"}
    assert list(tmp_path.iterdir()) == [], "nothing differs"
    assert f"nothing was written to {folder}" in result.err


def test_a_bad_node_exits_3_and_is_named(moiie: Moiie, damaged: Path) -> None:
    result = moiie("parity", damaged, "--bisect", "--target", "cpu", "--json")
    assert result.code == 3
    (found,) = result.document["differences"]
    assert (found["component"], found["op"]) == ("decoder_decode", BAD)
    assert f"the first bad node is {found['node']} ({BAD})" in result.error
    assert "moiie build" in result.hint, "the node jumps; rounding does not"


@pytest.mark.parametrize("exact", [True, False])
def test_polygraphy_is_the_judge(
    moiie: Moiie, bundle: Path, damaged: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A healthy engine fails a comparator that allows no rounding; a damaged one passes one that allows everything."""
    allowed = {"atol": 0.0 if exact else np.inf}
    monkeypatch.setattr(comparator, "SimpleCompareFunc", lambda **options: SimpleCompareFunc(**{**options, **allowed}))
    result = moiie("parity", bundle if exact else damaged, "--bisect", "--target", "cpu")
    assert result.code == (3 if exact else 0), result.err


def test_what_differs_is_left_for_polygraphy(
    moiie: Moiie, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    result = moiie("parity", damaged, "--bisect", "--target", "cpu", "--save", folder)
    assert result.code == 3
    show, run, cut = (shlex.split(line) for line in result.out.splitlines()[-3:])
    sides = [RunResults.load(str(folder / f"decoder_decode-{side}.json")) for side in ("portable", "engine")]
    (_, (wanted,)), (_, (found,)) = (next(iter(side.items())) for side in sides)
    *right, bad = wanted
    assert [*wanted] == [*found]
    assert f"{bad} is off by" in result.error
    assert right
    assert all(np.allclose(wanted[name], found[name], atol=2e-4) for name in right)
    assert not np.allclose(wanted[bad], found[bad], atol=2e-4)
    assert '"runtime": null' in (folder / "decoder_decode-engine.json").read_text("utf-8"), "the same every time"
    (feeds,) = load_json(str(folder / "decoder_decode-inputs.json"))
    assert feeds["past_lengths"].dtype == np.int64

    capfd.readouterr()
    assert polygraphy(show[1:], monkeypatch) == 0
    assert f"{bad} [dtype=float32" in capfd.readouterr().out
    assert polygraphy(run[1:], monkeypatch) == 1, "the engine differs"
    assert "Passed: 0/1 iterations" in capfd.readouterr().out
    portable = [each.replace("-engine.json", "-portable.json") for each in run]
    assert polygraphy(portable[1:], monkeypatch) == 0, "the bundle's graph does what it did"
    assert polygraphy(cut[1:], monkeypatch) == 0
    assert [value.name for value in onnx.load(folder / "decoder_decode.onnx").graph.output] == [bad]


@pytest.mark.parametrize("name", ["taken", "file/below", "bundle/within"])
def test_where_nothing_may_be_written_is_said_before_anything_runs(
    moiie: Moiie, bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "bundle").symlink_to(bundle)
    monkeypatch.setattr("moiie_export.parity.bisect.bisect", None)
    result = moiie("parity", bundle, "--bisect", "--target", "cpu", "--save", tmp_path / name)
    assert result.code == 1
    assert str((tmp_path / name).parent) in result.error
    assert "--save" in result.hint
    assert {each.name for each in tmp_path.iterdir()} == {"taken", "file", "bundle"}
    assert [each.name for each in (tmp_path / "taken").iterdir()] == ["mine"]


def test_without_polygraphy_nothing_begins(moiie: Moiie, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sources.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == "polygraphy" else real(name))
    monkeypatch.setattr("moiie_export.cli.bisect._bisect", None)
    result = moiie("parity", bundle, "--bisect", "--target", "cpu")
    assert result.code == 4
    assert "polygraphy" in result.error
    assert "pip install 'moiie-export[polygraphy]'" in result.hint


@pytest.mark.parametrize(
    ("file", "size", "says", "hint"),
    [
        ("engines/cpu/vision_encoder.onnx", None, "vision_encoder.onnx: is missing", "--target cpu --force"),
        ("engines/cpu/vision_encoder.onnx", 900, "vision_encoder.onnx: is not an ONNX model", "--target cpu --force"),
        ("engines/cpu/weights.safetensors", None, "engine cpu: vision_encoder: ", "--target cpu --force"),
        ("onnx/vision_encoder.onnx", 900, "onnx/vision_encoder.onnx: is not an ONNX model", "--verify"),
        ("onnx/weights.safetensors", None, "portable vision_encoder: ONNX Runtime failed", "--verify"),
    ],
)
def test_damaged_files_are_named(
    moiie: Moiie, bundle: Path, tmp_path: Path, file: str, size: int | None, says: str, hint: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle", copy_function=shutil.copyfile))
    if size is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes((copy / file).read_bytes()[:size])
    result = moiie("parity", copy, "--bisect", "--target", "cpu")
    assert result.code in (1, 3)
    assert says in result.error
    assert hint in result.hint


@pytest.mark.parametrize("target", ["ort-cuda", "orin"])
def test_an_engine_for_a_gpu_says_what_is_missing(moiie: Moiie, bundle: Path, tmp_path: Path, target: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    if target == "orin":  # an engine that was built on the device
        folder = Path(shutil.copytree(copy / "engines" / "ort-cuda", copy / "engines" / "orin"))
        document = json.loads((folder / "engine.json").read_text("utf-8"))
        document |= {"backend": "tensorrt", "target": "orin", "needs": {"tensorrt": "10.3.0"}, "sms": [87]}
        (folder / "engine.json").write_text(json.dumps(document), "utf-8")
    for arguments in (["--bisect"], ["--checkpoint", exported(SMALLEST).checkpoint]):
        result = moiie("parity", copy, *arguments, "--target", target)
        assert result.code == 4, result.err
        assert "hint:" in result.err
    assert moiie("run", copy, "--target", target, "-p", "x").code == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bisect"], "--bisect goes with --target"),
        (["--bisect", "--target", "cpu", "--report", "x.html"], "made-up inputs: leave --report out"),
        (["--bisect", "--target", "cpu", "--ranges"], "made-up inputs: leave --ranges out"),
        (["--save", "x", "--checkpoint", "CHECKPOINT"], "--save goes with --bisect"),
        (
            ["--ranges", "--target", "cpu", "--checkpoint", "CHECKPOINT"],
            "--ranges compares nothing: leave --target out",
        ),
        (["--polygraphy", "--recipe", "x", "--checkpoint", "CHECKPOINT"], "made-up inputs: leave --recipe out"),
        ([], "missing option '--checkpoint'"),
        (["--polygraphy", "--checkpoint", "CHECKPOINT", "--report", "x.html"], "--polygraphy makes no report"),
    ],
)
def test_options_that_go_together(moiie: Moiie, bundle: Path, arguments: list[str], says: str) -> None:
    checkpoint = str(exported(SMALLEST).checkpoint)
    result = moiie("parity", bundle, *[checkpoint if each == "CHECKPOINT" else each for each in arguments])
    assert result.code == 2
    assert says in result.err


def test_the_bundles_own_graphs_are_no_target(moiie: Moiie, bundle: Path) -> None:
    result = moiie("parity", bundle, "--bisect", "--target", "portable")
    assert result.code == 1
    assert "what it compares with" in result.error


def test_polygraphy_gives_a_verdict(moiie: Moiie, bundle: Path) -> None:
    result = moiie("parity", bundle, "--checkpoint", exported(SMALLEST).checkpoint, "--polygraphy")
    assert result.code == 0, result.err
    assert "logits" in result.out
