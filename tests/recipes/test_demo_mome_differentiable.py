"""The MoME demo's training path computes what the exported model computes, and gradients reach what learns."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from moiie_export.model.mome.adt import Adt
from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.mome.model import MomeModel
from moiie_export.model.mome.pooling import pool
from moiie_export.mome_config import AdtConfig
from moiie_export.ops.adapter_dispatch import adapter_dispatch
from moiie_export.ops.deformable_sample import deformable_sample
from moiie_recipes.demo.mome import differentiable
from moiie_recipes.demo.mome.architecture import encoders, model_config, raw_config
from moiie_recipes.demo.mome.batches import SEGMENT, encode_question, make_layout, pack
from moiie_recipes.demo.mome.initial import new_model, replicate_adapters
from moiie_recipes.demo.mome.letters import draw_lettered, make_lettered
from moiie_recipes.demo.mome.pictures import inputs_of
from moiie_recipes.demo.mome.pretraining import tower_features
from moiie_recipes.demo.mome.questions import questions_of
from moiie_recipes.demo.mome.stages import answer
from moiie_recipes.demo.mome.word_lists import BOS, EOS, decoder_tokenizer, sentence_tokenizer
from moiie_recipes.demo.questions import Question
from moiie_runtime.images import Picture
from moiie_runtime.vision import encoder_inputs

TOKENIZERS = (decoder_tokenizer(), sentence_tokenizer())
SCENE = make_lettered("test", 0, 3)


@cache
def model() -> MomeModel:
    words, pieces = TOKENIZERS
    ids = (words.token_to_id(BOS), words.token_to_id(EOS))
    fresh = new_model(model_config(raw_config(words.get_vocab_size(), *ids, pieces.get_vocab_size())), seed=1)
    generator = torch.Generator().manual_seed(5)
    for bank in fresh.mole.values():  # fresh adapters add nothing, and all choose the same
        torch.nn.init.normal_(bank.up_proj.weight, std=0.2, generator=generator)
    torch.nn.init.normal_(fresh.router.mole.fc2.weight, generator=generator)
    torch.nn.init.normal_(fresh.router.move.fc2.weight, generator=generator)
    return fresh.requires_grad_(False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_deformable_sample_equals_the_op_and_its_gradient_is_right() -> None:
    value, points = random(2, 20, 2, 3), 2.5 * random(2, 4, 2, 3, 2) + 1
    weights, size = random(2, 4, 2, 3).softmax(dim=-1), torch.tensor([[5.0, 4.0], [3.0, 6.0]])
    found = differentiable.deformable_sample(value, points, weights, size)
    torch.testing.assert_close(found, deformable_sample(value, points, weights, size))
    inputs = [each.double().requires_grad_() for each in (value, points, weights)]
    assert torch.autograd.gradcheck(lambda *each: differentiable.deformable_sample(*each, size.double()), inputs)


def test_the_adt_equals_the_exported_one() -> None:
    module = Adt(8, 4, AdtConfig(num_layers=2, num_heads=2, num_points=3, ffn_dim=12))
    for index, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    memory, size = random(2, 9, 8), torch.full((2, 2), 3.0)
    pooled = pool(memory, (3, 3), (2, 2))
    with torch.no_grad():
        torch.testing.assert_close(differentiable.adt(module, pooled, memory, size), module(pooled, memory, size))


def test_one_hot_shares_give_the_chosen_adapter() -> None:
    bank = model().mole["1"]
    x, index = random(3, 5, bank.up_proj.weight.shape[1]), torch.tensor([2, 0, 3])
    shares = torch.nn.functional.one_hot(index, len(bank.scale)).float()
    torch.testing.assert_close(differentiable.adapters(bank, x, shares), adapter_dispatch(x, *bank.choose(index)))


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    logits = torch.tensor([[0.3, 1.0, 0.9]], requires_grad=True)
    shares = differentiable.straight_through(logits)
    torch.testing.assert_close(shares, torch.tensor([[0.0, 1.0, 0.0]]))
    gradient = torch.autograd.grad(shares[0, 0], logits)[0]
    soft = torch.autograd.grad(logits.softmax(dim=-1)[0, 0], logits)[0]
    torch.testing.assert_close(gradient, soft)


def question() -> Question:
    return questions_of(SCENE)["letter", "place"][0]


def test_a_row_of_training_equals_a_request_to_the_exported_model() -> None:
    """The whole way: router, encoders, weighted sum, decoder with the chosen adapters."""
    reference, asked = model(), question()
    layout = make_layout(TOKENIZERS[0], reference.config.image_tokens, 1)
    batch = pack(TOKENIZERS, [[asked]], 1)
    inputs = {name: values[None].astype(np.float32) for name, values in inputs_of(reference.config, SCENE).items()}
    towers = {name: values.float() for name, values in tower_features(reference, inputs).items()}
    found = answer(reference, layout, batch, towers)

    routing = reference.router(*batch.sentence)
    picture = Picture(draw_lettered(SCENE))
    features = []
    for encoder in encoders(reference.config):
        given = encoder_inputs(encoder, picture)
        arrays = [torch.from_numpy(array.astype(np.float16).astype(np.float32)) for array in given.values()]
        features.append(reference.get_submodule(encoder.component)(*arrays)[0])
    rows = visual_tokens(routing.move_weights, features, reference.config.queries)
    torch.testing.assert_close(found.rows, rows, atol=5e-3, rtol=0)  # the towers' features are kept in float16

    prompt, label = encode_question(TOKENIZERS[0], asked)
    table = reference.embed_tokens
    text = torch.tensor([*prompt, *label[:-1]])
    parts = [table(layout.prefix), found.rows[0], table(layout.suffix), table(text)]
    embeds = torch.cat(parts).unsqueeze(0)
    length = embeds.shape[1]
    adapters = reference.mole.choose(routing.mole_index)
    cache_ = reference.new_cache(1, length)
    kept = torch.arange(length - len(label), length).unsqueeze(0)
    out = reference.decoder(embeds, None, torch.zeros(1, dtype=torch.int64), kept, cache_, adapters)
    torch.testing.assert_close(found.logits, out.logits[0], atol=1e-4, rtol=1e-4)


def test_questions_of_a_row_do_not_see_each_other() -> None:
    reference, asked = model(), question()
    other = questions_of(SCENE)["letter", "place"][-1]
    towers = {e.name: random(1, 81 if e.adt else 37, e.tower.hidden_size) for e in reference.config.experts}
    alone = answer(reference, make_layout(TOKENIZERS[0], 37, 1), pack(TOKENIZERS, [[asked]], 1), towers)
    both = answer(reference, make_layout(TOKENIZERS[0], 37, 2), pack(TOKENIZERS, [[asked, other]], 2), towers)
    torch.testing.assert_close(both.logits[: len(alone.logits)], alone.logits, atol=1e-4, rtol=1e-4)


def test_labels_are_the_answer_and_its_end() -> None:
    asked = list(questions_of(SCENE)["position", "both"])
    batch = pack(TOKENIZERS, [asked], len(asked))
    for index, each in enumerate(asked):
        prompt, label = encode_question(TOKENIZERS[0], each)
        labels = batch.labels[0, index * SEGMENT : (index + 1) * SEGMENT]
        assert labels[labels >= 0].tolist() == label
        assert int((labels >= 0).nonzero()[0]) == len(prompt) - 1
        assert TOKENIZERS[0].decode(label) == each.answer


def test_stage_two_begins_with_the_adapter_of_stage_one() -> None:
    fresh = new_model(model().config, seed=2)
    for bank in fresh.mole.values():
        torch.nn.init.normal_(bank.up_proj.weight)
        bank.up_proj.weight.data[0] = 7.0
    replicate_adapters(fresh)
    assert all((bank.up_proj.weight == 7.0).all() for bank in fresh.mole.values())
