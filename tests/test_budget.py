"""Small files, and no name of a model family in the command line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("moiie_export", "plugins", "runtime", "recipes", "scripts", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_LINES = 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; split it by concept"


def test_the_command_line_knows_no_model_family() -> None:
    for path in (ROOT / "moiie_export" / "cli").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert "model_type ==" not in code, path
        assert "import moiie_export.config" not in code, path


def test_the_committed_tree_stays_small() -> None:
    """25 MiB for everything a clone holds: 6 are the trained demo models, 15 the golden numbers."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name) <= 25 << 20
