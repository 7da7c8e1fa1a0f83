"""Whole answers through exported bundles, against the authors' numbers and against themselves."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.kv_cache import KVCache

ALL = mr.Record(prefill_logits="all", step_logits=True)
TEXT = [{"role": "user", "content": "How many corners does a square have?"}]


def messages(case):
    question = (case.path / "inputs" / "question.txt").read_text(encoding="utf-8")
    return [{"role": "user", "content": [*case.images, question]}]


@pytest.fixture(scope="module")
def vlm(golden_bundle):
    with mr.load(golden_bundle("moiie_phi3"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def picture() -> Path:
    return Path(__file__).parent.parent / "golden" / "moiie_phi3" / "inputs" / "image_0.png"


@pytest.fixture(scope="module")
def pictured(picture):
    return [{"role": "user", "content": [picture, "What is shown in the picture?"]}]


def test_answers_and_logits_equal_the_authors(golden, golden_bundle):
    expected = golden.expected
    with mr.load(golden_bundle(golden.name), threads=1) as vlm:
        found = vlm.generate(messages(golden), max_new_tokens=12, record=ALL)
    assert list(found.token_ids) == golden.about["generation"]["generated_ids"]
    assert found.text == golden.about["generation"]["text"].lstrip()
    assert found.finish_reason == golden.about["generation"]["stopped_by"]
    assert found.prompt_tokens == golden.about["sequence_length"] == len(found.prefill_logits)
    assert found.image_tokens == int(expected["token_type_ids"].sum())
    np.testing.assert_allclose(found.step_logits, expected["step_logits"], **golden.tolerance)
    np.testing.assert_allclose(found.prefill_logits[-8:], expected["prefill_logits"], **golden.tolerance)
    np.testing.assert_array_equal(found.prefill_logits[-1], found.step_logits[0])


def test_routing_equals_the_authors(golden, golden_bundle):
    layers = [
        int(name.split(".")[1]) for name in golden.expected if name.startswith("moe.") and name.endswith(".experts")
    ]
    if not layers:
        pytest.skip("a case without routed experts")
    with mr.load(golden_bundle(golden.name), threads=1) as vlm:
        found = vlm.generate(messages(golden), max_new_tokens=12, record=mr.Record(routing=True)).routing
        groups = vlm.bundle.model.moe.expert_groups
    assert sorted(found.prefill) == sorted(found.decode) == sorted(layers)
    for layer in layers:
        vision = golden.expected["vision_mask"].astype(bool)[:, None]
        ids, decoded = (golden.expected[f"{prefix}moe.{layer}.experts"] for prefix in ("", "decode."))
        if golden.name == "modality_moe_phi3":  # the authors count the experts of each modality from 0
            ids = np.where(vision, ids, ids + min(groups["language"]))
            decoded = decoded + min(groups["language"])
        np.testing.assert_array_equal(found.prefill[layer].expert_ids, ids)
        np.testing.assert_array_equal(found.decode[layer].expert_ids, decoded)
        np.testing.assert_allclose(
            found.prefill[layer].expert_weights, golden.expected[f"moe.{layer}.weights"], atol=1e-4
        )
    if golden.name.startswith("moiie"):
        assert not found.stats().counts[:, 0, 0].any()  # no language token reaches expert 0
        assert not found.stats().counts[:, 3, 1].any()  # no vision token reaches expert 3


def test_a_stream_is_the_answer_in_pieces(vlm, pictured):
    whole = vlm.generate(pictured, max_new_tokens=12)
    chunks = list(vlm.stream(pictured, max_new_tokens=12))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert [chunk.stats.new_tokens for chunk in chunks] == list(range(1, 13))
    assert chunks[-1].stats.decode_seconds >= chunks[-2].stats.decode_seconds > 0
    assert chunks[0].stats.decode_tokens_per_second == 0 < chunks[-1].stats.decode_tokens_per_second


def test_another_question_on_a_picture_runs_no_encoder(golden_bundle, picture, monkeypatch):
    seen, run = [], OnnxRuntimeSession.run

    def spy(session, feeds, outputs=None):
        seen.append(session._where.split()[0])
        return run(session, feeds, outputs)

    monkeypatch.setattr(OnnxRuntimeSession, "run", spy)
    questions = [[{"role": "user", "content": [picture, text]}] for text in ("What is shown?", "Is it a cat?")]
    with mr.load(golden_bundle("moiie_phi3"), threads=1) as cached:
        found = [cached.generate(question, max_new_tokens=3).token_ids for question in questions]
        assert seen.count("vision_encoder") == 1
        assert (cached.feature_cache.hits, cached.feature_cache.misses) == (1, 1)
        assert cached.feature_cache.nbytes == 729 * 32 * 4
    with mr.load(golden_bundle("moiie_phi3"), threads=1, feature_cache=0) as uncached:
        assert [uncached.generate(question, max_new_tokens=3).token_ids for question in questions] == found
    assert seen.count("vision_encoder") == 3


def test_streams_can_take_turns(vlm, pictured):
    expected = [vlm.generate(m, max_new_tokens=8).token_ids for m in (pictured, TEXT)]
    streams = [vlm.stream(m, max_new_tokens=8) for m in (pictured, TEXT)]
    pairs = list(zip(*streams, strict=True))
    assert [tuple(pair[i].token_ids[0] for pair in pairs) for i in (0, 1)] == expected


def test_an_abandoned_stream_lets_go_of_its_cache(vlm, pictured):
    with closing(vlm.stream(pictured, max_new_tokens=8)) as stream:
        next(stream)
        next(stream)
        assert set(vlm._decoder._bound) == {"decoder_prefill", "decoder_decode"}
    assert not vlm._decoder._bound


def assert_same(found, expected):
    assert found.token_ids == expected.token_ids
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    np.testing.assert_allclose(found.step_logits, expected.step_logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found.prefill_logits, expected.prefill_logits, atol=1e-4, rtol=1e-4)
    for layer in expected.routing.prefill:
        for part in ("prefill", "decode"):
            np.testing.assert_array_equal(
                getattr(found.routing, part)[layer].expert_ids, getattr(expected.routing, part)[layer].expert_ids
            )


def test_a_batch_equals_its_rows_alone(vlm, pictured, picture):
    long = [{"role": "user", "content": [picture, "Describe the picture in one sentence. " * 3]}]
    rows = [TEXT, pictured, long]
    record = mr.Record(prefill_logits="all", step_logits=True, routing=True)
    alone = [vlm.generate(row, max_new_tokens=10, record=record) for row in rows]
    ending = alone[0].token_ids[4]  # the first row ends early, at this token
    alone = [vlm.generate(row, max_new_tokens=10, eos_token_id=ending, record=record) for row in rows]
    assert alone[0].finish_reason == "stop"
    assert max(len(answer.token_ids) for answer in alone) > len(alone[0].token_ids)
    together = vlm.generate_batch(rows, max_new_tokens=10, eos_token_id=ending, record=record)
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


def test_draws_in_a_batch_equal_those_alone(vlm, pictured):
    settings = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}
    alone = [vlm.generate(row, **settings).token_ids for row in (TEXT, pictured)]
    assert [answer.token_ids for answer in vlm.generate_batch([TEXT, pictured], **settings)] == alone
    assert vlm.generate(TEXT, **{**settings, "seed": 4}).token_ids != alone[0]
    assert vlm.generate(TEXT, max_new_tokens=8).token_ids != alone[0]


def test_prefill_and_decode_equal_one_shot(vlm, pictured):
    """Teacher-forced: each decode step gives what a prefill of the longer prompt gives."""
    answer = vlm.generate(pictured, max_new_tokens=6, record=ALL)
    prompt = vlm.processor(pictured)
    added = np.array(answer.token_ids[:-1], np.int64)
    whole = replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, added]),
        token_modality=np.concatenate([prompt.token_modality, np.zeros(5, np.int32)]),
        length=prompt.length + 5,
    )
    decoder = vlm._decoder
    result = decoder.prefill([whole], cache := KVCache(vlm.bundle, 1), all_logits=True)
    decoder.release(cache)
    np.testing.assert_allclose(result.logits[0, -6:], answer.step_logits, atol=1e-4, rtol=1e-4)


def test_keys_and_values_stay_at_the_same_address(vlm, pictured, monkeypatch):
    """What ONNX Runtime wrote in every run lies in the buffers of the cache, for past and present alike."""
    seen, caches = [], []
    run, bind = OnnxRuntimeSession.run, KVCache.bind

    def spy(session, feeds, outputs=None):
        result = run(session, feeds, outputs)
        for binding in session._bindings.values():
            written = [value.data_ptr() for value in binding.get_outputs()][: len(session._bound_outputs())]
            names = session._bound_outputs()
            read = [session._bound[name.replace("present", "past_key_values")].ctypes.data for name in names]
            seen.append((names, read, written))
        return result

    monkeypatch.setattr(OnnxRuntimeSession, "run", spy)
    monkeypatch.setattr(KVCache, "bind", lambda cache, *given: (caches.append(cache), bind(cache, *given)))
    vlm.generate(pictured, max_new_tokens=6)
    steps = [entry for entry in seen if entry[0]]
    assert len(steps) == 6
    addresses = caches[0].addresses()
    for names, read, written in steps:
        assert read == written == [addresses[name.removeprefix("present.")] for name in names]
        assert len(names) == 8


def test_finished_rows_keep_their_keys_and_values(vlm):
    prompts = [vlm.processor(TEXT), vlm.processor([{"role": "user", "content": "Describe."}])]
    decoder, cache = vlm._decoder, KVCache(vlm.bundle, 2)
    decoder.prefill(prompts, cache)
    lengths = cache.lengths.copy()
    assert lengths.tolist() == [prompt.length for prompt in prompts]
    before = cache["1.key"].copy()
    for _ in range(3):
        decoder.decode([5, 6], cache, active=np.array([False, True]))
    assert cache.lengths.tolist() == [lengths[0], lengths[1] + 3]
    changed = (cache["1.key"] != before).any(axis=(1, 3))
    assert np.flatnonzero(changed[0]).tolist() == [lengths[0]]  # written and never read: the length did not grow
    assert np.flatnonzero(changed[1]).tolist() == [lengths[1], lengths[1] + 1, lengths[1] + 2]
    decoder.release(cache)


def test_stop_strings_end_the_answer_before_them(vlm, pictured):
    whole = vlm.generate(pictured, max_new_tokens=12)
    stop = whole.text[2:5]  # spans tokens of one character each
    found = vlm.generate(pictured, max_new_tokens=12, stop_strings=[stop])
    assert found.finish_reason == "stop_string"
    assert found.text == whole.text[:2]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < 12
    assert "".join(chunk.text for chunk in vlm.stream(pictured, max_new_tokens=12, stop_strings=[stop])) == found.text


def test_the_end_token_is_among_the_ids_and_can_be_the_first(vlm):
    whole = vlm.generate(TEXT, max_new_tokens=6)
    found = vlm.generate(TEXT, max_new_tokens=6, eos_token_id=[whole.token_ids[3], 349])
    assert (found.token_ids, found.finish_reason) == (whole.token_ids[:4], "stop")
    record = mr.Record(step_logits=True, routing=True)
    first = vlm.generate(TEXT, max_new_tokens=6, eos_token_id=whole.token_ids[0], record=record)
    assert (first.token_ids, first.finish_reason) == (whole.token_ids[:1], "stop")
    assert first.step_logits.shape == (1, 352)
    assert first.routing.decode[1].expert_ids.shape == (0, 2)
    assert first.decode_tokens_per_second == 0


def test_a_complete_prompt_gives_what_its_messages_give(vlm, pictured, picture):
    text = vlm.processor(pictured).text
    expected = vlm.generate(pictured, max_new_tokens=5)
    assert vlm.generate_prompt(text, [picture], max_new_tokens=5).token_ids == expected.token_ids
    prepared = vlm.processor.from_text(text, [picture])
    assert vlm.generate_prompt(prepared, max_new_tokens=5).token_ids == expected.token_ids
    with pytest.raises(mr.MoiieError, match="holds its pictures already"):
        vlm.generate_prompt(prepared, [picture])
    streamed = list(vlm.stream_prompt(text, [picture], max_new_tokens=5))
    assert "".join(chunk.text for chunk in streamed) == expected.text


def test_the_embedding_rows_of_pictures_stand_where_their_markers_were(vlm):
    decoder = vlm._decoder
    grey = np.full((4, 4, 3), 127, np.uint8)
    prompt = vlm.processor.from_text("a<image>b<image>", [grey, grey])
    rows = np.stack([np.full((729, 32), 1 + index, np.float32) for index in range(2)])
    embeds = decoder.inputs_embeds(prompt, rows)
    ids = prompt.input_ids
    first, second = np.flatnonzero(ids == -200)
    assert embeds.shape == (prompt.length, 32)
    assert (embeds[first : first + 729] == 1).all()
    assert (embeds[second + 728 :][:729] == 2).all()
    table = decoder._table
    np.testing.assert_array_equal(embeds[:first], table[ids[:first]])
    np.testing.assert_array_equal(embeds[first + 729 : second + 728], table[ids[first + 1 : second]])


def test_a_float16_table_is_widened_row_by_row(vlm, monkeypatch):
    decoder, prompt = vlm._decoder, vlm.processor(TEXT)
    exact = decoder.inputs_embeds(prompt)
    monkeypatch.setattr(decoder, "_table", decoder._table.astype(np.float16))
    found = decoder.inputs_embeds(prompt)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact.astype(np.float16))


def test_broken_weights_are_an_error_and_not_an_answer(vlm, monkeypatch):
    monkeypatch.setattr(vlm._decoder, "_table", np.full_like(vlm._decoder._table, np.nan))
    with pytest.raises(mr.MoiieError, match="logits are not finite"):
        vlm.generate(TEXT)


def test_a_record_knows_its_values():
    with pytest.raises(mr.MoiieError, match='prefill_logits must be None, "last" or "all", got True'):
        mr.Record(prefill_logits=True)
