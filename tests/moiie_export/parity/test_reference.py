"""The reference follows the bundle at ties, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moiie_export.model.load import load_model
from moiie_export.model.moe import MoeBlock, Routing
from moiie_export.parity.reference import Inputs, Reference, _settle
from moiie_export.source import ModelSource
from tests.moiie_export.parity.conftest import Model

LOGITS = [[2.0, 1.0, 1.000001, -torch.inf], [-torch.inf, 3.0, 1.0, 0.0], [0.5, 0.4, 0.3, 0.2]]


def own() -> Routing:
    logits = torch.tensor(LOGITS)
    ids = logits.topk(2, dim=-1).indices
    weights = logits.softmax(-1).gather(-1, ids)
    return Routing(ids.to(torch.int32), weights / weights.sum(-1, keepdim=True), logits)


def test_a_tie_is_followed_with_the_weights_of_the_followed_experts() -> None:
    guide = np.array([[1, 0], [1, 2], [0, 1]], np.int32)
    routing, decisions = _settle(own(), guide, 1e-5)
    assert decisions.tie.tolist() == [True, False, False]
    assert decisions.own.tolist()[0] == [0, 2]
    assert sorted(routing.expert_ids[0].tolist()) == [0, 1]
    probabilities = torch.tensor(LOGITS).softmax(-1)[0]
    expected = probabilities[[1, 0]] / probabilities[[1, 0]].sum()
    torch.testing.assert_close(routing.expert_weights[0], expected)
    assert torch.equal(routing.expert_ids[1:], own().expert_ids[1:])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([3, 0], id="an expert of the other modality"),
        pytest.param([0, 0], id="one expert twice"),
        pytest.param([0, 7], id="no such expert"),
        pytest.param([-1, 0], id="a negative id"),
        pytest.param([1, 2], id="not the best one"),
    ],
)
def test_what_is_no_tie_is_not_followed(row: list[int]) -> None:
    guide = np.array([row, [1, 2], [0, 1]], np.int32)
    routing, decisions = _settle(own(), guide, 1e-5)
    assert not decisions.tie.any()
    assert torch.equal(routing.expert_ids, own().expert_ids)


def test_the_margin_decides() -> None:
    guide = np.array([[0, 2], [1, 2], [0, 2]], np.int32)  # the third token's gap is about 0.03
    assert _settle(own(), guide, 0.01)[1].tie.tolist() == [False, False, False]
    assert _settle(own(), guide, 0.10)[1].tie.tolist() == [False, False, True]
    assert not _settle(own(), guide, 0.0)[1].tie.any()
    margins = _settle(own(), None, 0.0)[1].margin
    assert 0 < margins[0] < 1e-5 < margins[2] < 0.1


def test_without_a_router_there_are_no_ties() -> None:
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    routing, decisions = _settle(Routing(ids, torch.ones(2, 1), None), np.array([[1], [1]]), 1.0)
    assert routing.expert_ids.tolist() == [[0], [1]]
    assert not decisions.tie.any()
    assert np.isinf(decisions.margin).all()


def test_the_model_is_as_it_was_afterwards(model: Model) -> None:
    """A run without a guide is the plain model, and the model keeps no trace of a guide."""
    with ModelSource.open(model.base.checkpoint) as source:
        loaded = load_model(source)
    reference = Reference(loaded, tie_margin=1.0)
    embeds = reference.embed(np.arange(5))
    inputs = Inputs(embeds, np.array([0, 1, 1, 0, 0], np.int32), 0, np.array([4]))
    plain = reference.run(inputs, loaded.new_cache(1, 8), {})
    ids = plain.trace.routing[1].expert_ids
    other = np.where(np.isin(ids, 1).any(axis=1, keepdims=True), [[1, 2]], ids).astype(np.int32)
    guided = reference.run(inputs, loaded.new_cache(1, 8), {1: other})
    assert guided.decisions[1].tie.any()
    assert np.array_equal(np.sort(guided.trace.routing[1].expert_ids), np.sort(other))
    assert not np.array_equal(guided.trace.hidden[1], plain.trace.hidden[1])
    assert np.array_equal(guided.trace.hidden[0], plain.trace.hidden[0])
    again = reference.run(inputs, loaded.new_cache(1, 8), {})
    assert np.array_equal(again.trace.logits, plain.trace.logits)
    assert all("route" not in vars(block) for block in loaded.modules() if isinstance(block, MoeBlock))
    assert plain.serves({1: ids})
    assert not plain.serves({1: other})
