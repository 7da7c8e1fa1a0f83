"""What an installation puts into site-packages, and that the two halves stay apart."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {
    "moiie_export": "moiie_export",
    "moiie_plugins": "plugins",
    "moiie_recipes": "recipes",
    "moiie_runtime": "runtime",
}


_OTHERS = ("CMakeLists.txt", "README.md", "Dockerfile")  # plugins are built, images made, from an installation too


def test_every_folder_of_modules_is_a_package() -> None:
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} would be left out of an installation"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, without network and without touching the tree."""
    import shutil

    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, capture_output=True, text=True)
    [path] = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == set(FOLDERS)
    assert len(info) == 1


def test_the_wheel_holds_every_source_file_and_recipe(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".css", ".jinja", ".cpp", ".h", ".sh", ".txt") or path.name in _OTHERS
    }
    assert expected <= held
    models = re.compile(
        r"moiie_recipes/demo/(mome/)?(model|siglip-[^/]+)/(sentence_encoder/)?[^/]+\.(json|safetensors)"
    )
    assert all(name.endswith(".typed") or models.fullmatch(name) for name in held - expected)


def test_the_wheel_brings_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    [points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "moiie = moiie_export.cli:main" in wheel.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_constraints_pin_every_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, pinned = line.split(" ;")[0].split("==")
            pins.setdefault(name, []).append(pinned)
    project = PYPROJECT["project"]
    extras = [each for name in ("cpu", "export", "dev") for each in project["optional-dependencies"][name]]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert all(requirement.specifier.contains(each) for each in pins[name]), text


@pytest.mark.parametrize("module", ["moiie_runtime", "moiie_runtime.vlm", "moiie_runtime.backends.onnxruntime"])
def test_the_runtime_imports_without_the_workstation(module: str) -> None:
    blocked = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "yaml", "click", "moiie_export")
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked) + f"import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
