"""A bundle: the directory that export writes and the runtime reads, described by its `bundle.json`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_runtime.errors import MoiieError, Unsound
from moiie_runtime.manifest import FileRecord, Manifest, read_manifest
from moiie_runtime.strict_files import open_regular, quote, read_json_object, sha256_file

MANIFEST_NAME = "bundle.json"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 64 * 2**20
_DAMAGED = "the bundle is damaged: copy it again, or write it again with `moiie export`"
_GRAPH_SUFFIXES = {".onnx", ".safetensors", ".data", ".bin"}


@dataclass(frozen=True)
class Bundle(Manifest):
    """An opened bundle: its manifest, and where it lies. No weight is read before a session or a tensor asks for it.

    Attributes:
        root: the directory, absolute.
        raw: the parsed `bundle.json` with every key it has, known or not.
    """

    root: Path
    raw: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest of the bundle at `path`.

        Raises:
            MoiieError: there is no bundle, its export did not finish, its schema is newer, a key is missing or wrong,
                or a path in it is not inside the bundle.
        """
        root = _existing_directory(Path(path))
        raw = read_json_object(root / MANIFEST_NAME, MAX_MANIFEST_BYTES, _DAMAGED)
        bundle = cls(**vars(read_manifest(raw, str(root / MANIFEST_NAME))), root=root, raw=raw)
        bundle._check_paths()
        return bundle

    def path(self, relative: str) -> Path:
        """The absolute path of a file of the bundle.

        Raises:
            MoiieError: `relative` is absolute, uses `..`, backslashes or a drive letter, or is a link that leaves
                the bundle.
        """
        parts = relative.split("/")
        outside = not all(parts) or ".." in parts or "." in parts or "\\" in relative or "\0" in relative
        if outside or re.match(r"[A-Za-z]:", relative):
            raise self._outside(relative, "must be a relative path with forward slashes and without `..`")
        full = self.root / relative
        try:
            inside = full.resolve().is_relative_to(self.root)
            full.exists()  # raises for a name that is too long
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, unusable characters
            raise self._outside(relative, f"cannot be followed: {error}") from error
        if not inside:
            raise self._outside(relative, "is a link that leaves the bundle")
        return full

    def read_text(self, relative: str) -> str:
        """The text of a small UTF-8 file of the bundle.

        Raises:
            MoiieError: the file is missing, too large or not UTF-8.
        """
        path = self.path(relative)
        with open_regular(path, _DAMAGED) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise MoiieError(f"{path}: expected at most {MAX_TEXT_BYTES} bytes of text, found more", _DAMAGED)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MoiieError(f"{path}: is not UTF-8 text (byte {error.start})", _DAMAGED) from error

    def check_files(self) -> None:
        """Refuse a bundle whose files are missing or have another size than recorded. Reads no file.

        Raises:
            Unsound: naming every such file.
        """
        found = (file_problem(self.path(name), name, record, MANIFEST_NAME) for name, record in self.files.items())
        problems = [problem for problem in found if problem]
        if problems:
            raise Unsound(
                f"{self.root}: the bundle is damaged: " + "; ".join(problems),
                _DAMAGED,
            )

    def verify(self) -> list[str]:
        """Every difference between the files on disk and the manifest, found by reading all of them.

        Returns:
            One line for each file that is missing, has another size or digest, or is a graph or weight file that the
            manifest does not list; empty when the bundle is sound.
        """
        problems = []
        for name, record in sorted(self.files.items()):
            problem = file_problem(self.path(name), name, record, MANIFEST_NAME, read=True)
            if problem is not None:
                problems.append(problem)
        folders = {self.path(component.file).parent for component in self.components.values()}
        for folder in sorted(folders):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                name = path.relative_to(self.root).as_posix()
                if path.suffix in _GRAPH_SUFFIXES and name not in self.files:
                    problems.append(f"{name}: is not listed in bundle.json")
        return problems

    def _check_paths(self) -> None:
        names = [component.file for component in self.components.values()]
        names.append(self.embed_tokens.file)
        names += [] if self.instance_router is None else [self.instance_router.tokenizer]
        names += [] if self.adapters is None else [self.adapters.file]
        for name in [*self.files, *names]:
            self.path(name)
        for name in names:
            if name not in self.files:
                raise MoiieError(
                    f"{self.root / MANIFEST_NAME}: `{name}` is used but `files` does not list it",
                    _DAMAGED,
                )

    def _outside(self, relative: str, reason: str) -> MoiieError:
        return MoiieError(
            f"{self.root / MANIFEST_NAME}: path {quote(relative)} {reason}",
            "a bundle only refers to files inside itself; do not use this one unless you know who wrote it",
        )


def file_problem(path: Path, name: str, record: FileRecord, document: str, *, read: bool = False) -> str | None:
    """How a file differs from what is recorded of it; None when it does not.

    Args:
        path: the file.
        name: what it is called there.
        record: its digest and size.
        document: where they are recorded.
        read: compare the digest too.
    """
    if not path.is_file():
        return f"{name}: is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{name}: has {size} bytes, {document} says {record.bytes}"
    if read and (digest := sha256_file(path)) != record.sha256:
        return f"{name}: sha256 is {digest}, {document} says {record.sha256}"
    return None


def _existing_directory(path: Path) -> Path:
    exists = path.exists()
    if (exists and path.suffix == ".partial") or (not exists and Path(f"{path}.partial").exists()):
        raise MoiieError(
            f"{path}: the export of this bundle did not finish", "run the same `moiie export` again; it resumes"
        )
    if not exists:
        raise MoiieError(f"{path}: no such bundle", "make one with `moiie export CHECKPOINT -o BUNDLE`")
    if not path.is_dir():
        raise MoiieError(
            f"{path}: a bundle is a directory, this is a file", "give the directory that holds bundle.json"
        )
    if not (path / MANIFEST_NAME).is_file():
        raise MoiieError(
            f"{path}: not a bundle, it has no {MANIFEST_NAME}", "make one with `moiie export CHECKPOINT -o BUNDLE`"
        )
    return path.resolve()
