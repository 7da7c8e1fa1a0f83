"""`moiie inspect`: the summary, and that every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moiie_export.builders import BuildRequest, build
from moiie_export.targets import find_target
from tests.cli.conftest import Moiie
from tests.runtime.backends.engine_bundle import build as build_emulated
from tests.runtime.backends.engine_bundle import edit


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(golden_bundle("moiie_phi3"), tmp_path / "b"))


def test_summary_for_people(moiie: Moiie, bundle: Path) -> None:
    result = moiie("inspect", bundle)
    assert (result.code, result.err) == (0, "")
    assert "4, top 2, in layers 1 3 (language: 1 2 3; vision: 0 1 2)" in result.out
    assert "past_key_values.{0..3}.key" in result.out
    assert "moiie::ExpertDispatch 2" in result.out
    assert "unreachable" in result.out


def test_json_counts_agree_with_the_manifest_and_the_weights(moiie: Moiie, bundle: Path) -> None:
    document = moiie("inspect", bundle, "--json").document
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert list(document["components"]) == ["vision_encoder", "decoder_prefill", "decoder_decode"]
    weights = document["weights"]
    stored = (bundle / "onnx" / "weights.safetensors").stat().st_size
    assert 0 <= stored - weights["bytes"] < 50_000
    assert sum(each["bytes"] for each in weights["by_dtype"].values()) == weights["bytes"]
    assert weights["by_component"]["decoder_decode"]["bytes"] < weights["by_component"]["decoder_prefill"]["bytes"]
    assert document["completeness"]["unreachable"] == manifest["completeness"]["unreachable"]
    assert document["completeness"]["used"] == len(manifest["completeness"]["tensors"])
    assert (document["verified"], document["problems"]) == (False, [])


def test_verify_passes_a_sound_bundle(moiie: Moiie, bundle: Path) -> None:
    result = moiie("inspect", bundle, "--verify")
    assert (result.code, result.err) == (0, "all 12 files are as bundle.json says\n")
    assert moiie("inspect", bundle, "--verify", "--json").document["verified"] is True


@pytest.mark.parametrize(
    "name", ["onnx/weights.safetensors", "onnx/decoder_decode.onnx", "tokenizer.json", "config.json"]
)
def test_verify_finds_one_flipped_byte(moiie: Moiie, bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    result = moiie("inspect", bundle, "--verify")
    assert (result.code, result.out) == (3, "")
    assert f"  {name}: sha256 is " in result.error
    document = moiie("inspect", bundle, "--verify", "--json").document
    assert document["verified"] is False
    assert len(document["problems"]) == 1


def test_verify_names_every_file(moiie: Moiie, bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "onnx" / "vision_encoder.onnx").write_bytes(b"short")
    result = moiie("inspect", bundle, "--verify")
    assert result.code == 3
    assert "tokenizer.json: is missing" in result.error
    assert "onnx/vision_encoder.onnx: has 5 bytes" in result.error


def test_damaged_weights_without_verify_are_an_error_not_a_traceback(moiie: Moiie, bundle: Path) -> None:
    (bundle / "onnx" / "weights.safetensors").write_bytes(b"\xff" * 100)
    result = moiie("inspect", bundle)
    assert (result.code, result.out) == (1, "")
    assert "weights.safetensors" in result.error


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"files": {"../x": {"sha256": "0", "bytes": 1}}},
        {"components": {}},
        {"completeness": []},
        {"created_by": 3},
        {"source": [1]},
    ],
    ids=str,
)
def test_an_edited_manifest_never_ends_in_the_unforeseen(moiie: Moiie, bundle: Path, change: dict[str, object]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    (bundle / "bundle.json").write_text(json.dumps(manifest | change), encoding="utf-8")
    result = moiie("inspect", bundle)
    assert result.code in (0, 1)
    assert "unforeseen" not in result.err


def test_it_needs_no_backend_and_no_torch(bundle: Path) -> None:
    block = "import sys\nfor m in ('torch', 'onnx', 'onnxruntime', 'transformers'): sys.modules[m] = None\n"
    code = f"{block}from moiie_export.cli import main; main(['inspect', {str(bundle)!r}, '--verify'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "all 12 files are as bundle.json says\n")


@pytest.fixture(scope="module")
def engines(golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a form for a GPU and one for ONNX Runtime."""
    copy = Path(shutil.copytree(golden_bundle("moiie_phi3"), tmp_path_factory.mktemp("inspect") / "b"))
    build_emulated(copy, "rtx", {"prefill": (64,)})
    build(BuildRequest(copy, find_target("ort-cuda")), lambda *_: None)
    return copy


@pytest.fixture
def built(engines: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(engines, tmp_path / "b"))


def test_built_forms_are_listed(moiie: Moiie, engines: Path, bundle: Path) -> None:
    result = moiie("inspect", engines)
    assert result.code == 0
    [rtx] = [line for line in result.out.splitlines() if line.startswith("  rtx ")]
    assert "tensorrt_rtx 1.7.1.116 for SM 86, 89, 120" in rtx
    document = moiie("inspect", engines, "--json").document["engines"]
    assert {name: each["backend"] for name, each in document.items()} == {
        "ort-cuda": "onnxruntime_cuda",
        "rtx": "tensorrt_rtx",
    }
    assert document["rtx"]["bytes"] == sum(document["rtx"]["files"].values())
    assert f"engines: none; `moiie build {bundle} --target NAME` makes one" in moiie("inspect", bundle).out


def test_verify_reads_built_forms_too(moiie: Moiie, engines: Path) -> None:
    (engines / "engines" / "rtx" / "decoder_decode.kernels").write_bytes(b"compiled here")  # no business of ours
    result = moiie("inspect", engines, "--verify")
    assert result.code == 0
    assert "all 4 files of engines/rtx are as engine.json says" in result.err
    assert "files of engines/ort-cuda are as engine.json says" in result.err
    assert moiie("inspect", engines, "--verify", "--json").document["verified"] is True


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("decoder_decode.engine", lambda data: data[:-1] + b"!", "sha256 is "),
        ("banks.safetensors", lambda data: data[:-1], "bytes, engine.json says"),
        ("vision_encoder.engine", None, "is missing"),
        ("libmoiie_plugins.so", lambda _: b"another", "is not listed in engine.json"),
        ("engine.json", lambda data: data[:-9], "engine.json"),
        ("engine.json", lambda _: b'{"schema": 1, "files": 3}', "'files' must be an object"),
        ("engine.json", lambda data: data.replace(b'"backend"', b'"front"'), "'backend' is missing"),
        ("engine.json", lambda data: data.replace(b"tensorrt_rtx", b"foo"), "no backend is called 'foo'"),
        ("engine.json", lambda data: data.replace(b'"int64"', b'"int65"'), "dtype' must be"),
    ],
)
def test_verify_finds_what_is_wrong_with_a_built_form(
    moiie: Moiie, built: Path, name: str, harm: Callable[[bytes], bytes] | None, says: str
) -> None:
    path = built / "engines" / "rtx" / name
    data = path.read_bytes() if path.exists() else b""
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(data))
    result = moiie("inspect", built, "--verify")
    assert (result.code, result.out) == (3, "")
    assert result.error.startswith("1 engine is not as built from this bundle\n  ")
    assert says in result.error
    assert f"moiie build {built} --target rtx --force" in result.hint
    checked = moiie("inspect", built, "--verify", "--json")
    assert (checked.code, checked.document["verified"], checked.document["problems"]) == (3, False, [])
    assert says in checked.document["engines"]["rtx"]["problems"][0]
    assert not checked.document["engines"]["ort-cuda"]["problems"]


def test_the_command_makes_the_same_form_again(moiie: Moiie, built: Path) -> None:
    """One with plugins, for a target of a recipe that the bundle does not hold."""
    edit(built, "rtx", plugins={"file": None, "embedded": True}, options={"recipe": "r.yaml", "sm": [89]})
    (built / "engines" / "rtx" / "decoder_decode.engine").write_bytes(b"!")
    again = f"moiie build {built} --target rtx --recipe r.yaml --sm 89 --plugins LIBRARY"
    assert moiie("inspect", built, "--verify").hint == f"build again: {again} --force"
    assert f"build it again: {again} --force\n" in moiie("inspect", built).out
    edit(built, "rtx", schema=True)
    assert moiie("run", built, "--target", "rtx", "-p", "x").hint == f"build it again: {again} --force"
    edit(built, "rtx", schema=1, source={})
    assert moiie("run", built, "--target", "rtx", "-p", "x").hint == f"build it again: {again} --force"


def test_a_form_of_another_export_is_named(moiie: Moiie, built: Path) -> None:
    path = built / "engines" / "ort-cuda" / "engine.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["source"]["onnx/weights.safetensors"] = "0" * 64
    path.write_text(json.dumps(document), encoding="utf-8")
    shown = moiie("inspect", built)
    assert shown.code == 0
    wrong = "ort-cuda: was built from another export of this bundle; build it again: moiie build"
    assert wrong in shown.out
    result = moiie("inspect", built, "--verify")
    assert result.code == 3
    assert "engines/ort-cuda: was built from another export of this bundle (onnx/weights.safetensors" in result.error
    assert moiie("inspect", built, "--json").document["engines"]["ort-cuda"]["stale"] is True
