"""What a bundle asks of a target is refused before anything is built, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moiie_export.builders import BuildRequest
from moiie_export.builders.command_lines import command_lines
from moiie_export.builders.engine_specs import EngineSpec, Profile
from moiie_export.builders.requirements import check_formats, check_sms, plugin_library
from moiie_export.builders.shared_library import library_problem
from moiie_export.builders.tensorrt import _with_plugins
from moiie_export.check.model_ops import OpUse
from moiie_export.check.support import MAX_PLUGIN_HEAD_DIM, PLUGIN_PTX, PLUGIN_SMS, judge
from moiie_export.targets import BUILT_IN
from moiie_plugins.build import SMS
from moiie_plugins.compile import fallback_sm
from moiie_runtime.backends import gpu_info
from moiie_runtime.backends.gpu_info import runs_kernels
from moiie_runtime.errors import MissingDependency
from moiie_runtime.strict_files import sha256_file
from tests.conftest import ROOT
from tests.shared_library import write_shared_library

RTX, ORIN, SERVER = (BUILT_IN[name] for name in ("rtx", "orin", "server"))


def bundle(**quantization: str) -> Any:
    """As far as it matters: a mixture of experts with weights stored like this; `experts` stands for one of theirs."""
    names = {"experts": "decoder.layers.1.mlp.experts.0.gate_up_proj.weight"}
    stored = {names.get(key, key): form for key, form in quantization.items()}
    return SimpleNamespace(quantization=stored, model=SimpleNamespace(moe=object()), components={})


@pytest.mark.parametrize(("target", "sm"), [(RTX, 75), (RTX, 87), (ORIN, 99), (SERVER, 87)], ids=str)
def test_gpus_that_a_library_does_not_build_for(target: Any, sm: int) -> None:
    check_sms(target)
    with pytest.raises(MissingDependency, match=f"does not build for SM {sm} .it does for") as caught:
        check_sms(replace(target, sms=(*target.sms, sm)))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_quantised_experts_need_no_plugins(form: Any) -> None:
    """A build takes what `moiie check` says that it takes; only GPUs without the arithmetic are refused, by both."""
    use = OpUse("experts", "language experts", (("experts", 300), ("top_k", 2)), form, 0 if form == "fp8" else 32)
    for plugins in ("optional", "off"):
        for banks in ("inputs", "constants"):
            target = replace(RTX, sms=(89, 120), plugins=plugins, banks=banks)  # type: ignore[arg-type]
            row = judge(use, target)
            assert (row.supported, row.lowering) == (True, "dense body"), row.reason
            assert row.reason.startswith("every expert for every token: right, and slow")
            assert ("--plugins" in row.reason) == (plugins == "optional")
            assert ("a layer at a time is multiplied out" in row.reason) == ((form, banks) != ("int4", "constants"))
            check_formats(bundle(experts=form), target)
            older = replace(target, sms=(86, 89))
            assert judge(use, older).supported == (form != "fp8")
            if form == "fp8":
                with pytest.raises(MissingDependency, match="need SM 89 or above, not SM 86"):
                    check_formats(bundle(experts=form), older)


def test_experts_have_no_form_that_rounds_activations() -> None:
    use = OpUse("experts", "language experts", (("experts", 4), ("top_k", 2)), "w8a8")
    for plugins in ("required", "optional", "off"):
        row = judge(use, replace(RTX, plugins=plugins))  # type: ignore[arg-type]
        assert not row.supported
        assert "w8a8" in row.reason


def test_a_library_that_is_given_is_used(tmp_path: Path) -> None:
    library = tmp_path / "libmoiie_plugins.so"
    asked = BuildRequest(tmp_path, RTX, plugin_library=library)
    assert _with_plugins(asked).target == replace(RTX, plugins="required")
    for unchanged in (replace(asked, plugin_library=None), replace(asked, target=replace(RTX, plugins="off"))):
        assert _with_plugins(unchanged) == unchanged


def write_library(folder: Path, about: Any) -> Path:
    library = folder / "libmoiie_plugins.so"
    write_shared_library(library)
    if isinstance(about, dict):
        about = json.dumps({"library": {"sha256": sha256_file(library)}, **about})
    library.with_suffix(".json").write_text(about)
    return library


def test_a_library_without_kernels_for_the_gpu(tmp_path: Path) -> None:
    library = write_library(tmp_path, {"sms": [87, 89], "ptx_isa": {"87": ["8.0"], "89": ["8.0"], "89 ptx": ["8.0"]}})
    for sm, found in ((87, True), (89, True), (120, True), (86, False), (80, False)):
        request = BuildRequest(tmp_path, replace(RTX, sms=(89, sm), plugins="required"), plugin_library=library)
        if found:
            assert plugin_library(request, bundle()) == library
            continue
        with pytest.raises(MissingDependency, match=rf"holds kernels for SM 87, 89, target rtx wants {sm}") as caught:
            plugin_library(request, bundle())
        assert caught.value.hint == f"moiie plugins build --sm {','.join(map(str, sorted((sm, 87, 89))))}"


@pytest.mark.parametrize(
    "about",
    [
        *("", "[]", "{}", {"sms": 3, "ptx_isa": {}}, {"sms": ["x"], "ptx_isa": {}}),
        {"sms": [87], "ptx_isa": {}, "library": {"sha256": "of another"}},
    ],
    ids=str,
)
def test_of_a_library_without_a_description_nothing_is_said(tmp_path: Path, about: Any) -> None:
    library = write_library(tmp_path, about)
    request = BuildRequest(tmp_path, replace(RTX, plugins="required"), plugin_library=library)
    assert plugin_library(request, bundle()) == library


def test_a_library_that_is_not_the_one_its_description_speaks_of(tmp_path: Path) -> None:
    """Damaged after it was built, or another one in its place: an engine would be built for minutes before that shows."""
    library = write_shared_library(tmp_path / "libmoiie_plugins.so")
    described = {"file": library.name, "sha256": sha256_file(library), "bytes": library.stat().st_size}
    about = {"library": described, "sms": [89], "ptx_isa": {"89": ["8.0"]}}
    library.with_suffix(".json").write_text(json.dumps(about))
    request = BuildRequest(tmp_path, replace(RTX, sms=(89,), plugins="required"), plugin_library=library)
    assert plugin_library(request, bundle()) == library
    whole = library.read_bytes()
    for other in (whole[:-1], whole + b"\0", b""):
        library.write_bytes(other)
        with pytest.raises(MissingDependency, match="is damaged or was exchanged") as caught:
            plugin_library(request, bundle())
        assert str(library) in caught.value.message
        assert "moiie plugins build" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"root:x:0:0:root:/root:/bin/bash\n" * 8, "is no shared library"),
        (lambda data: b"", "is no shared library"),
        (lambda data: data[:40], "ends after 40 bytes"),
        (lambda data: data[:-1], "is incomplete: "),
        (lambda data: data[:4] + b"\x01" + data[5:], "is no shared library for Linux on a processor of 64 bits"),
        (lambda data: data.replace(b"getCreators", b"otherThings"), "exports no getCreators"),
    ],
    ids=["text", "empty", "header", "short", "32 bits", "another"],
)
def test_a_file_that_is_no_plugin_library(tmp_path: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    """Read, not loaded: a dry run says so, too."""
    library = write_shared_library(tmp_path / "libmoiie_plugins.so")
    library.write_bytes(spoil(library.read_bytes()))
    request = BuildRequest(tmp_path, replace(RTX, plugins="required"), plugin_library=library)
    with pytest.raises(MissingDependency, match=says) as caught:
        plugin_library(request, bundle())
    assert caught.value.hint == "moiie plugins build"


def test_damage_to_a_library_ends_in_a_sentence(tmp_path: Path) -> None:
    library = write_shared_library(tmp_path / "libmoiie_plugins.so")
    whole = library.read_bytes()
    for place in range(len(whole)):
        for value in (0x00, 0x7F, 0xFF):
            library.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            assert (library_problem(library, "getCreators") or "is").split()[0] in ("is", "ends", "exports")


def test_kernels_of_a_generation_and_portable_ones() -> None:
    cases: Mapping[tuple[int, tuple[int, ...], tuple[int, ...]], bool] = {
        (86, (80,), ()): True,
        (80, (86,), ()): False,
        (90, (89,), ()): False,
        (90, (), (89,)): True,
        (86, (), (89,)): False,
        (87, (80, 86), ()): False,  # a system on a chip
        (87, (87,), ()): True,
        (89, (87,), ()): False,
        (103, (100,), ()): False,  # compiled for exactly one
        (103, (100,), (89,)): True,
        (110, (110,), ()): True,
    }
    for (sm, compiled, portable), wanted in cases.items():
        assert runs_kernels(sm, compiled, portable) is wanted


def test_the_library_chooses_its_kernels_by_the_same_rule() -> None:
    """The constants in C++; its choice itself is tested there."""
    source = (ROOT / "plugins" / "src" / "launch_table.cpp").read_text(encoding="utf-8")
    assert f"kFirstExactSm = {gpu_info.FIRST_EXACT};" in source
    listed = " || ".join(f"sm == {sm}" for sm in sorted(gpu_info.EMBEDDED))
    assert f"bool is_embedded(int32_t sm) {{ return {listed}; }}" in source
    assert set(SMS) == PLUGIN_SMS
    assert {fallback_sm(SMS)} == PLUGIN_PTX


def test_command_lines_say_what_the_builder_does() -> None:
    spec = EngineSpec("decoder_decode", (Profile("decode", {}),), 0, 0)
    model = SimpleNamespace(
        model=SimpleNamespace(moe=object()), components={"decoder_decode": SimpleNamespace(inputs={})}
    )
    (line,) = command_lines(model, ORIN, [spec])  # type: ignore[arg-type]
    assert set(line.split()[1:]) == {
        "--onnx=graphs/decoder_decode.onnx",
        "--saveEngine=decoder_decode.engine",
        "--stronglyTyped",
        "--timingCacheFile=timing.cache",
        "--dynamicPlugins=libmoiie_plugins.so",
        "--setPluginsToSerialize=libmoiie_plugins.so",
        "--preview=+aliasedPluginIO1003",
    }
    (plain,) = command_lines(model, RTX, [spec])  # type: ignore[arg-type]
    assert "polygraphy convert graphs/decoder_decode.onnx" in plain
    (none,) = command_lines(model, replace(RTX, plugins="required"), [spec])  # type: ignore[arg-type]
    assert none.startswith("# decoder_decode: ")


def test_check_knows_the_plugins_largest_head() -> None:
    source = (ROOT / "plugins" / "src" / "ops" / "decode_attention.cpp").read_text(encoding="utf-8")
    assert f"kLargestHeadSize = {MAX_PLUGIN_HEAD_DIM};" in source
    for size, fits in ((64, True), (MAX_PLUGIN_HEAD_DIM, True), (192, False)):
        shape = (("head_dim", size), ("heads", 8), ("kv_heads", 8), ("capacity", 64), ("window", 0))
        row = judge(OpUse("decode_attention", "decoder", shape), ORIN)
        assert row.supported is fits
        assert fits or str(size) in row.reason
