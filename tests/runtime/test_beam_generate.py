"""Beam search through exported bundles: against a search that runs every beam from its first token, and itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.beam_generate import generate_beams
from moiie_runtime.errors import MissingDependency
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.prompt import Prompt
from tests.runtime.beam_oracle import Oracle, search

TEXT = [{"role": "user", "content": "How many corners does a square have?"}]
SHORT = [{"role": "user", "content": "Describe."}]
PICTURE = Path(__file__).parent.parent / "golden" / "moiie_phi3" / "inputs" / "image_0.png"
PICTURED = [{"role": "user", "content": [PICTURE, "What is shown in the picture?"]}]


@pytest.fixture(scope="module")
def vlm(golden_bundle):
    with mr.load(golden_bundle("moiie_phi3"), threads=1) as model:
        yield model


@pytest.fixture
def changed(golden_bundle, tmp_path):
    """Opens a copy of the bundle with other generation defaults."""
    root = tmp_path / "bundle"
    shutil.copytree(golden_bundle("moiie_phi3"), root)

    def load(**generation):
        manifest = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
        manifest["generation"].update(generation)
        (root / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
        return mr.load(root, threads=1)

    return load


def recomputed(vlm, prompt: Prompt, start: int):
    """Logits after a prompt and the ids of each row from `start` on, all run by prefill."""

    def longer(added):
        types = np.concatenate([prompt.token_modality, np.zeros(len(added), np.int32)])
        ids = np.concatenate([prompt.input_ids, added])
        return replace(prompt, input_ids=ids, token_modality=types, length=len(types))

    def logits(rows):
        cache = KVCache(vlm.bundle, len(rows))
        result = vlm._decoder.prefill([longer(row[start:]) for row in rows], cache)
        vlm._decoder.release(cache)
        return result.logits[:, 0]

    return Oracle(vlm.bundle.model.vocab_size, logits)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("beams", [2, 5])
def test_answers_are_those_of_transformers_over_whole_sequences(vlm, beams, penalty):
    prompt = vlm.processor(TEXT)
    settings = {"max_new_tokens": 8, "num_beams": beams, "repetition_penalty": penalty}
    ids = prompt.input_ids.tolist()
    [expected] = search(recomputed(vlm, prompt, len(ids)), [ids], (3,), **settings)
    assert list(vlm.generate(TEXT, eos_token_id=3, **settings).token_ids) == expected
    assert len(expected) == 8


@pytest.mark.parametrize(("rule", "messages", "start"), [("bos", PICTURED, 1), ("none", TEXT, 351)])
def test_the_bundle_says_what_the_penalty_sees_and_how_many_beams_there_are(changed, vlm, rule, messages, start):
    """As with `generate` of a model that is given embeddings alone, and so no ids of the prompt."""
    prompt = vlm.processor(messages)
    settings = {"max_new_tokens": 5, "num_beams": 3, "repetition_penalty": 1.5, "length_penalty": 0.5}
    ids = [start]  # transformers needs an id, also where there is none; then one that is in no answer
    [expected] = search(recomputed(vlm, prompt, 1), [ids], (3,), **settings)
    with changed(**settings, penalty_prompt=rule) as model:
        found = model.generate(messages, eos_token_id=3).token_ids
        whole = model.generate(messages, num_beams=1, repetition_penalty=1.0).token_ids
    assert list(found) == expected
    assert 351 not in found
    assert whole == vlm.generate(messages, max_new_tokens=5).token_ids


@pytest.mark.parametrize("rule", ["bos", "none"])
def test_greedy_obeys_the_same_rule(changed, vlm, rule):
    before = vlm.generate(TEXT, max_new_tokens=10, repetition_penalty=1.5, record=mr.Record(step_logits=True))
    with changed(penalty_prompt=rule) as model:
        found = model.generate(TEXT, max_new_tokens=10, repetition_penalty=1.5, record=mr.Record(step_logits=True))
    used = [1] if rule == "bos" else []
    for token, logits in zip(found.token_ids, found.step_logits, strict=True):
        scores = logits.copy()
        scores[used] = np.where(scores[used] < 0, scores[used] * np.float32(1.5), scores[used] / np.float32(1.5))
        assert token == scores.argmax()
        used = sorted({*used, token})
    assert found.token_ids != before.token_ids


@pytest.mark.parametrize(("beams", "ends"), [(2, range(250, 350)), (4, range(200, 270))])
def test_a_batch_equals_its_requests_alone(vlm, monkeypatch, beams, ends):
    """So many tokens end an answer that searches are over at three different steps."""
    rows = [TEXT, PICTURED, SHORT, TEXT]
    settings = {"max_new_tokens": 9, "num_beams": beams, "eos_token_id": list(ends)}
    record = mr.Record(prefill_logits="all")
    alone = [vlm.generate(row, record=record, **settings) for row in rows]
    caches, release = [], vlm._decoder.release
    monkeypatch.setattr(vlm._decoder, "release", lambda cache: (caches.append(cache), release(cache)))
    together = vlm.generate_batch(rows, record=record, **settings)
    for found, expected in zip(together, alone, strict=True):
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.finish_reason == expected.finish_reason
        assert found.prefill_logits.shape == expected.prefill_logits.shape == (found.prompt_tokens, 352)
        np.testing.assert_allclose(found.prefill_logits, expected.prefill_logits, atol=1e-4, rtol=1e-4)
    grown = caches[0].lengths.reshape(4, beams) - [[answer.prompt_tokens] for answer in together]
    assert (grown == grown[:, :1]).all()
    assert len({*grown[:, 0]}) == 3  # a search that is over takes no more of the context


def test_prompts_and_pictures_are_run_once(golden_bundle, monkeypatch):
    seen, run = [], OnnxRuntimeSession.run

    def spy(session, feeds, outputs=None):
        seen.append((session._where.split()[0], next(iter(feeds.values())).shape[0]))
        return run(session, feeds, outputs)

    monkeypatch.setattr(OnnxRuntimeSession, "run", spy)
    with mr.load(golden_bundle("moiie_phi3"), threads=1) as model:
        model.generate_batch([TEXT, PICTURED], num_beams=3, max_new_tokens=4)
        assert not model._decoder._bound
    assert seen == [("vision_encoder", 1), ("decoder_prefill", 2), *[("decoder_decode", 6)] * 3]


def test_one_beam_is_greedy(vlm):
    prompts = [vlm.processor(TEXT), vlm.processor(PICTURED)]
    greedy = vlm.generate_batch([TEXT, PICTURED], max_new_tokens=8, num_beams=1)
    answers = vlm._answers(prompts, {"max_new_tokens": 8}, mr.Record())
    beams = generate_beams(vlm._decoder, answers, KVCache(vlm.bundle, 2))
    assert [found.token_ids for found in beams] == [found.token_ids for found in greedy]
    assert [found.text for found in beams] == [found.text for found in greedy]


def test_a_stream_is_one_chunk(vlm):
    whole = vlm.generate(PICTURED, max_new_tokens=8, num_beams=3)
    [chunk] = vlm.stream(PICTURED, max_new_tokens=8, num_beams=3)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == (whole.text, whole.token_ids, "length")
    assert chunk.stats.new_tokens == 8
    assert chunk.stats.prefill_seconds > 0 < chunk.stats.decode_seconds


def test_stop_strings_cut_the_answer_that_was_found(vlm):
    whole = vlm.generate(PICTURED, max_new_tokens=12, num_beams=3)
    stop = whole.text[3:5]
    found = vlm.generate(PICTURED, max_new_tokens=12, num_beams=3, stop_strings=[stop])
    assert found.finish_reason == "stop_string"
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < len(whole.token_ids)


def test_an_end_at_the_first_token_needs_no_decode(golden_bundle, monkeypatch):
    opened, opening = [], OnnxRuntimeSession.__init__

    def spy(session, model, **options):
        opened.append(options["component"])
        opening(session, model, **options)

    monkeypatch.setattr(OnnxRuntimeSession, "__init__", spy)
    with mr.load(golden_bundle("moiie_phi3"), threads=1) as model:
        found = model.generate(TEXT, num_beams=3, max_new_tokens=1)
    assert opened == ["decoder_prefill"]
    assert (len(found.token_ids), found.finish_reason) == (1, "length")
    assert found.decode_tokens_per_second == 0


def test_only_logits_of_the_prompt_can_be_recorded(vlm):
    last = vlm.generate(TEXT, num_beams=2, max_new_tokens=2, record=mr.Record(prefill_logits="last"))
    expected = vlm.generate(TEXT, max_new_tokens=2, record=mr.Record(prefill_logits="last"))
    np.testing.assert_array_equal(last.prefill_logits, expected.prefill_logits)
    assert (last.step_logits, last.routing) == (None, None)
    for name in ("step_logits", "routing"):
        with pytest.raises(mr.MoiieError, match=f"{name} cannot be recorded with num_beams=2") as caught:
            vlm.generate(TEXT, num_beams=2, record=mr.Record(**{name: True}))
        assert "num_beams=1" in caught.value.hint


def test_too_many_beams_are_refused(vlm, golden_bundle):
    with mr.load(golden_bundle("moiie_phi3"), threads=1, memory_limit="200MiB") as model:
        model.generate(TEXT, num_beams=2, max_new_tokens=2)
        with pytest.raises(MissingDependency, match="predicted memory .* exceeds the limit") as caught:
            model.generate(TEXT, num_beams=20000, max_new_tokens=2)
    assert "fewer beams" in caught.value.hint
    with pytest.raises(MissingDependency, match="the system has no room for a key or value buffer") as caught:
        vlm.generate(TEXT, num_beams=10**12, max_new_tokens=2)
    assert "fewer beams" in caught.value.hint


def test_broken_weights_are_an_error_and_leave_no_cache(vlm, monkeypatch):
    monkeypatch.setattr(vlm._decoder, "_table", np.full_like(vlm._decoder._table, np.nan))
    with pytest.raises(mr.MoiieError, match="logits are not finite"):
        vlm.generate(TEXT, num_beams=2)
    assert not vlm._decoder._bound
