"""`moiie parity --bisect` and `--polygraphy`: exit codes and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from moiie_export.builders import BuildRequest, build
from moiie_export.targets import find_target
from tests.cli.conftest import Moiie
from tests.exports import SMALLEST, exported


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("bisect") / "bundle"))
    for target in ("cpu", "ort-cuda"):
        build(BuildRequest(copy, find_target(target)), lambda *_: None)
    return copy


def test_a_healthy_engine_exits_0(moiie: Moiie, bundle: Path) -> None:
    result = moiie("parity", bundle, "--bisect", "--target", "cpu")
    assert result.code == 0, result.err
    assert "decoder_prefill" in result.out
    document = moiie("parity", bundle, "--bisect", "--target", "cpu", "--json").document
    assert document["differences"] == []
    assert set(document["compared"]) == {"vision_encoder", "decoder_prefill", "decoder_decode"}


def test_a_bad_node_exits_3_and_is_named(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = copy / "engines" / "cpu" / "decoder_decode.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(each for each in model.graph.node if each.op_type == "SimplifiedLayerNormalization")
    next(each for each in node.attribute if each.name == "epsilon").f = 9.0
    onnx.save(model, path)
    result = moiie("parity", copy, "--bisect", "--target", "cpu", "--json")
    assert result.code == 3
    assert f"the first bad node is {node.name} (SimplifiedLayerNormalization)" in result.error
    assert [each["component"] for each in result.document["differences"]] == ["decoder_decode"]


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
