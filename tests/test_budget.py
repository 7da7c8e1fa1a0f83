"""Small files, and no name of a model family in the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("moiie_export", "runtime", "recipes", "scripts", "tests")
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
