"""The model layer by layer is the model: the same logits and routing, with one part's weights in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moiie_export.model.layerwise import LayerByLayer, Row
from moiie_export.model.load import load_model
from moiie_export.model.prompts import decoder_rows, lay_out_questions
from moiie_export.parity.cases import Question, made_up
from moiie_export.source import ModelSource
from moiie_runtime.errors import MoiieError
from tests.conftest import GoldenCase
from tests.exports import exported_mome
from tests.synthetic import write_checkpoint

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def whole(model: Any, row: Row) -> Any:
    """The decoder's output for a prompt in one call."""
    adapters = None if row.adapters is None else model.mole.choose(torch.from_numpy(row.adapters)[None])
    with torch.inference_mode():
        return model.decoder(
            torch.from_numpy(row.embeds)[None],
            torch.from_numpy(row.modality)[None],
            torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(row.kept)[None],
            model.new_cache(1, len(row.embeds)),
            adapters,
        )


@pytest.mark.parametrize("settings", [{"layers": 3}, {"layers": 2, "backbone": "llama", "kv_heads": 2}])
def test_logits_and_routing_are_those_of_the_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", vocab=288, **settings)
    with ModelSource.open(checkpoint) as source:
        parts = LayerByLayer(source)
        rows = decoder_rows(parts, lay_out_questions(source, made_up()))
        results = parts.decode(rows)
        model = load_model(source)
    assert [bool((row.modality == 1).any()) for row in rows] == [True, False, True]
    for row, result in zip(rows, results, strict=True):
        expected = whole(model, row)
        np.testing.assert_allclose(result.logits, expected.logits[0].numpy(), **TOLERANCE)
        routed = {layer: each.expert_ids for layer, each in enumerate(expected.routing) if each is not None}
        assert result.expert_ids.keys() == routed.keys() == {1}
        np.testing.assert_array_equal(result.expert_ids[1], routed[1].numpy())


class Hidden:
    """Keeps the residual stream behind every layer."""

    def __init__(self) -> None:
        self.layers: dict[int, np.ndarray] = {}

    def linear(self, *_: Any) -> None:
        """Not looked at."""

    def routed(self, *_: Any) -> None:
        """Not looked at."""

    def hidden(self, layer: int, rows: torch.Tensor, _: torch.Tensor) -> None:
        self.layers[layer] = rows.numpy()


@pytest.mark.parametrize("name", ["moiie_phi3_two_images", "moiie_phi3_text_only"])
def test_golden_numbers_come_from_the_checkpoint_alone(name: str) -> None:
    """From question and pictures to the authors' own hidden states and experts, without a bundle."""
    case = GoldenCase(name)
    text = (case.path / "inputs" / "question.txt").read_text(encoding="utf-8")
    watcher = Hidden()
    with ModelSource.open(case.checkpoint) as source:
        asked = lay_out_questions(source, [Question("golden", text, tuple(case.images))])
        parts = LayerByLayer(source)
        rows = decoder_rows(parts, asked)
        [result] = parts.decode(rows, watcher)
    np.testing.assert_array_equal(asked[0].layout.ids, case.expected["input_ids"])
    np.testing.assert_array_equal(rows[0].modality, case.expected["vision_mask"])
    kept = case.expected["rows"]
    np.testing.assert_allclose(rows[0].embeds[kept], case.expected["inputs_embeds"], **case.tolerance)
    for layer in range(source.config.text.num_hidden_layers):
        expected = case.expected[f"hidden.{layer}"]
        np.testing.assert_allclose(watcher.layers[layer][kept], expected, **case.tolerance)
    for layer in source.config.moe.layers if source.config.moe else ():
        found, wanted = (
            np.sort(ids, axis=1) for ids in (result.expert_ids[layer], case.expected[f"moe.{layer}.experts"])
        )
        assert (found == wanted).all(axis=1).mean() > 0.999


class Weights:
    """Notes, whenever something is seen, which parts of the model hold weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.most, self.seen = model, 0, set[str]()

    def linear(self, parameter: str, *_: Any) -> None:
        self.seen.add(parameter)
        held = {name.split(".")[2] for name, each in self.model.named_parameters() if _held(name, each)}
        self.most = max(self.most, len(held))

    def routed(self, *_: Any) -> None:
        """Not looked at."""

    def hidden(self, *_: Any) -> None:
        """Not looked at."""


def _held(name: str, parameter: torch.nn.Parameter) -> bool:
    return name.startswith("decoder.layers.") and parameter.device.type != "meta"


def test_one_layer_holds_weights_at_a_time(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=4, vocab=288)
    with ModelSource.open(checkpoint) as source:
        parts = LayerByLayer(source)
        watcher = Weights(parts.model)
        rows = decoder_rows(parts, lay_out_questions(source, made_up()[:1]), watcher)
        parts.decode(rows, watcher)
    assert watcher.most == 1
    assert all(each.device.type == "meta" for each in parts.model.parameters())
    inside = {name for name in watcher.seen if name.startswith("decoder.layers.1.")}
    experts = {f"decoder.layers.1.mlp.experts.{e}.{kind}_proj" for e in range(4) for kind in ("gate_up", "down")}
    assert inside == experts | {f"decoder.layers.1.self_attn.{kind}_proj.weight" for kind in ("qkv", "o")}
    assert "decoder.lm_head.weight" in watcher.seen
    assert any(name.startswith("vision_encoder.tower.layers.0.") for name in watcher.seen)


def test_mome_with_its_router_encoders_and_adapters() -> None:
    """Every part of it in turn gives what the whole gives; the picture's rows are those of the parity reference."""
    with ModelSource.open(exported_mome(max_context=640).checkpoint) as source:
        parts = LayerByLayer(source)
        rows = decoder_rows(parts, lay_out_questions(source, made_up()[:2]))
        results = parts.decode(rows)
        model = load_model(source)
    for row, result in zip(rows, results, strict=True):
        assert row.adapters is not None
        np.testing.assert_allclose(result.logits, whole(model, row).logits[0].numpy(), **TOLERANCE)
    other = Row(rows[1].embeds, rows[1].modality, rows[1].kept, 1 - rows[1].adapters.clip(0, 1))
    with ModelSource.open(exported_mome(max_context=640).checkpoint) as source:
        [changed] = LayerByLayer(source).decode([other])
    assert not np.allclose(changed.logits, results[1].logits, **TOLERANCE), "the adapters count"


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1, vocab=288)
    with ModelSource.open(checkpoint) as source:
        question = Question("long", "Why? " * 4096)
        with pytest.raises(MoiieError, match="long: takes .* positions, the model has 4096"):
            lay_out_questions(source, [question])
