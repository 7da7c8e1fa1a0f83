"""The package for jetson-containers: its header parses, its scripts are sound, and pip never brings a TensorRT."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT
from tests.test_packaging import PYPROJECT

FOLDER = ROOT / "recipes" / "jetson"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
UNWANTED = {"tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "torch"}


def header() -> dict[str, Any]:
    """What jetson-containers reads: YAML in the comments between two lines `#---`."""
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    first, last = (index for index, line in enumerate(lines) if line == "#---")
    assert first == 0
    document: dict[str, Any] = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[1:last]))
    return document


def test_the_header_of_the_dockerfile() -> None:
    found = header()
    assert set(found) == {"name", "group", "depends", "requires", "test", "docs", "notes"}
    assert found["name"] == PYPROJECT["project"]["name"]
    assert "tensorrt" in found["depends"]
    assert SpecifierSet(found["requires"]).contains("36.4.3")
    assert not SpecifierSet(found["requires"]).contains("36.3.0"), "JetPack 6.0 has TensorRT 8.6"
    assert (FOLDER / found["test"]).is_file()
    assert (FOLDER / found["docs"]).is_file()


def test_the_dockerfile_builds_on_the_base_it_is_given_and_copies_what_is_there() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    assert "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n" in text
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert {"install.sh", "build.sh", "forbidden.txt"} == set(copied)
    assert all((FOLDER / name).is_file() for name in copied)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_and_can_be_run(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_no_line_for_pip_asks_for_what_the_system_has() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*SCRIPTS, FOLDER / "Dockerfile", FOLDER / "README.md")]
    joined = [re.sub(r"\\\n\s*", "", text) for text in texts]
    lines = [line for text in joined for line in text.splitlines() if re.search(r"\bpip3? install\b", line)]
    assert lines
    asked = [re.sub(r"\[[a-z,]+\]", "", line) for line in lines]  # extras of ours: see the next test
    assert not [line for line in asked for name in UNWANTED if re.search(rf"(?<![\w-]){name}(?![\w-])", line)]


def test_the_extras_that_are_installed_bring_none_of_it() -> None:
    project = PYPROJECT["project"]
    (wanted,) = re.findall(r"\[([a-z,]+)\]\"$", (FOLDER / "install.sh").read_text(encoding="utf-8"), re.M)
    lines = [
        *project["dependencies"],
        *(line for name in wanted.split(",") for line in project["optional-dependencies"][name]),
    ]
    assert not UNWANTED & {Requirement(line).name for line in lines}


def test_the_constraints_can_be_met_by_nothing() -> None:
    lines = (FOLDER / "forbidden.txt").read_text(encoding="utf-8").splitlines()
    found = {each.name: each.specifier for each in map(Requirement, (line for line in lines if line[:1] != "#"))}
    assert set(found) == UNWANTED - {"tensorrt"}, "the system's own tensorrt is a distribution too"
    assert not any(each.contains(version) for each in found.values() for version in ("0", "1.2.3", "2.11.0+cu130"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that only writes down how it was called; without TensorRT where `no-tensorrt` lies beside it."""
    path = tmp_path / "python3"
    path.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in *"import tensorrt"*) test ! -e {tmp_path}/no-tensorrt;; esac\n'
    )
    path.chmod(0o755)
    return path


def run(script: str, python: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
    done = subprocess.run(
        ["bash", FOLDER / script], env=environment, cwd=python.parent, capture_output=True, text=True, check=False
    )
    calls = python.parent / "calls"
    return done, calls.read_text().splitlines() if calls.is_file() else []


@pytest.mark.parametrize(("cuda", "bindings"), [("cuda-12.6", "cuda-bindings==12.* "), ("somewhere", "")])
def test_install_uses_the_systems_tensorrt_or_stops(python: Path, cuda: str, bindings: str) -> None:
    folder = python.parent
    (folder / cuda).mkdir()
    given = {"MOIIE_EXPORT": "/data/moiie_export-0.1.0-py3-none-any.whl", "CUDA_HOME": str(folder / cuda)}
    done, calls = run("install.sh", python, **given)
    assert done.returncode == 0, done.stderr
    wheel = f"{given['MOIIE_EXPORT']}[cpu,build,plugins,polygraphy,tensorrt]"
    assert calls[1:] == [f"-m pip install --constraint {FOLDER}/forbidden.txt {bindings}{wheel}"]
    (folder / "no-tensorrt").touch()
    (folder / "calls").unlink()
    done, calls = run("install.sh", python)
    assert done.returncode
    assert not [line for line in calls if "pip" in line]


def test_build_says_what_it_needs(python: Path) -> None:
    done, calls = run("build.sh", python)
    assert done.returncode == 1
    assert "set MOIIE_EXPORT_GIT" in done.stderr
    assert not calls


def test_the_packages_test_asks_the_doctor_and_compiles_for_both_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    from moiie_recipes.jetson import test as module

    asked = _answer(monkeypatch, module, "ok")
    module.main()
    assert asked[0] == ("doctor",)
    assert asked[1][:4] == ("plugins", "build", "--sm", "87,110")
    _answer(monkeypatch, module, "warn")
    with pytest.raises(SystemExit, match="apt install"):
        module.main()


def _answer(monkeypatch: pytest.MonkeyPatch, module: ModuleType, status: str) -> list[tuple[str, ...]]:
    asked: list[tuple[str, ...]] = []
    finding = {"name": "jetson tensorrt", "status": status, "detail": "10.3.0", "hint": "apt install"}
    built = {"library": {"bytes": 1}, "tensorrt_headers": {"version": "10.3.0"}}

    def moiie(*arguments: str) -> Any:
        asked.append(arguments)
        return {"findings": [finding]} if arguments == ("doctor",) else built

    monkeypatch.setattr(module, "moiie", moiie)
    return asked


def test_every_recipe_it_lists_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| .+ \| ([\d.]+ GiB) \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) == 4
    for name, size in rows:
        assert f"predicts {size}" in (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", *SCRIPTS], check=True)
