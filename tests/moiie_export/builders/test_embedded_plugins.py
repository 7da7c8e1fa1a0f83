"""The plugin library goes only into engines whose graphs have a node for it, and engine.json says which GPUs it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moiie_export.builders.plugin_kernels import library_kernels
from moiie_runtime.strict_files import sha256_file
from tests.exports import SMALLEST, exported
from tests.runtime.backends.engine_bundle import build
from tests.shared_library import write_shared_library

KERNELS = {"sms": [80, 89], "portable": [80]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("plugins") / "bundle"))


@pytest.fixture(scope="module")
def library(bundle: Path) -> Path:
    """Something with the description of a library; nothing here loads it."""
    path = write_shared_library(bundle.parent / "libmoiie_plugins.so")
    isa = {"80": ["8.0"], "80 ptx": ["8.0"], "89": ["8.1"]}
    about = {"library": {"sha256": sha256_file(path)}, "sms": [89, 80], "ptx_isa": isa}
    path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    return path


def built(bundle: Path, name: str, library: Path | None, **settings: Any) -> tuple[dict[str, Any], dict[str, bool]]:
    """engine.json, and component -> whether TensorRT was given the library."""
    jobs = build(bundle, name, {"sms": (89,), "prefill": (64,), **settings}, library)
    document = json.loads((bundle / "engines" / name / "engine.json").read_text(encoding="utf-8"))
    given = {job.name: job.plugins is not None for job in jobs}
    assert given == {name: each["plugins"] for name, each in document["components"].items()}
    return document, given


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("like", ["rtx", "orin"])
def test_only_decoders_have_nodes_for_it(bundle: Path, library: Path, like: str, embed: bool) -> None:
    document, given = built(bundle, "mine", library, like=like, plugins="required", embed_plugins=embed)
    assert given == {"vision_encoder": False, "decoder_prefill": True, "decoder_decode": True}
    assert document["plugins"] == {
        "sha256": sha256_file(library),
        "file": None if embed else "libmoiie_plugins.so",
        "embedded": embed,
        "kernels": KERNELS,
    }
    assert ("libmoiie_plugins.so" in document["files"]) is not embed


def test_a_library_that_no_graph_needs_is_not_asked_for(bundle: Path, library: Path) -> None:
    for name, given in (("off", library), ("optional", None)):
        document, used = built(bundle, name, given, plugins=name)
        assert document["plugins"] is None
        assert not any(used.values())


def test_of_a_library_without_a_description_nothing_is_recorded(bundle: Path, library: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(library, tmp_path))
    assert library_kernels(alone) is None
    document, _ = built(bundle, "alone", alone, plugins="required")
    assert document["plugins"]["kernels"] is None


def test_engine_json_says_what_else_could_be_built(bundle: Path) -> None:
    """As far as the emulated library of SM 86, 89 and 120 goes."""
    assert built(bundle, "rtx", None, plugins="off")[0]["library_sms"] == [86, 89, 120]
