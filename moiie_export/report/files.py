"""Reports on disk: written under a temporary name and renamed, so that a half-written one is never found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_export.disk import write_bytes
from moiie_export.report.page import render
from moiie_runtime.errors import MoiieError

_SYSTEM_HINT = "check the folder's permissions and the free space, or write somewhere else"


def prepare(page: Path | None, pictures: Path | None) -> None:
    """Make the folders that `write_report` and `write_pngs` write into; before a comparison that takes long.

    Raises:
        MoiieError: a name is taken by something else, or a folder cannot be made.
    """
    if page is not None and page.is_dir():
        raise MoiieError(f"{page}: is a directory", f"name a file: {page / 'report.html'}")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise MoiieError(f"{pictures}: is a file", "name a directory for the pictures")
    for folder in (None if page is None else page.parent, pictures):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MoiieError(f"{folder}: cannot be made: {error.strerror or error}", _SYSTEM_HINT) from error


def write_report(document: Mapping[str, Any], path: Path) -> None:
    """Write the page of a document (`render`).

    Raises:
        MoiieError: it is no such document, or the file cannot be written.
    """
    _write(path, render(document).encode("utf-8"))


def write_pngs(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write the charts of a document (`draw_pngs`); the files that were written.

    Raises:
        MissingDependency: matplotlib is not installed.
        MoiieError: it is no such document, or a file cannot be written.
    """
    from moiie_export.report.png import draw_pngs

    paths = []
    for name, data in draw_pngs(document).items():
        _write(directory / name, data)
        paths.append(directory / name)
    return paths


def _write(path: Path, data: bytes) -> None:
    try:
        write_bytes(path, data)
    except MoiieError as error:  # its hint speaks of another option
        raise MoiieError(error.message, _SYSTEM_HINT) from error
