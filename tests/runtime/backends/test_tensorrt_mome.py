"""MoME on the emulated GPU: a router for one text at a time, several encoders, adapters bound once a request."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import moiie_runtime as mr
from tests.exports import exported_mome
from tests.runtime.backends.engine_bundle import build

PICTURE = Path(__file__).parents[2] / "golden" / "moiie_phi3" / "inputs" / "image_0.png"
CONVERSATIONS = [
    [{"role": "user", "content": [PICTURE, "What is shown?"]}],
    [{"role": "user", "content": "How many corners does a square have?"}],
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    copy = Path(shutil.copytree(exported_mome(640).bundle, tmp_path_factory.mktemp("mome") / "bundle"))
    build(copy, "two", {"prefill": (64, 256), "batch": 2, "residency": "after_prefill"})
    return copy


def test_answers_are_those_of_the_portable_graphs(trt, bundle):
    trt.cuda.total = 1 << 30
    found = {}
    for target in ("portable", "two"):
        with mr.load(bundle, target=target, threads=1) as vlm:
            together = vlm.generate_batch(CONVERSATIONS, max_new_tokens=3, num_beams=1)
            beams = vlm.generate(CONVERSATIONS[1], max_new_tokens=3, num_beams=2)
            found[target] = [each.token_ids for each in (*together, beams)]
            opened = vlm._decoder._sessions.opened
    assert found["two"] == found["portable"]
    assert opened == ("router", "decoder_prefill", "decoder_decode")
    assert not any(trt.cuda.left.values())
