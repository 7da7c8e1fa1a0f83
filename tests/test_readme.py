"""Every command that README.md shows works: its ```sh blocks run in order, in one folder, in one shell each.

A block that follows the comment `<!-- not run: reason -->` is skipped. `make TARGET` is replaced by a check that the target
exists, because the tests run inside `make test`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```(?P<language>sh|python)\n(?P<code>.*?)\n```", re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every block that is to run."""
    skipped = re.compile(r"<!-- not run: .+ -->")
    matches = (match for match in BLOCK.finditer("\n" + text) if not skipped.fullmatch(match["before"].strip()))
    return [(match["language"], match["code"]) for match in matches]


def checked(code: str) -> str:
    """The shell code with `make` asked for the target instead of making it."""
    return re.sub(r"^make\b", f"make -n -C {ROOT}", code, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone: the files that commands refer to, and room for what they write."""
    path = tmp_path_factory.mktemp("readme")
    (path / "tests").mkdir()
    shutil.copytree(ROOT / "tests" / "golden", path / "tests" / "golden")
    return path


def test_readme_commands_run(folder: Path) -> None:
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found, "README.md shows no command that is run"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for language, code in found:
        interpreter = ["sh", "-euc", checked(code)] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(interpreter, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_blocks_are_found_and_left_out_as_said() -> None:
    text = "# Title\n\n```sh\nmake demo\n```\n\n<!-- not run: needs weights -->\n```sh\nmoiie x\n```\n\ntext\n```python\n1\n```\n"
    assert blocks(text) == [("sh", "make demo"), ("python", "1")]
    assert checked("make demo\necho make x") == f"make -n -C {ROOT} demo\necho make x"
