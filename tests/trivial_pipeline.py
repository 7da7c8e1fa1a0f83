"""An export with three stages of a few bytes each, to try workspaces with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_export.stages import Progress, Stage, Workspace, file_record, fingerprint


class Pipeline:
    """Three stages; `version` changes the second one. Counts how often each has run."""

    def __init__(self, output: Path, version: str = "1") -> None:
        self.output, self.version = output, version
        self.runs: Counter[str] = Counter()

    def stages(self) -> list[Stage]:
        return [
            self._stage("weights", "1", ("onnx/weights",)),
            self._stage("graph", self.version, ("onnx/graph",)),
            self._stage("files", "1", ("a.json", "b.json")),
        ]

    def export(self, force: bool = False) -> Workspace:
        workspace = Workspace.look(self.output)
        stages = self.stages()
        with workspace.locked():
            records = workspace.execute(stages, silent, force)
            files = {name: entry for record in records.values() for name, entry in record.files.items()}
            manifest = {"files": files, "stages": {name: vars(record) for name, record in records.items()}}
            workspace.finish(manifest, list(files))
        return workspace

    def _stage(self, name: str, version: str, files: tuple[str, ...]) -> Stage:
        def run(directory: Path, _: Progress) -> Mapping[str, Any]:
            self.runs[name] += 1
            for file in files:
                temporary = directory / f"{file}.tmp"
                temporary.write_text(f"{file} {version}\n", encoding="utf-8")
                temporary.replace(directory / file)
            return {"about": name}

        return Stage(name, fingerprint(name, version), files, run)


def assert_complete(bundle: Path) -> None:
    """The manifest lists every file with its right digest."""
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert set(tree(bundle)) - {"stages.json"} == {*manifest["files"], "bundle.json"}
    for name, entry in manifest["files"].items():
        assert file_record(bundle / name) == entry


def silent(*_: object) -> None:
    pass


def tree(directory: Path) -> dict[str, str]:
    """Relative path -> text of every file below a directory; manifests, whose digests say the same, as empty text."""
    if not directory.is_dir():
        return {}
    names = [path for path in sorted(directory.rglob("*")) if not path.is_dir()]
    return {
        path.relative_to(directory).as_posix(): "" if path.name == "bundle.json" else path.read_text(encoding="utf-8")
        for path in names
    }


def finished(version: str) -> dict[str, str]:
    """What lies around after an export, and nothing else."""
    return {
        "bundle/a.json": "a.json 1\n",
        "bundle/b.json": "b.json 1\n",
        "bundle/bundle.json": "",
        "bundle/onnx/graph": f"onnx/graph {version}\n",
        "bundle/onnx/weights": "onnx/weights 1\n",
    }


def names_of(version: str) -> list[str]:
    """The files inside a finished bundle."""
    return [name.removeprefix("bundle/") for name in finished(version)]
