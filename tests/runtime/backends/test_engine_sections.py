"""engine.json with anything in any place: everything that reads it accepts it or says what is wrong, never anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_export.cli.engines import engine_lines, engine_summary
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_memory import estimate_device
from moiie_runtime.engine_files import engine_files
from moiie_runtime.engines import open_engine
from moiie_runtime.errors import MoiieError
from moiie_runtime.memory import Request
from tests.runtime.backends.emulated_cuda import EmulatedCuda
from tests.runtime.backends.engine_bundle import build
from tests.shared_library import write_shared_library

JUNK: tuple[Any, ...] = (None, 2**70, "x", [{}], {"x": []})
PICTURE = Request(prompt_tokens=10, images=1)


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(golden_bundle("moiie_phi3"), tmp_path_factory.mktemp("sections") / "b"))
    library = write_shared_library(path.parent / "libmoiie_plugins.so")
    build(path, "rtx", {"prefill": (64,), "plugins": "required", "embed_plugins": False}, library)
    return path


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a document; of long lists only the first entry."""
    keys = [*value] if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in keys:
        yield (*above, key)
        yield from places(value[key], (*above, key))


def with_junk(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document, with something else in one place at a time."""
    skipped = ("source", "files")  # read as bundle.json is, which has a test of its own
    unread = ("about", "name", "memory", "prefill", "batch", "threads", "kv_cache", "prefill_chunk", "embed_plugins")
    for number, place in enumerate([*places(document)]):
        if {*place[:-1]} & {*skipped} or (place[0] == "settings" and {*place} & {*unread}):
            continue
        inner: Any = document
        for key in place[:-1]:
            inner = inner[key]
        sound = inner[place[-1]]
        for junk in (JUNK[number % len(JUNK)], JUNK[(number + 2) % len(JUNK)]):  # all of them somewhere, for time
            inner[place[-1]] = junk
            yield document
        inner[place[-1]] = sound


def test_anything_anywhere(bundle: Path, trt: Any) -> None:
    trt.cuda.total = 1 << 30
    path = bundle / "engines" / "rtx" / "engine.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["plugins"]["kernels"] = {"sms": [89], "portable": [80]}
    opened, refused, tried = Bundle.open(bundle), 0, 0
    for document in with_junk(whole):
        path.write_text(json.dumps(document), encoding="utf-8")
        found = engine_files(opened)
        engine_summary(found)
        list(engine_lines(found, opened))
        tried += 1
        try:
            engine = open_engine(opened, "rtx")
            engine.check()
            estimate_device(engine, PICTURE)
            engine.options().close()
        except MoiieError as error:
            refused += 1
            assert error.message
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert tried > 150
    assert refused > tried // 3
    open_engine(opened, "rtx").check()
    cuda: EmulatedCuda = trt.cuda
    assert not any(cuda.left.values())
