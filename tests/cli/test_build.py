"""`moiie build`: options, plans, sizes, exit codes. Engines themselves: tests/moiie_export/builders."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from moiie_export import builders
from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
from moiie_export.builders.output import describe
from moiie_runtime.build_command import build_command
from moiie_runtime.bundle import Bundle
from tests.exports import SMALLEST, exported

TARGETS = ("cpu", "ort-cuda", "rtx", "orin-nano", "orin-nx", "orin-32", "orin", "thor", "server")


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported(SMALLEST).bundle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BuildRequest]:
    """Requests that reached a builder, which writes nothing."""
    requests: list[BuildRequest] = []

    def build(request: BuildRequest, progress: Any) -> BuildResult:
        requests.append(request)
        progress("engine", 1, 2)
        files = {"a.engine": {"sha256": "0" * 64, "bytes": 2048}, "b.engine": {"sha256": "1" * 64, "bytes": 3 << 20}}
        return BuildResult(request.output, len(requests) > 1, 1.25, files)

    def plan(request: BuildRequest) -> BuildPlan:
        return BuildPlan(False, 3 << 30, 5 << 20, ("trtexec --onnx=x",), ("a note",))

    monkeypatch.setattr(builders, "_function", lambda _, index: (build, plan)[index])
    return requests


def test_every_target_is_named_in_the_help(moiie: Any) -> None:
    result = moiie("build", "--help")
    assert result.code == 0
    assert all(name in result.out for name in TARGETS)


def test_sizes_are_shown_and_the_result_is_on_stdout(moiie: Any, bundle: Path, asked: list[BuildRequest]) -> None:
    result = moiie("build", bundle, "--target", "rtx", "--sm", "89,86")
    assert result.code == 0, result.err
    assert result.out.strip() == str(bundle / "engines" / "rtx")
    assert "predicted peak 3.0 GiB" in result.err
    assert "3.0 MiB  b.engine" in result.err
    assert "built in 1.2 s" in result.err
    assert asked[0].target.sms == (86, 89)
    assert asked[0].memory_limit is None or asked[0].memory_limit > 0
    assert "up to date" in moiie("build", bundle, "-t", "rtx").err


def test_json_is_one_document(moiie: Any, bundle: Path, asked: list[BuildRequest]) -> None:
    result = moiie("build", bundle, "-t", "rtx", "--memory-limit", "4GiB", "--json")
    assert result.document["files"]["a.engine"]["bytes"] == 2048
    assert asked[0].memory_limit == 4 << 30
    planned = moiie("build", bundle, "-t", "rtx", "--dry-run", "--json").document
    assert planned["commands"] == ["trtexec --onnx=x"]
    assert planned["target"]["name"] == "rtx"
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-t", "rtxx"), 1, "did you mean rtx?"),
        (("-t", "rtx", "--sm", "8x"), 2, "is no list of compute capabilities"),
        (("-t", "cpu", "--sm", "87"), 2, "--sm belongs to targets of TensorRT"),
        (("-t", "cpu", "--plugins", "libmoiie_plugins.so"), 2, "--plugins belongs to targets of TensorRT"),
        (("-t", "ort-cuda", "--plugins", "libmoiie_plugins.so"), 2, "one form for all NVIDIA GPUs"),
        ((), 2, "missing option"),
    ],
)
def test_wrong_arguments(moiie: Any, bundle: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = moiie("build", bundle, *arguments)
    assert result.code == code
    assert says in result.err.lower() or says in result.err


def test_a_dry_run_of_tensorrt_prints_its_tools_commands(moiie: Any, bundle: Path) -> None:
    rtx = moiie("build", bundle, "-t", "rtx", "--sm", "8.9", "--dry-run")
    assert rtx.code == 0, rtx.err
    (prefill,) = [line for line in rtx.out.splitlines() if "graphs/decoder_prefill.onnx" in line]
    assert prefill.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert")
    assert "--compute-capabilities 8.9" in prefill
    assert "--trt-max-shapes inputs_embeds:[1,64,32] token_modality:[1,64]" in prefill
    orin = moiie("build", bundle, "-t", "orin", "--dry-run")
    assert "--stronglyTyped" in orin.out
    assert "--maxShapes=inputs_embeds:1x64x32,token_modality:1x64" in orin.out
    assert not (bundle / "engines").exists()


def test_an_sm_that_cannot_be_built_exits_4(moiie: Any, bundle: Path) -> None:
    from tests.rtx import need_rtx

    need_rtx()
    result = moiie("build", bundle, "-t", "rtx", "--sm", "87")
    assert result.code == 4
    assert "does not build for SM 87" in result.error
    assert "--sm" in result.hint


def test_a_recipe_adds_targets(moiie: Any, bundle: Path, asked: list[BuildRequest], tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "schema: 1\nextends: default\ntargets:\n  - name: mine\n    like: orin\n    memory: 32GB\n    prefill: [256]\n"
    )
    result = moiie("build", bundle, "-t", "mine", "--recipe", recipe)
    assert result.code == 0, result.err
    target = asked[0].target
    assert (target.name, target.sms, target.memory, target.prefill) == ("mine", (87,), 32 * 10**9, (256,))
    assert moiie("build", bundle, "-t", "mine").code == 1


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("rtx", (), {}),
        ("rtx", ("--sm", "86,89,120"), {}),
        ("rtx", ("--sm", "8.9"), {"sm": [89]}),
        ("rtx", ("--recipe", "own.yaml"), {}),
        ("mine", ("--recipe", "own.yaml"), {"recipe": "own.yaml"}),
        (
            "mine",
            ("--recipe", "own.yaml", "--sm", "87,89", "--plugins", "own.so"),
            {"recipe": "own.yaml", "sm": [87, 89]},
        ),
    ],
)
def test_what_is_recorded_asks_for_the_same_again(
    moiie: Any,
    bundle: Path,
    asked: list[BuildRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    options: tuple[str, ...],
    told: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("schema: 1\nextends: default\ntargets:\n  - {name: mine, like: orin, images: 2}\n")
    limit = ("--memory-limit", "4GiB")
    assert moiie("build", bundle, "-t", target, *options, *limit).code == 0
    document = describe(asked[0], Bundle.open(bundle), ("tensorrt", "1"), 0)
    assert document["options"] == told
    plugins = {"plugins": {"embedded": True}} if asked[0].plugin_library else {}
    again = shlex.split(build_command(bundle, target, document | plugins, plugins="own.so"))
    assert moiie(*again[1:], *limit).code == 0
    assert asked[1] == asked[0]


def test_a_target_of_the_bundles_own_recipe_needs_none(
    moiie: Any, bundle: Path, asked: list[BuildRequest], tmp_path: Path
) -> None:
    """Unless the one that is given says something else under the name."""
    sections = [{"name": "mine", "like": "orin", "images": 2}]
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["recipe"]["targets"] = sections
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    (own / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    for images, told in ((2, {}), (3, {"recipe": str(recipe)})):
        sections[0]["images"] = images
        recipe.write_text(f"schema: 1\nextends: default\ntargets: {json.dumps(sections)}\n", encoding="utf-8")
        assert moiie("build", own, "-t", "mine", "--recipe", recipe).code == 0
        assert (asked[-1].target.images, asked[-1].options) == (images, told)


def test_it_says_where_experts_go_dense_for_want_of_a_library(
    moiie: Any, bundle: Path, asked: list[BuildRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no plugins-build here
    says = "no plugin library is given, so each token goes through every expert"
    assert says in moiie("build", bundle, "-t", "rtx").err
    assert says in moiie("build", bundle, "-t", "rtx", "--dry-run").err
    assert says not in moiie("build", bundle, "-t", "rtx", "--plugins", "l.so").err
    for target in ("cpu", "orin"):
        assert says not in moiie("build", bundle, "-t", target).err
