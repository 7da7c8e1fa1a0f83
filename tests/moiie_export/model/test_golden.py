"""The PyTorch reference against the authors' own numbers, tensor by tensor; ids and routing exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SHAPES = ("modality_hard_phi3", "moiie_llama3", "moiie_phi3", "moiie_phi3_two_images")
"""Cases that differ in what batching and chunking could break: no router, grouped keys, plain, a short window."""


def close(reference: Any, actual: Any, key: str) -> None:
    """Compare with one expected tensor at the case's own tolerance."""
    value = np.asarray(actual)
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value, reference.case.expected[key], **reference.case.tolerance, err_msg=key)


def needs(reference: Any, key: str) -> np.ndarray:
    if key not in reference.case.expected:
        pytest.skip(f"the case has no {key}")
    return reference.case.expected[key]


def sparse_layers(reference: Any) -> tuple[int, ...]:
    moe = reference.model.config.moe
    return moe.layers if moe else ()


def test_pixel_values(reference: Any) -> None:
    stored = next((key for key in reference.case.expected if key.startswith("pixel_values_stride")), None)
    if stored is None:
        pytest.skip("the case has no image")
    stride = int(stored.removeprefix("pixel_values_stride"))
    np.testing.assert_array_equal(reference.pixel_values[..., ::stride, ::stride], reference.case.expected[stored])
    about = reference.case.about["pixel_values"]
    assert list(reference.pixel_values.shape) == about["shape"]
    assert reference.pixel_values.astype(np.float64).sum() == pytest.approx(about["sum"], rel=1e-9)
    for number, picture in enumerate(sorted(reference.case.path.glob("expected_resized_*.png"))):
        resized = np.asarray(Image.open(picture)).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(reference.pixel_values[number], ((resized - 0.5) / 0.5).transpose(2, 0, 1))


def test_vision_features(reference: Any) -> None:
    needs(reference, "vision_features")
    projected, features = reference.vision
    close(reference, features, "vision_features")
    close(reference, projected, "projected_features")


def test_token_types_and_the_vision_mask(reference: Any) -> None:
    np.testing.assert_array_equal(reference.types, reference.case.expected["token_type_ids"])
    mask = reference.mask
    np.testing.assert_array_equal(mask, reference.case.expected["vision_mask"])
    assert mask.sum() == reference.case.about["vision_rows"]
    assert len(mask) == reference.case.about["sequence_length"]


def test_embeddings_and_the_residual_stream(reference: Any) -> None:
    rows = reference.case.expected["rows"]
    close(reference, reference.embeds[rows], "inputs_embeds")
    assert len(reference.prompt.hidden) == reference.model.config.text.num_hidden_layers
    for layer, hidden in enumerate(reference.prompt.hidden):
        close(reference, hidden[rows], f"hidden.{layer}")


def test_inputs_and_outputs_of_the_expert_blocks(reference: Any) -> None:
    rows = reference.case.expected.get("moe_rows", reference.case.expected["rows"])
    captured = [key for key in reference.case.expected if key.endswith((".input", ".output"))]
    assert reference.prompt.logits.shape[:2] == (1, 8)  # running the prompt captures them
    assert len(captured) == 2 * len(sparse_layers(reference))
    for key in captured:
        close(reference, reference.captured[key][0][rows], key)


def test_routing_of_the_prompt(reference: Any) -> None:
    """Expert ids exactly; logits by modality, with -inf exactly where a modality may not go."""
    expected, moe = reference.case.expected, reference.model.config.moe
    vision = reference.mask == 1
    for layer in sparse_layers(reference):
        routing = reference.prompt.routing[layer]
        if not moe.gates:
            np.testing.assert_array_equal(routing.expert_ids[:, 0], np.where(vision, 0, 1))
            assert (routing.expert_weights == 1).all()
            assert routing.router_logits is None
            continue
        ids = own_ids(reference, expected[f"moe.{layer}.experts"], vision)
        np.testing.assert_array_equal(routing.expert_ids, ids)
        assert routing.expert_ids.dtype == torch.int32
        close(reference, routing.expert_weights, f"moe.{layer}.weights")
        logits = routing.router_logits.numpy()
        for modality, rows in (("vision", vision), ("language", ~vision)):
            reachable = list(moe.expert_groups[modality])
            if moe.one_gate:
                break
            close_rows(reference, logits[rows][:, reachable], f"moe.{layer}.router_logits_{modality}")
            assert np.isneginf(np.delete(logits[rows], reachable, axis=1)).all()
        if moe.one_gate:
            close(reference, logits, f"moe.{layer}.router_logits")


def close_rows(reference: Any, actual: np.ndarray, key: str) -> None:
    if len(reference.case.expected[key]):
        close(reference, actual, key)
    assert actual.shape == reference.case.expected[key].shape


def own_ids(reference: Any, theirs: np.ndarray, vision: np.ndarray) -> np.ndarray:
    """Where the modalities have experts of their own, the golden ids count within the group; ours are global."""
    moe = reference.model.config.moe
    if not moe.experts[0].startswith("vis_experts"):
        return theirs
    first = {modality: ids[0] for modality, ids in moe.expert_groups.items()}
    return theirs + np.where(vision, first["vision"], first["language"])[:, None]


def test_rows_per_expert(reference: Any) -> None:
    """The authors' counts, which tell that each group is used as the table says."""
    counts = reference.case.about["expert_rows_per_layer"]
    if not counts:
        pytest.skip("the case has no counts")
    moe, vision = reference.model.config.moe, reference.mask == 1
    for layer, groups in counts.items():
        ids = reference.prompt.routing[int(layer)].expert_ids.numpy()
        for modality, experts in groups.items():
            rows = {"vision": vision, "language": ~vision}.get(modality, np.ones(len(vision), bool))
            found = Counter(moe.experts[e].split(".")[-1] for e in ids[rows].reshape(-1).tolist())
            assert found == Counter(experts)


def test_logits_of_the_prompt(reference: Any) -> None:
    close(reference, reference.prompt.logits[0], "prefill_logits")


def test_greedy_ids_and_logits_of_every_step(reference: Any) -> None:
    ids, logits, _ = reference.steps
    assert (
        ids == reference.case.expected["generated_ids"].tolist() == reference.case.about["generation"]["generated_ids"]
    )
    close(reference, np.stack(logits), "step_logits")


def test_hidden_states_and_routing_of_every_decode_step(reference: Any) -> None:
    """Decode passes no modality at all: its tokens are language tokens (spec 2.3)."""
    _, _, outputs = reference.steps
    for layer in range(reference.model.config.text.num_hidden_layers):
        close(reference, torch.cat([output.hidden[layer] for output in outputs]), f"decode.hidden.{layer}")
    moe = reference.model.config.moe
    for layer in sparse_layers(reference) if moe and moe.gates else ():
        routings = [output.routing[layer] for output in outputs]
        language = np.zeros(len(outputs), bool)
        ids = own_ids(reference, reference.case.expected[f"decode.moe.{layer}.experts"], language)
        np.testing.assert_array_equal(torch.cat([routing.expert_ids for routing in routings]), ids)
        close(reference, torch.cat([routing.expert_weights for routing in routings]), f"decode.moe.{layer}.weights")
        logits = torch.cat([routing.router_logits for routing in routings])[:, list(moe.expert_groups["language"])]
        close(reference, logits, f"decode.moe.{layer}.router_logits")


def test_one_call_over_prompt_and_answer_equals_prefill_and_decode(reference: Any) -> None:
    ids, logits, _ = reference.steps
    embeds = torch.cat([reference.embeds, reference.embed(ids[:-1])])
    mask = np.concatenate([reference.mask, np.zeros(len(ids) - 1, np.int32)])
    first = len(reference.embeds) - 1
    whole = reference.call(embeds, mask, 0, reference.model.new_cache(1, len(embeds)), np.arange(first, len(embeds)))
    limit = 3 * reference.case.about["official_self_difference"]["value"]
    np.testing.assert_allclose(whole.logits[0], np.stack(logits), atol=limit, rtol=0)


@pytest.mark.parametrize("golden", SHAPES, indirect=True)
def test_prefill_in_chunks_equals_prefill_at_once(reference: Any) -> None:
    embeds, mask, cut = reference.embeds, reference.mask, len(reference.embeds) // 3
    cache = reference.model.new_cache(1, len(embeds))
    first = reference.call(embeds[:cut], mask[:cut], 0, cache)
    second = reference.call(embeds[cut:], mask[cut:], cut, first.present, np.arange(-8, 0) + len(embeds) - cut)
    close(reference, second.logits[0], "prefill_logits")
    assert all(not buffer.any() for pair in cache for buffer in pair)


@pytest.mark.parametrize("golden", SHAPES, indirect=True)
def test_rows_of_a_right_padded_batch_equal_the_rows_alone(reference: Any) -> None:
    """A short text row beside the prompt, its padding garbage; then a decode step of both at different lengths."""
    embeds, mask, model = reference.embeds, reference.mask, reference.model
    length, short = len(embeds), 9
    row = reference.embed(list(range(10, 10 + short)))
    alone = reference.call(row, np.zeros(short, np.int32), 0, model.new_cache(1, length + 16))
    padding = torch.full((length - short, row.shape[1]), 3.0)
    both = torch.stack([embeds, torch.cat([row, padding])])
    modality = torch.from_numpy(np.stack([mask, np.r_[np.zeros(short, np.int32), np.ones(length - short, np.int32)]]))
    keep = torch.tensor([[length - 1], [short - 1]])
    cache = model.new_cache(2, length + 16)
    with torch.no_grad():
        batch = model.decoder(both, modality, torch.zeros(2, dtype=torch.int64), keep, cache)
    tolerance = reference.case.tolerance
    np.testing.assert_allclose(batch.logits[0, 0], reference.prompt.logits[0, -1], **tolerance)
    np.testing.assert_allclose(batch.logits[1, 0], alone.logits[0, -1], **tolerance)
    token = reference.steps[0][0]
    step = torch.stack([reference.embed([token]), reference.embed([20])])
    with torch.no_grad():
        batch = model.decoder(step, None, torch.tensor([length, short]), None, batch.present)
    alone = reference.call(reference.embed([20]), None, short, alone.present)
    np.testing.assert_allclose(batch.logits[0, 0], reference.case.expected["step_logits"][1], **tolerance)
    np.testing.assert_allclose(batch.logits[1, 0], alone.logits[0, -1], **tolerance)


def test_the_plain_mask_moves_the_numbers_as_the_authors_say(reference: Any) -> None:
    """Proof that the tests above can fail: only the last token of each image changes sides (spec 2.1)."""
    sensitivity = reference.case.about["sensitivity"]
    if not sensitivity:
        pytest.skip("the mask does not matter here")
    plain = reference.prefill((reference.types == 1).astype(np.int32))
    last = np.flatnonzero((reference.types == 1) & (reference.mask == 0))
    moved = (plain.hidden[1][last] - reference.prompt.hidden[1][last]).abs().max()
    assert float(moved) == pytest.approx(sensitivity["max_abs_change_of_hidden_1_at_last_image_rows"], rel=1e-3)
    assert float(moved) > 100 * reference.case.tolerance["atol"]
    change = 0.0
    ids, logits, _ = reference.steps
    output, cache = plain.logits[0, -1], plain.present
    for step, token in enumerate(ids):
        change = max(change, float(np.abs(output.numpy() - logits[step]).max()))
        result = reference.call(reference.embed([token]), None, len(reference.embeds) + step, cache)
        output, cache = result.logits[0, -1], result.present
    assert change == pytest.approx(sensitivity["max_abs_change_of_step_logits"], rel=2e-2)


@pytest.mark.parametrize("golden", ["moiie_phi3_two_images"], indirect=True)
def test_the_sliding_window_moves_the_numbers_where_it_is_shorter_than_the_prompt(reference: Any) -> None:
    window = reference.model.config.text.visible_keys
    assert window == 1024 < len(reference.embeds)
    for layer in reference.model.decoder.layers:
        layer.self_attn.window = 0
    try:
        unlimited = reference.prefill(reference.mask)
    finally:
        for layer in reference.model.decoder.layers:
            layer.self_attn.window = window
    assert float((unlimited.logits - reference.prompt.logits).abs().max()) > 1
