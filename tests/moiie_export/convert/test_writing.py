"""The output: whole or not there, whatever ends the conversion, and in little memory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pytest

from moiie_export.convert import convert
from moiie_export.source import BLOCK_BYTES
from moiie_runtime.errors import MoiieError
from tests.mome_golden import minilm
from tests.mome_layout import SIZES, OfficialLayout

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.mome_layout import OfficialLayout

def progress(step, done, total):
    if 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)

OfficialLayout(Path(sys.argv[1])).convert(progress=progress)
"""


def names(layout: OfficialLayout) -> set[str]:
    return {path.name for path in layout.path.iterdir()}


def test_progress_ends_at_the_total(layout: OfficialLayout) -> None:
    said: list[tuple[str, int, int]] = []
    result = layout.convert(progress=lambda *step: said.append(step))
    assert said[-1] == ("convert", result.bytes, result.bytes)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)


def test_an_interrupted_run_leaves_nothing(layout: OfficialLayout) -> None:
    before = names(layout)

    def stop(_: str, done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layout.convert(progress=stop)
    assert names(layout) == before


def test_sigkill_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(layout: OfficialLayout) -> None:
    before = names(layout)
    done = subprocess.run([sys.executable, "-c", KILLED, layout.path], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(layout) - before == {"out.moiie-partial", "out.lock"}
    assert not list(layout.path.glob("out.moiie-partial/config.json"))
    layout.convert()
    assert names(layout) - before == {"out"}


def test_an_output_that_exists_is_refused_before_anything_is_read(layout: OfficialLayout) -> None:
    (layout.path / "MoME_ckpt.safetensors").write_bytes(b"damaged")
    (layout.path / "out").mkdir()
    (layout.path / "out" / "mine").write_text("")
    with pytest.raises(MoiieError, match="out: exists already"):
        layout.convert()
    (layout.path / "link").symlink_to("nowhere")
    with pytest.raises(MoiieError, match="link: exists already"):
        layout.convert("link")
    assert (layout.path / "out" / "mine").exists()


def test_an_empty_directory_and_missing_parents_are_fine(layout: OfficialLayout) -> None:
    (layout.path / "empty").mkdir()
    for output in ("empty", "a/b/c"):
        assert (layout.convert(output).path / "config.json").is_file()


def test_too_little_space_is_refused_before_anything_is_written(
    layout: OfficialLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(layout)
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 1000, 1000))
    with pytest.raises(MoiieError, match="bytes have to be written, 1000 are free") as caught:
        layout.convert()
    assert "-o" in str(caught.value.hint)
    assert names(layout) == before


def test_a_disk_that_fills_up_leaves_nothing(layout: OfficialLayout) -> None:
    before = names(layout)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(MoiieError, match="model.safetensors: cannot be written: File too large"):
            layout.convert()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(layout) == before


def test_memory_stays_at_a_few_blocks(layout: OfficialLayout) -> None:
    """The real sentence encoder is 90 MB, half of it one tensor."""
    shutil.copytree(minilm(), layout.path / "large")
    (layout.path / "mome.json").write_text(json.dumps(SIZES))
    originals = layout.originals
    tracemalloc.start()
    try:
        convert(
            type(originals)(**{**vars(originals), "sentence": layout.path / "large"}),
            layout.path / "out",
            layout.path / "mome.json",
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensors = Path(layout.path / "large" / "model.safetensors").stat().st_size
    assert peak < 3 * BLOCK_BYTES < tensors
