"""The expert block by hand: routing that can be read off, and the identities of spec moiie.md, 1.7 and Appendix A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.config import parse_config
from moiie_export.model.layers import GatedMlp
from moiie_export.model.moe import MoeBlock
from moiie_export.model_config import MoeConfig, TextConfig
from moiie_runtime.prompt import token_modality

CASE = Path(__file__).parents[2] / "golden" / "moiie_phi3"
TOWER = json.loads((CASE / "vision_tower" / "siglip-tiny-patch14-384" / "config.json").read_text())
MODEL_TYPES = ("bunny-phi3-moe", "bunny-phi3-m", "bunny-mm-phi3-moe", "bunny-mm-phi3-moe-s")
HIDDEN, INNER = 8, 12


def configs(model_type: str, **changes: Any) -> tuple[TextConfig, MoeConfig]:
    raw = json.loads((CASE / "checkpoint" / "config.json").read_text())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2}
    counts = {"num_vis_experts": 3, "num_lan_experts": 4}
    config = parse_config({**raw, **sizes, **counts, "model_type": model_type, **changes}, TOWER)
    assert config.moe is not None
    return config.text, config.moe


def block(model_type: str = "bunny-mm-phi3-moe-s", seed: int = 0, **changes: Any) -> MoeBlock:
    """A block with random weights."""
    made = MoeBlock(*configs(model_type, **changes)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return made


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def mask(*modality: int) -> torch.Tensor:
    return torch.tensor(modality, dtype=torch.int32)


def scaled_identities(made: MoeBlock) -> None:
    """Expert e multiplies silu(1) * x by e + 1: gate rows read a constant feature 1, up rows and down rows are identities."""
    for name, expert in made.experts.items():
        expert.gate_up_proj.zero_()
        expert.down_proj.zero_()
        expert.gate_up_proj[:HIDDEN, 0] = 1
        expert.gate_up_proj[INNER : INNER + HIDDEN] = torch.eye(HIDDEN)
        expert.down_proj[:, :HIDDEN] = torch.eye(HIDDEN) * (int(name) + 1)


def readable(made: MoeBlock, x: torch.Tensor, modality: list[int]) -> torch.Tensor:
    """Appendix A, token by token: what the block must equal, written without its ops."""
    moe, out = made.moe, torch.zeros_like(x)
    for t, kind in enumerate(modality):
        ids = moe.expert_groups["vision" if kind else "language"]
        if moe.gates:
            gate = made.gate_vis if kind and not moe.one_gate else made.gate
            chosen, places = F.softmax(gate(x[t]).float(), dim=-1).topk(moe.top_k)
            picks = [(ids[int(place)], weight / chosen.sum()) for place, weight in zip(places, chosen, strict=True)]
        else:
            picks = [(ids[0], torch.tensor(1.0))]
        for expert, weight in picks:
            gate_rows, up_rows = made.experts[str(expert)].gate_up_proj.chunk(2)
            out[t] += weight * (made.experts[str(expert)].down_proj @ (F.silu(gate_rows @ x[t]) * (up_rows @ x[t])))
    return out


def test_a_route_that_can_be_read_off() -> None:
    """Gates that copy features 1 to 3 into their logits: the token says itself where it goes."""
    made = block()
    scaled_identities(made)
    for gate in (made.gate, made.gate_vis):
        gate.weight.zero_()
        gate.weight[:, 1:4] = torch.eye(3)
    x = torch.zeros(2, HIDDEN)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 1.0, 3.0, -5.0, 2.0
    out, routing = made(x, mask(1, 0))
    # rows 0 and 2 of a gate win: vision experts 0 and 2, language experts 1 and 3
    assert routing.expert_ids.tolist() == [[0, 2], [1, 3]]
    first = float(np.exp(3.0) / (np.exp(3.0) + np.exp(2.0)))
    np.testing.assert_allclose(routing.expert_weights, [[first, 1 - first]] * 2, rtol=1e-6)
    inf = float("inf")
    assert routing.router_logits is not None
    assert routing.router_logits.tolist() == [[3.0, -5.0, 2.0, -inf], [-inf, 3.0, -5.0, 2.0]]
    silu = 1 / (1 + np.exp(-1.0))
    scale = [silu * (first * 1 + (1 - first) * 3), silu * (first * 2 + (1 - first) * 4)]
    np.testing.assert_allclose(out, x.numpy() * np.array(scale)[:, None], rtol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_every_variant_equals_the_readable_definition(model_type: str, top_k: int) -> None:
    made = block(model_type, num_experts_per_tok=top_k)
    x, modality = tokens(40), [t % 3 == 0 for t in range(40)]
    out, routing = made(x, torch.tensor(modality).int())
    np.testing.assert_allclose(out, readable(made, x, modality), atol=1e-6, rtol=1e-5)
    groups = made.moe.expert_groups
    for kind, ids in zip(modality, routing.expert_ids.tolist(), strict=True):
        assert set(ids) <= set(groups["vision" if kind else "language"])
        assert len(set(ids)) == made.moe.top_k
    np.testing.assert_allclose(routing.expert_weights.sum(dim=1), 1, rtol=1e-6)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 8, 12, 16])
def test_any_number_of_experts_equals_the_readable_definition(count: int) -> None:
    """Dead experts do not exist in the block; ids stay global."""
    made = block(num_experts=count)
    x, modality = tokens(30), [t % 2 for t in range(30)]
    out, routing = made(x, torch.tensor(modality, dtype=torch.int32))
    np.testing.assert_allclose(out, readable(made, x, modality), atol=1e-6, rtol=1e-5)
    assert [int(e) for e in made.experts] == list(made.moe.reachable)
    assert routing.router_logits is not None
    assert routing.router_logits.shape == (30, count)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_a_modality_every_token_is_language(model_type: str) -> None:
    made, x = block(model_type), tokens(20)
    out, routing = made(x, None)
    expected, explicit = made(x, torch.zeros(20, dtype=torch.int32))
    assert torch.equal(routing.expert_ids, explicit.expert_ids)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(out, readable(made, x, [0] * 20), atol=1e-6, rtol=1e-5)


def test_any_type_but_one_is_language() -> None:
    """Spec 2.1: the collator pads types with token ids such as 32000."""
    made, x = block(), tokens(4)
    _, routing = made(x, mask(0, 2, 32000, -1))
    assert torch.equal(routing.expert_ids, made(x, None)[1].expert_ids)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_with_all_experts_equal_the_block_is_the_dense_layer(model_type: str) -> None:
    """What an upcycled checkpoint computes before training (spec 8.30)."""
    made, x = block(model_type), tokens(25)
    dense = GatedMlp(configs(model_type)[0]).requires_grad_(False)
    first = next(iter(made.experts.values()))
    dense.gate_up_proj.weight.copy_(first.gate_up_proj)
    dense.down_proj.weight.copy_(first.down_proj)
    for expert in made.experts.values():
        expert.load_state_dict(first.state_dict())
    out, _ = made(x, torch.tensor([t % 2 for t in range(25)], dtype=torch.int32))
    np.testing.assert_allclose(out, dense(x), atol=1e-6, rtol=1e-5)


def test_language_never_meets_the_vision_expert_nor_the_vision_gate() -> None:
    """Appendix A: with expert 0 and gate_vis full of NaN, language rows stay finite and vision rows do not."""
    made, x = block(), tokens(12)
    modality = [0, 1] * 6
    clean, _ = made(x, torch.tensor(modality, dtype=torch.int32))
    for parameter in (*made.experts["0"].parameters(), *made.gate_vis.parameters()):
        parameter.fill_(torch.nan)
    text, _ = made(x, None)
    assert torch.isfinite(text).all()
    # the gate's rows are computed for all tokens and chosen afterwards, so NaN logits must not leak
    out, routing = made(x, torch.tensor(modality, dtype=torch.int32))
    assert torch.equal(out[::2], clean[::2])
    assert torch.isfinite(routing.expert_weights[::2]).all()
    assert not torch.isfinite(routing.expert_weights[1::2]).all()


def test_vision_never_meets_the_language_expert() -> None:
    made, x = block(), tokens(12)
    for parameter in made.experts["3"].parameters():
        parameter.fill_(torch.nan)
    out, _ = made(x, torch.ones(12, dtype=torch.int32))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("types", "vision"),
    [
        ([0, 1, 1, 1, 0], [0, 1, 1, 0, 0]),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 0]),
        ([1], [0]),
        ([0, 1, 0, 1, 1], [0, 0, 0, 1, 0]),
        ([32000, 1, 1, 1, 32000], [0, 1, 1, 0, 0]),
    ],
)
def test_the_shifted_mask_of_the_runtime(types: list[int], vision: list[int]) -> None:
    """Facts of Appendix A for the one place where the block's mask is computed."""
    shifted = token_modality(np.array(types, np.int32), last_image_token_is_language=True)
    assert shifted.tolist() == vision
    _, routing = block()(tokens(len(types)), torch.from_numpy(shifted))
    assert routing.router_logits is not None
    assert torch.isneginf(routing.router_logits[:, 3]).int().tolist() == vision


def test_an_unreachable_expert_has_no_parameters() -> None:
    made = block(num_experts=8)
    assert "7" not in made.experts
    assert made.gate.weight.shape == made.gate_vis.weight.shape == (6, HIDDEN)
    vanilla = block("bunny-phi3-moe")
    assert not hasattr(vanilla, "gate_vis")
    hard = block("bunny-phi3-m")
    assert not hasattr(hard, "gate")
    assert not hasattr(hard, "gate_vis")
