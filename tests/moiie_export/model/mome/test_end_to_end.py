"""The whole MoME against the authors' own numbers: two pictures, two questions, twelve greedy tokens each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moiie_export.model.layers import rotary_angles
from moiie_export.model.mome.encoders import weighted_sum

PROBES = {
    "clip": ("clip.tower", "clip.norm", "clip.projected"),
    "dino": ("dino.patch_tokens", "dino.pooled", "dino.adt", "dino.projected"),
    "pix2struct": ("pix.last_hidden_state", "pix.pooled", "pix.adt", "pix.projected"),
}


def test_the_pictures_are_prepared_as_the_authors_do(samples: Any) -> None:
    """Proof that the numbers below begin with the right input."""
    for number, sample in enumerate(samples):
        about = sample.case.about["preprocessing"][f"sample{number}"]
        flat, grid = sample.patches
        assert (list(grid), flat.shape[1]) == (about["grid_rows_cols"], about["real_rows"])
        assert float(flat.double().sum()) == pytest.approx(about["sum"], abs=1.0)
        assert float(flat.double().abs().sum()) == pytest.approx(about["abs_sum"], rel=1e-6)
        for pixels, key in ((sample.clip_pixels, "clip_image"), (sample.dino_pixels, "dino_image")):
            assert list(pixels.shape[1:]) == about[key]["shape"]
            assert float(pixels.double().sum()) == pytest.approx(about[key]["sum"], rel=1e-6)
    rows = samples[0].case.expected["pre.flattened_rows"].long()
    samples[0].case.close(samples[0].patches[0][0, rows], "pre.flattened_patches")


@pytest.mark.parametrize("key", [key for keys in PROBES.values() for key in keys])
def test_vision_experts(samples: Any, key: str) -> None:
    sample = samples[0]
    assert [list(each.shape) for each in sample.features] == [[1, 257, 32], [1, 256, 32], [1, 256, 32]]
    sample.case.close(sample.probes[key][0], key)


def test_router(samples: Any) -> None:
    sample = samples[0]
    routing, close = sample.routing, sample.case.close
    close(routing.sentence_embedding, "sentence_embedding")
    torch.testing.assert_close(
        routing.sentence_embedding, sample.case.expected["sentence_embedding"], atol=1e-6, rtol=0
    )
    close(routing.move_logits[0], "move.router_logits")
    close(routing.move_weights[0], "move.weights")
    for layer in range(2):
        close(routing.mole_logits[0, layer], f"mole.{layer}.router_logits")
    assert routing.mole_index.dtype == torch.int32
    assert routing.mole_index.tolist() == [sample.case.about["routes_per_layer"]]
    assert routing.mole_index[0].tolist() == sample.case.expected["mole.expert_per_layer"].tolist()


def test_aggregation_and_the_decoders_input(samples: Any) -> None:
    sample = samples[0]
    clip, dino, pix = sample.features
    summed = weighted_sum(sample.routing.move_weights, [clip[:, 1:], dino, pix])
    sample.case.close(summed[0], "move.output")
    before = len(sample.case.about["prompt_ids"]["before"])
    assert torch.equal(sample.embeds[before], clip[0, 0])  # the class token is not weighed
    assert torch.equal(sample.embeds[before + 1 : before + 257], summed[0])
    sample.case.close(sample.embeds, "inputs_embeds")
    assert sample.case.expected["attention_mask"].tolist() == [1] * len(sample.embeds)


def test_residual_stream_adapters_and_logits_of_the_prompt(samples: Any) -> None:
    sample = samples[0]
    for layer in range(2):
        sample.case.close(sample.prompt.hidden[layer], f"hidden.{layer}")
        sample.case.close(sample.prompt.adapted[layer][0], f"mole.{layer}.adapter_output")
    sample.case.close(sample.prompt.logits[0], "prefill_logits")


def test_greedy_ids_and_logits_of_every_step(samples: Any) -> None:
    """What generate() returned begins with the start token."""
    start = samples[0].case.about["special_ids"]["bos"]
    ids, logits = samples[0].steps
    assert [start, *ids] == samples[0].case.expected["greedy_ids"].tolist()
    samples[0].case.close(logits, "step_logits")
    assert [start, *samples[1].steps[0]] == samples[1].case.expected["sample1.greedy_ids"].tolist()


def test_a_batch_of_two_requests_with_their_own_adapters(samples: Any, golden_mome: Any, tokenize: Any) -> None:
    """Different pictures, questions, lengths and adapters in one call, padded on the right with garbage."""
    case = samples[0].case
    routing = golden_mome.router(*tokenize(case.about["questions"]))
    torch.testing.assert_close(
        routing.sentence_embedding, case.expected["batch2.sentence_embeddings"], atol=1e-6, rtol=0
    )
    assert routing.mole_index.tolist() == case.about["batch2_routes"]
    assert routing.mole_index.tolist() == case.expected["batch2.mole_expert_per_layer"].tolist()
    adapters = golden_mome.mole.choose(routing.mole_index)
    lengths = torch.tensor([len(sample.embeds) for sample in samples])
    longest = int(lengths.max())
    rows = torch.full((2, longest, 32), 3.0)
    for row, sample in enumerate(samples):
        rows[row, : lengths[row]] = sample.embeds
    close_embeds(case, rows, lengths)
    cache = golden_mome.new_cache(2, longest + 12)
    out = golden_mome.decoder(rows, None, torch.zeros(2).long(), (lengths - 1).unsqueeze(1), cache, adapters)
    ids = [out.logits[:, -1].argmax(dim=-1)]
    for step in range(11):
        embedded = golden_mome.embed_tokens(ids[-1]).unsqueeze(1)
        out = golden_mome.decoder(embedded, None, lengths + step, None, out.present, adapters)
        ids.append(out.logits[:, -1].argmax(dim=-1))
    assert torch.stack(ids, dim=1).tolist() == case.expected["batch2.greedy_ids"][:, 1:].tolist()


def close_embeds(case: Any, rows: torch.Tensor, lengths: torch.Tensor) -> None:
    """Theirs are padded inside, between picture and question; without the padding both are the same rows."""
    for row, (theirs, mask) in enumerate(
        zip(case.expected["batch2.inputs_embeds"], case.expected["batch2.attention_mask"], strict=True)
    ):
        torch.testing.assert_close(rows[row, : lengths[row]], theirs[mask == 1], atol=1e-3, rtol=1e-4)


def test_the_adapters_matter(samples: Any, golden_mome: Any) -> None:
    """Proof that the tests above can fail: another adapter in one layer, or none, moves the logits."""
    sample = samples[0]
    length, zero = len(sample.embeds), torch.zeros(1, dtype=torch.int64)
    other = sample.routing.mole_index.clone()
    other[0, 1] = (other[0, 1] + 1) % 4
    for adapters in (golden_mome.mole.choose(other), None):
        cache = golden_mome.new_cache(1, length)
        out = golden_mome.decoder(sample.embeds[None], None, zero, torch.tensor([[length - 1]]), cache, adapters)
        assert float((out.logits[0, -1] - sample.prompt.logits[0, -1]).abs().max()) > 0.1


def test_rotary_tables_rounded_to_bfloat16_are_the_authors(samples: Any, golden_mome: Any) -> None:
    """Exact tables miss the tolerance tenfold, so the comparison above settles which ones the model runs with."""
    angles = rotary_angles(torch.arange(400)[None], 8, 10000.0, "bfloat16")
    exact = rotary_angles(torch.arange(400)[None], 8, 10000.0)
    for rounded, plain in zip(angles, exact, strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, plain.to(torch.bfloat16).float())
        assert not torch.equal(rounded, plain)
    sample, length = samples[0], len(samples[0].embeds)
    assert golden_mome.decoder.rotary_table == "bfloat16"
    golden_mome.decoder.rotary_table = "float32"
    try:
        cache = golden_mome.new_cache(1, length)
        zero = torch.zeros(1, dtype=torch.int64)
        out = golden_mome.decoder(sample.embeds[None], None, zero, None, cache, sample.adapters)
    finally:
        golden_mome.decoder.rotary_table = "bfloat16"
    assert float((out.hidden[1] - sample.case.expected["hidden.1"]).abs().max()) > 1e-2
