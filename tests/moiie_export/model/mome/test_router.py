"""The instance router: sentence encoder, vision experts' weights, adapters chosen, the weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_export.model.mome.encoders import visual_tokens, weighted_sum
from moiie_export.model.mome.router import MoleRouters
from moiie_export.model.mome.sentence import SentenceEncoder
from moiie_export.model.mome.transformer import Mlp
from moiie_export.mome_config import SentenceConfig
from tests import mome_official as official

SENTENCES = ["What is this?", "Read the second line of the sign on the left, please.", "", "a"]


@pytest.fixture(scope="module")
def encoder(minilm_directory: Any) -> SentenceEncoder:
    """The real all-MiniLM-L6-v2."""
    encoder = SentenceEncoder(SentenceConfig(384, 1536, 6, 12, 30522, 512, 2, 1e-12, 256))
    official.fill(encoder, official.sentence(official.read(minilm_directory / "model.safetensors")))
    return encoder


def test_sentences_equal_transformers(encoder: SentenceEncoder, minilm_directory: Any, tokenize: Any) -> None:
    """BertModel, then mean over real tokens and length 1 (spec 3), in one padded batch."""
    from transformers import BertModel

    theirs = BertModel.from_pretrained(minilm_directory, attn_implementation="eager").eval().requires_grad_(False)
    ids, mask = tokenize(SENTENCES)
    states = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    expected = mean / mean.norm(dim=1, keepdim=True)
    found = encoder(ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(SENTENCES)), atol=1e-6, rtol=0)


def test_padding_changes_no_sentence(encoder: SentenceEncoder, tokenize: Any) -> None:
    """Alone, beside longer ones, or behind garbage ids under a zero mask."""
    ids, mask = tokenize(SENTENCES)
    together = encoder(ids, mask)
    garbage = torch.where(mask == 1, ids, 777)
    torch.testing.assert_close(encoder(garbage, mask), together, atol=1e-6, rtol=0)
    for row, sentence in enumerate(SENTENCES):
        torch.testing.assert_close(encoder(*tokenize([sentence]))[0], together[row], atol=1e-6, rtol=0)


def test_weights_of_the_vision_experts_equal_the_authors(mome_case: Any) -> None:
    case = mome_case("move_router")
    inputs, router = case.tensors("inputs.safetensors"), Mlp(384, 384, 3)
    official.fill(router, official.mlp(case.tensors("state_dict.safetensors"), "router."))
    logits = router(inputs["sentence_embedding"])
    case.close(logits, "router_logits")
    weights = logits.softmax(dim=-1)
    case.close(weights, "weights")
    experts = [inputs[f"expert.{index}"] for index in range(3)]
    case.close(weighted_sum(weights, experts), "output")
    case.close(weighted_sum(torch.ones(3, 3), experts), "output_add_mode")


def test_the_class_token_leads_and_is_not_weighed() -> None:
    generator = torch.Generator().manual_seed(1)
    clip, dino, pix = (torch.randn(2, rows, 3, generator=generator) for rows in (5, 4, 4))
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    for order in ((0, 1, 2), (2, 0, 1)):
        features = [(clip, dino, pix)[index] for index in order]
        tokens = visual_tokens(weights[:, list(order)], features, 4)
        assert tokens.shape == (2, 5, 3)
        assert torch.equal(tokens[:, 0], clip[:, 0])
        torch.testing.assert_close(tokens[0, 1:], 0.5 * clip[0, 1:] + 0.25 * dino[0] + 0.25 * pix[0])
        torch.testing.assert_close(tokens[1, 1:], dino[1])


@settings(deadline=None, derandomize=True, max_examples=20)
@given(layers=st.integers(1, 4), experts=st.integers(1, 5), batch=st.integers(1, 3), width=st.integers(1, 6))
def test_stacked_routers_equal_one_after_the_other(layers: int, experts: int, batch: int, width: int) -> None:
    """Two products for all layers against a loop over Linear, GELU, Linear (spec 6.1)."""
    generator = torch.Generator().manual_seed(layers)
    stacked = MoleRouters(width, width + 1, layers, experts).requires_grad_(False)
    for parameter in stacked.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    sentence = torch.randn(batch, width, generator=generator)
    found = stacked(sentence)
    assert found.shape == (batch, layers, experts)
    for layer in range(layers):
        single = Mlp(width, width + 1, experts)
        leaves = {name: value[layer] for name, value in stacked.state_dict().items()}
        official.fill(single, leaves)
        torch.testing.assert_close(found[:, layer], single(sentence), atol=1e-5, rtol=1e-5)


def test_of_equal_logits_the_first_adapter_is_chosen(golden_mome: Any) -> None:
    """A forced tie in both layers, at ids 1 and 3, and among all (spec 5 B)."""
    router = golden_mome.router
    weight, bias = router.mole.fc2.weight.data.clone(), router.mole.fc2.bias.data.clone()
    embedding = torch.randn(3, 384, generator=torch.Generator().manual_seed(2))
    try:
        router.mole.fc2.weight.data.zero_()
        for row, expected in (([0.0, 2.0, 1.0, 2.0], 1), ([5.0] * 4, 0), ([-1.0, -1.0, 0.0, 0.0], 2)):
            router.mole.fc2.bias.data = torch.tensor([row, row])
            index = router.decide(embedding).mole_index
            assert index.dtype == torch.int32
            assert index.tolist() == [[expected] * 2] * 3
    finally:
        router.mole.fc2.weight.data, router.mole.fc2.bias.data = weight, bias


def test_the_choice_is_made_among_logits_not_among_rounded_probabilities(golden_mome: Any) -> None:
    """Logits that differ by less than their probabilities can show are still told apart."""
    router = golden_mome.router
    weight, bias = router.mole.fc2.weight.data.clone(), router.mole.fc2.bias.data.clone()
    try:
        router.mole.fc2.weight.data.zero_()
        row = [0.0, 1e-8, 0.0, -1.0]
        assert torch.tensor(row).softmax(dim=0)[0] == torch.tensor(row).softmax(dim=0)[1]
        router.mole.fc2.bias.data = torch.tensor([row, row])
        assert router.decide(torch.zeros(1, 384)).mole_index.tolist() == [[1, 1]]
    finally:
        router.mole.fc2.weight.data, router.mole.fc2.bias.data = weight, bias


def test_decisions_of_a_batch_are_those_of_each_sentence(golden_mome: Any, tokenize: Any) -> None:
    together = golden_mome.router(*tokenize(SENTENCES))
    assert together.move_weights.shape == (len(SENTENCES), 3)
    assert together.mole_index.shape == (len(SENTENCES), 2)
    assert together.mole_logits.shape == (len(SENTENCES), 2, 4)
    np.testing.assert_allclose(together.move_weights.sum(dim=1), 1, atol=1e-6)
    for row, sentence in enumerate(SENTENCES):
        alone = golden_mome.router(*tokenize([sentence]))
        assert torch.equal(alone.mole_index[0], together.mole_index[row])
        torch.testing.assert_close(alone.move_weights[0], together.move_weights[row], atol=1e-5, rtol=0)
