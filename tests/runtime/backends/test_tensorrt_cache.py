"""Kernels compiled for this GPU are kept beside the engine, and nothing depends on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import moiie_runtime as mr
from moiie_runtime.backends.tensorrt_cache import SUFFIX
from moiie_runtime.bundle import Bundle

TEXT = [{"role": "user", "content": "Describe."}]


@pytest.fixture
def bundle(engine_bundle, tmp_path):
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


def compiled(trt, bundle: Path) -> int:
    """Kernels that one load and answer compile."""
    trt.jit, trt.compiled = True, 0
    with mr.load(bundle, target="rtx", threads=1) as vlm:
        vlm.generate(TEXT, max_new_tokens=2)
    assert not any(trt.cuda.left.values())
    return trt.compiled


def test_the_second_load_compiles_nothing(trt, bundle):
    assert compiled(trt, bundle) == 2  # prefill, decode
    kept = sorted((bundle / "engines" / "rtx").glob(f"*{SUFFIX}*"))
    assert [path.name for path in kept] == [f"decoder_decode{SUFFIX}", f"decoder_prefill{SUFFIX}"]
    assert compiled(trt, bundle) == 0
    assert Bundle.open(bundle).verify() == []


@pytest.mark.parametrize("content", [b"", b"of another GPU"])
def test_one_that_is_refused_is_written_again(trt, bundle, content):
    compiled(trt, bundle)
    path = bundle / "engines" / "rtx" / f"decoder_decode{SUFFIX}"
    good = path.read_bytes()
    path.write_bytes(content)
    assert compiled(trt, bundle) == 1
    assert path.read_bytes() == good


def test_a_cache_that_is_a_folder_or_cannot_be_written_harms_nothing(trt, bundle):
    (bundle / "engines" / "rtx" / f"decoder_decode{SUFFIX}").mkdir()
    assert compiled(trt, bundle) == 2
    assert compiled(trt, bundle) == 1
    names = {path.name for path in (bundle / "engines" / "rtx").glob(f"*{SUFFIX}*")}
    assert names == {f"decoder_decode{SUFFIX}", f"decoder_prefill{SUFFIX}"}


def test_other_libraries_keep_nothing(trt, bundle):
    with mr.load(bundle, target="rtx", threads=1) as vlm:
        vlm.generate(TEXT, max_new_tokens=1)
    assert not list((bundle / "engines" / "rtx").glob(f"*{SUFFIX}*"))
