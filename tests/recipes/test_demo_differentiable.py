"""The training path computes what the exported model computes, and its gradients are right."""

from __future__ import annotations

import torch

from moiie_export.model.vlm import VlmModel
from moiie_export.ops.cached_attention import cached_attention
from moiie_export.ops.expert_dispatch import expert_dispatch
from moiie_export.ops.modality_router import modality_router
from moiie_export.ops.topk_route import topk_route
from moiie_export.upcycle_config import sparse_config, sparse_shape
from moiie_recipes.demo import differentiable
from moiie_recipes.demo.architecture import dense_config
from moiie_recipes.demo.batches import SEGMENT, ask_batch, encode_question, make_layout, pack, training_scene
from moiie_recipes.demo.losses import balance_loss
from moiie_recipes.demo.questions import KINDS
from moiie_recipes.demo.saving import new_model
from moiie_recipes.demo.stages import answer_logits
from moiie_recipes.demo.tokenizer import build_tokenizer

GROUPS = ((1, 2, 3), (0, 1, 2))


def sparse_model() -> VlmModel:
    tokenizer = build_tokenizer()
    dense = dense_config(tokenizer.get_vocab_size(), 0, 1)
    return new_model(sparse_config(dense, sparse_shape(dense, "config.json", 4, 2)), seed=1)


def test_router_and_dispatch_equal_the_ops() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, gates = random(30, 8), (random(3, 8), random(3, 8))
    modality = torch.randint(0, 2, (30,), generator=generator, dtype=torch.int32)
    logits = differentiable.modality_router(hidden, gates, modality, GROUPS, 4)
    torch.testing.assert_close(logits, modality_router(hidden, gates[0], modality, gates[1], *map(list, GROUPS), 4))
    ids, weights = differentiable.topk_route(logits, 2)
    op_ids, op_weights = topk_route(logits, 2)
    torch.testing.assert_close(ids, op_ids.long())
    torch.testing.assert_close(weights, op_weights)
    gate_up, down = [random(10, 8) for _ in range(4)], [random(8, 5) for _ in range(4)]
    experts = {e: (gate_up[e], down[e]) for e in range(4)}
    out = differentiable.expert_dispatch(hidden, ids, weights, experts)
    torch.testing.assert_close(out, expert_dispatch(hidden, op_ids, op_weights, gate_up, down, [0, 1, 2, 3]))


def test_attention_equals_the_op() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
    empty = torch.zeros(2, 2, 12, 8)
    positions = torch.arange(7).repeat(2, 1)
    expected, _, _ = cached_attention(query, key, value, empty, empty, positions, 2, 0)
    out = differentiable.attend(query, key, value, torch.ones(7, 7, dtype=torch.bool).tril())
    torch.testing.assert_close(out, expected)


def test_a_row_of_many_questions_gives_each_what_the_model_gives_it_alone() -> None:
    """Shared prefix, shared picture, masked questions: all equal to separate prompts through the model's own forward."""
    model, tokenizer, count = sparse_model().eval(), build_tokenizer(), 4
    layout = make_layout(tokenizer, count)
    scenes = [training_scene(0, index, 5) for index in range(3)]
    batch = pack(tokenizer, scenes, ask_batch(scenes, count, KINDS, "test"))
    with torch.no_grad():
        together, _ = answer_logits(model, layout, batch)
        features, _ = model.vision_encoder(batch.pixel_values)
    alone = []
    for row in range(len(scenes)):
        for question in range(count):
            cut = slice(question * SEGMENT, (question + 1) * SEGMENT)
            valid = batch.valid[row, cut]
            ids, wanted = batch.ids[row, cut][valid], batch.labels[row, cut][valid] >= 0
            with torch.no_grad():
                before, behind = model.embed_tokens(layout.prefix), model.embed_tokens(ids)
                embeds = torch.cat((before, features[row], behind)).unsqueeze(0)
                modality = torch.zeros(1, embeds.shape[1], dtype=torch.int32)
                modality[0, len(before) : len(before) + layout.image_tokens - 1] = 1
                cache = model.new_cache(1, embeds.shape[1])
                out = model.decoder(embeds, modality, torch.zeros(1, dtype=torch.int64), None, cache)
            alone.append(out.logits[0, -len(ids) :][wanted])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_gradients_of_the_moe_block_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    hidden, down = random(6, 4), [random(4, 3) for _ in range(4)]
    gate_up = [random(6, 4) for _ in range(4)]
    ids = torch.tensor([[0, 1], [2, 1], [3, 2], [1, 0], [2, 3], [0, 2]])
    weights = torch.rand(6, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def block(hidden: torch.Tensor, weights: torch.Tensor, *banks: torch.Tensor) -> torch.Tensor:
        experts = {e: (banks[e], banks[4 + e]) for e in range(4)}
        return differentiable.expert_dispatch(hidden, ids, weights, experts)

    assert torch.autograd.gradcheck(block, (hidden, weights, *gate_up, *down))


def test_balance_loss_is_top_k_when_balanced_and_grows_when_not() -> None:
    tokens = torch.ones(6, dtype=torch.bool)
    balanced = torch.tensor([[2.0, 2.0, -9.0], [2.0, -9.0, 2.0], [-9.0, 2.0, 2.0]]).repeat(2, 1)
    even = balance_loss([balanced], tokens, (0, 1, 2), 2)
    torch.testing.assert_close(even, torch.tensor(2.0))
    uneven = balance_loss([torch.tensor([[5.0, 5.0, -9.0]]).repeat(6, 1)], tokens, (0, 1, 2), 2)
    torch.testing.assert_close(uneven, torch.tensor(3.0), atol=1e-4, rtol=0)
    assert balance_loss([balanced], ~tokens, (0, 1, 2), 2) == 0


def test_labels_are_the_answer_and_its_end() -> None:
    tokenizer = build_tokenizer()
    scene = training_scene(0, 1, 5)
    [questions] = ask_batch([scene], 3, KINDS, "salt")
    batch = pack(tokenizer, [scene], [questions])
    for index, question in enumerate(questions):
        prompt, answer = encode_question(tokenizer, question)
        cut = slice(index * SEGMENT, (index + 1) * SEGMENT)
        labels = batch.labels[0, cut]
        assert labels[labels >= 0].tolist() == answer
        assert int((labels >= 0).nonzero()[0]) == len(prompt) - 1
        assert batch.ids[0, cut][: len(prompt)].tolist() == prompt
        assert tokenizer.decode(answer, skip_special_tokens=True) == f" {question.answer}"
