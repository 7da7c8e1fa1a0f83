"""Whole requests to a bundle whose experts the instruction chooses; the graphs are numpy functions."""

from __future__ import annotations

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.memory import Request, estimate_memory
from tests.runtime import instance_bundle as made

IMAGE = made.picture()
PICTURED = [{"role": "user", "content": [IMAGE, "What is this?"]}]
TEXT = [{"role": "user", "content": "Where is it?"}]
RAW = "USER: <Img><image></Img>\x1eWhat is this? ASSISTANT: "
TURNS = [*PICTURED, {"role": "assistant", "content": "This."}, *TEXT]


@pytest.fixture
def graphs():
    return made.Graphs()


@pytest.fixture
def vlm(tmp_path, graphs):
    with made.load(made.write(tmp_path / "bundle"), graphs) as model:
        yield model


def chosen(question):
    """What the router says to a question alone."""
    ids = [2, *(made.WORDS.index(word) for word in question.lower().replace("?", " ?").split()), 3]
    return made.route(np.array([ids]), np.ones((1, len(ids)), np.int64))


def test_a_request_is_routed_once_by_its_raw_question(vlm, graphs):
    answer = vlm.generate(PICTURED, max_new_tokens=5)
    assert graphs.runs["router"] == 1
    assert graphs.runs["decoder_prefill"] == 1
    assert graphs.runs["decoder_decode"] == 4
    expected = chosen("What is this?")
    np.testing.assert_array_equal(answer.move_weights, expected["move_weights"][0])
    np.testing.assert_array_equal(answer.mole_index, expected["mole_index"][0])
    assert answer.instance.contributions.shape == (3,)
    assert graphs.opened == ["router", "vision_clip", "vision_dino", "vision_pix2struct", *made.COMPONENTS[-2:]]
    assert answer.image_tokens == 5


def test_adapters_are_bound_once_a_graph_and_never_fed(vlm, graphs):
    vlm.generate(PICTURED, max_new_tokens=5)
    for component in ("decoder_prefill", "decoder_decode"):
        bound = {name: count for name, count in graphs.bound[component].items() if name.startswith("adapter.")}
        assert bound == dict.fromkeys(
            (f"adapter.{layer}.{part}" for layer in (0, 1) for part in ("down", "down_bias", "up", "up_bias", "scale")),
            1,
        )
        assert not any(name.startswith("adapter") for fed in graphs.fed[component] for name in fed)


def test_text_alone_uses_adapters_and_no_encoder(vlm, graphs):
    answer = vlm.generate(TEXT)
    assert not any(component.startswith("vision") for component in graphs.opened)
    np.testing.assert_array_equal(answer.mole_index, chosen("Where is it?")["mole_index"][0])
    assert answer.instance.contributions is None


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("messages", [TEXT, PICTURED])
def test_weights_of_router_and_encoders_go_after_the_prefill(vlm, graphs, monkeypatch, beams, messages):
    seen = []
    monkeypatch.setattr(vlm._decoder, "release_prefill_weights", lambda: seen.append(dict(graphs.runs)))
    vlm.generate(messages, num_beams=beams)
    [runs] = seen
    assert runs["decoder_prefill"] == 1
    assert "decoder_decode" not in runs


def test_all_pages_go_and_decode_takes_back_what_it_reads(tmp_path, monkeypatch):
    data = made.manifest()
    names = {"router": ["r"], "vision_clip": ["c", "d"], "prefill": ["p", "d"], "decode": ["d", "mole.0.scale"]}
    for phase, weights in names.items():
        data["residency"][phase]["weights"] = weights
    seen = []
    monkeypatch.setattr("moiie_runtime.decoder.weight_views", lambda header, names: seen.extend(names) or [])
    with made.load(made.write(tmp_path / "bundle", data), made.Graphs()) as model:
        model.generate(PICTURED)
    assert seen == ["c", "d", "mole.0.scale", "p", "r"]


def test_another_question_on_the_picture_runs_no_encoder(vlm, graphs):
    first = vlm.generate(PICTURED)
    other = vlm.generate([{"role": "user", "content": [IMAGE, "Where is it?"]}])
    assert first.token_ids != other.token_ids
    assert (graphs.runs["router"], graphs.runs["vision_dino"]) == (2, 1)
    assert (vlm.feature_cache.hits, vlm.feature_cache.misses) == (3, 3)
    assert vlm.generate(PICTURED).token_ids == first.token_ids


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_its_requests_alone(vlm, graphs, beams):
    conversations = [PICTURED, TEXT, [{"role": "user", "content": [made.picture(1), "is it this"]}]]
    alone = [vlm.generate(each, num_beams=beams) for each in conversations]
    graphs.adapters.clear()
    together = vlm.generate_batch(conversations, num_beams=beams)
    for found, expected in zip(together, alone, strict=True):
        assert found.token_ids == expected.token_ids
        np.testing.assert_array_equal(found.mole_index, expected.mole_index)
        np.testing.assert_array_equal(found.move_weights, expected.move_weights)
    assert len({tuple(answer.mole_index) for answer in alone}) > 1
    scales = made.weights()["mole.0.scale"]
    rows = [float(scales[answer.mole_index[0]]) for answer in alone]
    assert graphs.adapters[0] == ("decoder_prefill", [rows, graphs.adapters[0][1][1]])
    assert graphs.adapters[1][1][0] == [scale for scale in rows for _ in range(beams)]


def test_beams_of_one_request_share_its_adapters(vlm, graphs):
    vlm.generate(PICTURED, num_beams=4)
    assert {(len(layers[0]), len(layers[1])) for _, layers in graphs.adapters} == {(1, 1)}
    assert graphs.fed["decoder_decode"][0]["inputs_embeds"].shape[0] == 4


def test_a_conversation_keeps_the_routes_of_its_first_turn(vlm, graphs):
    first, last = chosen("What is this?"), chosen("Where is it?")
    assert (first["mole_index"] != last["mole_index"]).any()
    np.testing.assert_array_equal(vlm.generate(TURNS).mole_index, first["mole_index"][0])
    np.testing.assert_array_equal(vlm.generate(TURNS, reroute=True).mole_index, last["mole_index"][0])
    [row] = vlm.generate_batch([TURNS], reroute=True)
    np.testing.assert_array_equal(row.move_weights, last["move_weights"][0])
    streamed = [token for chunk in vlm.stream(TURNS, reroute=True) for token in chunk.token_ids]
    assert tuple(streamed) == row.token_ids


def test_a_complete_prompt_needs_its_instruction(vlm):
    expected = vlm.generate(PICTURED)
    found = vlm.generate_prompt(RAW, [IMAGE], instruction="What is this?")
    assert found.token_ids == expected.token_ids
    np.testing.assert_array_equal(found.move_weights, expected.move_weights)
    assert vlm.generate_prompt(RAW, [IMAGE], instruction="it").token_ids != expected.token_ids
    chunks = list(vlm.stream_prompt(RAW, [IMAGE], instruction="What is this?"))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
    with pytest.raises(mr.MoiieError, match="chooses its experts by the instruction") as caught:
        vlm.generate_prompt(RAW, [IMAGE])
    assert "--instruction" in caught.value.hint
    for empty in ("", " \n", 3):
        with pytest.raises(mr.MoiieError, match="the instruction has no text"):
            vlm.generate_prompt(RAW, [IMAGE], instruction=empty)
    with pytest.raises(mr.MoiieError, match="the instruction is not valid Unicode"):
        vlm.generate_prompt(RAW, [IMAGE], instruction="\ud800")


def test_a_prepared_prompt_holds_its_instruction(vlm):
    prompt = vlm.processor.from_text(RAW, [IMAGE], "What is this?")
    assert vlm.generate_prompt(prompt).token_ids == vlm.generate(PICTURED).token_ids
    with pytest.raises(mr.MoiieError, match="holds its instruction already"):
        vlm.generate_prompt(prompt, instruction="What is this?")


def test_bundles_without_a_router_refuse_what_only_a_router_reads(manifest, write_bundle):
    processor = mr.Processor(mr.Bundle.open(write_bundle(manifest)))
    with pytest.raises(mr.MoiieError, match="no instance router reads an instruction"):
        processor.from_text("Q", instruction="Q")
    with pytest.raises(mr.MoiieError, match="has no instance router"):
        processor(TEXT, reroute=True)
    assert processor(TEXT).instruction is None


def test_opening_graphs_counts_in_no_time(tmp_path, monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 1e-6
        return now[0]

    class Slow(made.Graphs):
        def __call__(self, component):
            now[0] += 1000
            return super().__call__(component)

    monkeypatch.setattr("time.perf_counter", tick)
    with made.load(made.write(tmp_path / "bundle"), Slow()) as model:
        for beams in (1, 2):
            stats = model.generate(PICTURED, num_beams=beams).stats
            assert 0 < stats.prefill_seconds < 1
            assert 0 < stats.decode_seconds < 1


def test_image_features_are_the_rows_in_the_decoder_input(vlm, graphs):
    prompt = vlm.processor(PICTURED)
    rows = vlm.image_features(prompt)
    vlm.generate_prompt(prompt)
    [fed] = graphs.fed["decoder_prefill"]
    start = int(np.flatnonzero(prompt.input_ids == -200)[0])
    np.testing.assert_array_equal(fed["inputs_embeds"][0, start : start + 5], rows[0])
    assert vlm.image_features(vlm.processor(TEXT)).shape == (0, 5, made.HIDDEN)
    with pytest.raises(mr.MoiieError, match="the bundle has 3 vision encoders, each with an input of its own"):
        _ = prompt.pixel_values


def test_a_cache_that_is_used_again_gets_the_adapters_of_the_new_prompt(vlm, graphs):
    cache = KVCache(vlm.bundle, 1)
    for messages in (PICTURED, TEXT):
        vlm._decoder.prefill([vlm.processor(messages)], cache)
    assert graphs.adapters[0][1] != graphs.adapters[1][1]
    vlm._decoder.release(cache)


def test_the_budget_of_the_cache_is_an_argument_of_load(tmp_path):
    root = made.write(tmp_path / "bundle")
    budgets = {given: mr.load(root, feature_cache=given).feature_cache.budget for given in (0, "0", 1000, "2KiB")}
    assert budgets == {0: 0, "0": 0, 1000: 1000, "2KiB": 2048}
    assert mr.load(root).feature_cache.budget == 64 * 2**20
    for given in (-1, True, False, "lots", None):
        with pytest.raises(mr.MoiieError, match="a memory size must be"):
            mr.load(root, feature_cache=given)
    with pytest.raises(mr.MoiieError, match="mean_abs_feature"):
        mr.load(root, skip_below=0.1)


def test_predicted_memory_knows_router_encoders_adapters_and_pictures(vlm):
    bundle = vlm.bundle
    text, pictured = estimate_memory(bundle), estimate_memory(bundle, Request(images=2, picture_bytes=7))
    one = sum(array.nbytes for name, array in made.weights().items() if name.startswith("mole.")) // made.ADAPTERS
    assert text.weights == 1000 + 1000 + one  # router, the larger of prefill and decode, one adapter a layer
    assert pictured.weights == text.weights + 3 * 1000
    assert pictured.pictures == 7 + 2 * 13 * made.HIDDEN * 4
    assert estimate_memory(bundle, Request(feature_bytes=11)).pictures == 11
    assert pictured.activations > text.activations
    batch = estimate_memory(bundle, Request(batch=2, num_beams=3))
    assert (batch.weights, batch.copies) == (2000, 2 * one * (1 + 3))
