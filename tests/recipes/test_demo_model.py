"""The shipped demo model: small, in the authors' format, and it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_export.checkpoint import Checkpoint
from moiie_export.demo.evaluate import ablations, generations, prompts_of, pytorch_answers, score
from moiie_export.demo.moiie import MOIIE
from moiie_export.demo.shipped import export_demo, shipped_checkpoint
from moiie_export.demo.show import show
from moiie_export.model.load import load_model
from moiie_export.source import ModelSource
from moiie_recipes.demo.held_out import held_out
from moiie_runtime.vlm import VLM, load

CHECKPOINT = shipped_checkpoint(MOIIE)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load(export_demo(MOIIE, tmp_path_factory.mktemp("demo")))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_the_model_is_small_and_in_the_authors_format() -> None:
    assert size_of(CHECKPOINT) <= 5_000_000
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        assert checkpoint.config["model_type"] == "bunny-mm-llama3-moe-s"
        assert {entry.dtype for entry in checkpoint.tensors.values()} == {"F16"}
    with ModelSource.open(CHECKPOINT) as source:
        assert source.config.moe is not None
        assert source.config.moe.layers == (1, 3)
        assert (source.config.moe.num_experts, source.config.moe.top_k) == (4, 2)
        assert source.config.vision.image_tokens == 36


def test_the_bundle_answers_held_out_questions(vlm: VLM) -> None:
    items = held_out(200, seed=0)
    bundle = score(MOIIE, items, [each.text for each in generations(MOIIE, vlm, items)])
    assert bundle.overall >= 0.85
    assert bundle.one_thing >= 0.95


def test_pytorch_and_bundle_give_the_same_answers_and_need_the_picture(vlm: VLM) -> None:
    items = held_out(100, seed=1)
    with ModelSource.open(CHECKPOINT) as source:
        model = load_model(source, "float16")
    answers = pytorch_answers(MOIIE, model, vlm, prompts_of(MOIIE, vlm, items))
    assert answers == [each.text for each in generations(MOIIE, vlm, items)]
    whole = score(MOIIE, items, answers).overall
    found = {
        each.name: each.accuracy.overall for each in ablations(MOIIE, model, vlm, items, prompts_of(MOIIE, vlm, items))
    }
    assert found["grey picture"] <= 0.45
    assert found["picture of another question"] <= 0.45
    assert found["vision experts zeroed"] <= whole - 0.10
    assert found["image tokens through the language gate"] <= whole - 0.10
    assert pytorch_answers(MOIIE, model, vlm, prompts_of(MOIIE, vlm, items)) == answers, (
        "an ablation left the model changed"
    )


def test_the_demo_draws_asks_and_shows_the_routing(vlm: VLM, tmp_path: Path) -> None:
    shown = show(MOIIE, vlm, tmp_path, seed=0)
    assert shown.picture.is_file()
    assert len(shown.answers) == 3
    assert len({each.kind for each in shown.answers}) == 3
    assert shown.routing is not None
    counts = shown.routing.counts
    vision_only, language_only = counts[:, 0], counts[:, 3]
    assert (vision_only[:, 0] == 0).all()
    assert (language_only[:, 1] == 0).all()
    assert (counts.sum(axis=1)[:, 1] == 3 * 2 * 35).all(), "35 image tokens a question, two experts each"
