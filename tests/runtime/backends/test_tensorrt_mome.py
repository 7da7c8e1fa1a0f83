"""MoME on the emulated GPU: a router for one text at a time, several encoders, adapters bound once a request."""

from __future__ import annotations

from pathlib import Path

import moiie_runtime as mr
from moiie_export.parity import ParityCase, check_parity, decoder_stage
from tests.exports import exported_mome

PICTURE = Path(__file__).parents[2] / "golden" / "moiie_phi3" / "inputs" / "image_0.png"
CONVERSATIONS = [
    [{"role": "user", "content": [PICTURE, "What is shown?"]}],
    [{"role": "user", "content": "How many corners does a square have?"}],
]


def test_answers_are_those_of_the_portable_graphs(trt, mome_engines):
    trt.cuda.total = 1 << 30
    found = {}
    for target in ("portable", "two"):
        with mr.load(mome_engines, target=target, threads=1) as vlm:
            together = vlm.generate_batch(CONVERSATIONS, max_new_tokens=3, num_beams=1)
            beams = vlm.generate(CONVERSATIONS[1], max_new_tokens=3, num_beams=2)
            found[target] = [each.token_ids for each in (*together, beams)]
            opened = vlm._decoder._sessions.opened
    assert found["two"] == found["portable"]
    assert opened == ("router", "decoder_prefill", "decoder_decode")
    assert not any(trt.cuda.left.values())


def test_it_is_its_checkpoint_through_the_engines(trt, mome_engines, monkeypatch):
    """What the engines do not give is named, and so are the five beams that two rows cannot hold."""
    trt.cuda.total = 1 << 30
    monkeypatch.setattr(decoder_stage, "KEPT", 2)
    report = check_parity(
        mome_engines, exported_mome(640).checkpoint, target="two", cases=[ParityCase("What is it?", (PICTURE,))]
    )
    assert report, report.summary()
    unseen = {check.stage for check in report.checks if not check.ran}
    assert {"the sentence embedding", "logits of adapters", "ADT features", "hidden states", "beams"} <= unseen
    assert {"instance routing", "vision", "KV cache", "logits", "text"} <= {
        each.stage for each in report.checks if each.ran
    }
    assert not any(trt.cuda.left.values())
