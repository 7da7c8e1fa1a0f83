"""The commands in a bundle's README work on the bundle, in Polygraphy itself."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import onnx
import pytest

from moiie_export.bundle_readme import readme_text
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.bundle import Bundle
from tests.exports import SMALLEST, exported


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("readme") / "bundle"))


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def polygraphy(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool in this process; what it warns of is its own affair."""
    from polygraphy.tools import main

    monkeypatch.setattr(sys, "argv", ["polygraphy", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(main() or 0)
        except SystemExit as ended:
            return int(ended.code or 0)


def test_every_command_works(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    text = (bundle / "README.md").read_text("utf-8")
    tools = set()
    for command in commands(text):
        if command[:2] == ["mkdir", "-p"]:
            Path(command[2]).mkdir(parents=True, exist_ok=True)
            continue
        assert command[0] == "polygraphy"
        assert polygraphy(command[1:], monkeypatch) == 0, command
        tools.add((command[1], *(command[2:3] if command[1] == "surgeon" else [])))
    assert tools == {("inspect",), ("run",), ("surgeon", "sanitize"), ("surgeon", "extract")}
    written = bundle.parent / "polygraphy"
    clean = onnx.load(str(written / "decoder_decode.onnx"), load_external_data=False)
    assert {function.domain for function in clean.functions} == {"moiie"}
    for name, output in (("decoder_decode", "logits"), ("layer", "hidden.0")):
        with OnnxRuntimeSession(written / f"{name}.onnx") as session:
            assert output in session.outputs


def test_polygraphy_notices_a_damaged_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / "onnx" / "weights.safetensors").unlink()
    monkeypatch.chdir(copy)
    command = next(each for each in commands((copy / "README.md").read_text("utf-8")) if "run" in each)
    with pytest.raises(Exception, match="weights.safetensors|PolygraphyException|External data"):
        assert polygraphy(command[1:], monkeypatch) == 0, "weights.safetensors"


def test_it_is_one_of_the_files_that_the_manifest_lists(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.files["README.md"].bytes == (bundle / "README.md").stat().st_size
    assert opened.verify() == []


def test_it_names_no_place_and_no_time() -> None:
    inputs = {"decoder_prefill": [("inputs_embeds", ("batch", "sequence", 32)), ("past_lengths", ("batch",))]}
    text = readme_text("mine", "moiie_phi3", inputs)
    assert text == readme_text("mine", "moiie_phi3", inputs)
    assert text.startswith("# mine\n")
    assert "--input-shapes inputs_embeds:[1,8,32] --val-range past_lengths:[0,0]" in text
