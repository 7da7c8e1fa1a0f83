"""Progress: a rewritten line on a terminal, few lines elsewhere."""

from __future__ import annotations

import pytest

from moiie_export.cli.progress import Progress


def test_elsewhere_each_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for done in range(100):
        progress("weights", done, 100)
    progress("graphs", 0, 1)
    progress.finish()
    caught = capsys.readouterr()
    assert (caught.out, caught.err) == ("", "weights\ngraphs\n")


def test_on_a_terminal_the_line_is_rewritten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress()
    progress("weights", 0, 2)
    progress("weights", 2, 2)
    progress("graphs", 0, 1)
    progress.finish()
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err == "\r\033[Kweights 0/2\r\033[Kweights 2/2\n\r\033[Kgraphs\n"
