"""Reports and pictures on disk."""

from __future__ import annotations

import builtins
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moiie_export.report import prepare, render, write_pngs, write_report
from moiie_runtime.errors import MissingDependency, MoiieError
from tests.moiie_export.report.documents import document

NAMES = {"error-by-layer.png", "routing.png", "load-balance.png", "router-margins.png", "logits.png"}


def test_the_file_is_the_page(tmp_path: Path) -> None:
    found = document(wrong=1, text="naïve 東京 \ud800 words four five")
    write_report(found, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(found)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before", encoding="utf-8")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoiieError, match="report.html.*No space left") as caught:
        write_report(document(), path)
    assert caught.value.hint is not None
    assert "-o" not in caught.value.hint, "the command has no such option"
    assert path.read_text(encoding="utf-8") == "before"


def test_folders_are_made_and_wrong_names_refused_before_anything_runs(tmp_path: Path) -> None:
    prepare(tmp_path / "a" / "b" / "report.html", tmp_path / "c" / "d")
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "c" / "d").is_dir()
    prepare(None, None)
    with pytest.raises(MoiieError, match="is a directory"):
        prepare(tmp_path, None)
    (tmp_path / "file").touch()
    with pytest.raises(MoiieError, match="is a file"):
        prepare(None, tmp_path / "file")
    with pytest.raises(MoiieError, match="cannot be made"):
        prepare(tmp_path / "file" / "under" / "report.html", None)


def test_pictures_show_what_the_document_has(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = write_pngs(document(wrong=1), tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()} == NAMES
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height) or []) > 5
    again = {path.name: path.read_bytes() for path in write_pngs(document(wrong=1), tmp_path)}
    assert again == {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, NAMES),
        ({"sparse": ()}, {"error-by-layer.png", "logits.png"}),
        ({"routed": False}, NAMES - {"router-margins.png"}),
        ({"layers": 1, "sparse": (0,), "experts": 40}, NAMES),
    ],
)
def test_pictures_of_other_models(tmp_path: Path, changes: dict[str, Any], names: set[str]) -> None:
    pytest.importorskip("matplotlib")
    assert {path.name for path in write_pngs(document(**changes), tmp_path)} == names


def test_pictures_take_names_as_text_and_nan_as_a_place(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = document(wrong=1)
    for case in found["cases"]:
        case["name"] = r"$\frac{$ 東京 \x \ud800"
    for check in found["checks"]:
        check.update(case=r"$\no$", value="NaN" if check["metric"] == "error" else check["value"])
    found["cases"][0]["prefill"]["logits"]["errors"][0] = "NaN"
    assert len(write_pngs(found, tmp_path)) == len(NAMES)


def test_pictures_need_matplotlib_and_the_page_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    write_report(document(), tmp_path / "report.html")
    with pytest.raises(MissingDependency, match="matplotlib") as caught:
        write_pngs(document(), tmp_path)
    assert caught.value.hint == "pip install 'moiie-export[report]'"
