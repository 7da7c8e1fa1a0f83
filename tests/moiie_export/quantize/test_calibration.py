"""Calibration against a plain computation with hooks on the whole model, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from PIL import Image

from moiie_export.model.layerwise import LayerByLayer
from moiie_export.model.load import load_model
from moiie_export.model.moe import MoeBlock
from moiie_export.model.prompts import decoder_rows, lay_out_questions
from moiie_export.parity.cases import from_recipe
from moiie_export.quantize.calibration import StatisticsProvider, collect
from moiie_export.quantize.coverage import table_rows
from moiie_export.quantize.gathering import Gathering
from moiie_export.quantize.needs import Needs, case_fingerprint, check_cases
from moiie_export.quantize.statistics import MAX_SAMPLE
from moiie_export.recipe_parity import ParityCase
from moiie_export.source import ModelSource
from moiie_runtime.errors import MoiieError
from tests.conftest import GoldenCase
from tests.synthetic import write_checkpoint

EXPERT, SHARED = "decoder.layers.1.mlp.experts.0.gate_up_proj", "decoder.layers.1.mlp.experts.1.down_proj"
HEAD = "decoder.lm_head.weight"


@pytest.fixture
def case() -> GoldenCase:
    return GoldenCase("moiie_phi3")


@pytest.fixture
def source(case: GoldenCase) -> Iterator[ModelSource]:
    with ModelSource.open(case.checkpoint) as opened:
        yield opened


@dataclass
class Plain:
    """Inputs of every linear layer and expert of the whole model, by hooks of this test alone."""

    model: Any
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    chosen: list[tuple[int, int, bool]] = field(default_factory=list)
    modality: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self._linear(f"{name}.weight"))
            elif isinstance(module, MoeBlock):
                module.register_forward_hook(self._experts(name))

    def _linear(self, name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            self._keep(name, inputs[0])

        return hook

    def _experts(self, name: str) -> Any:
        def hook(block: MoeBlock, inputs: Any, output: Any) -> None:
            x, routing = inputs[0], output[1]
            for expert, weights in block.experts.items():
                mine = (routing.expert_ids == int(expert)).any(dim=1)
                rows = x[mine]
                gate, up = F.linear(rows, weights.gate_up_proj).chunk(2, dim=1)
                self._keep(f"{name}.experts.{expert}.gate_up_proj", rows)
                self._keep(f"{name}.experts.{expert}.down_proj", F.silu(gate) * up)
                layer = int(name.split(".")[2])
                self.chosen += [(layer, int(expert), bool(v)) for v in self.modality[mine] == 1]  # type: ignore[index]

        return hook

    def _keep(self, name: str, rows: torch.Tensor) -> None:
        self.inputs.setdefault(name, []).append(rows.reshape(-1, rows.shape[-1]).clone())


def plainly(source: ModelSource, cases: list[ParityCase]) -> Plain:
    """The whole model on the same decoder input, prompt by prompt; lm_head on language tokens."""
    rows = decoder_rows(LayerByLayer(source), lay_out_questions(source, from_recipe(cases)))
    plain = Plain(load_model(source))
    for row in rows:
        plain.modality = torch.from_numpy(row.modality)
        with torch.inference_mode():
            plain.model.decoder(
                torch.from_numpy(row.embeds)[None],
                plain.modality[None],
                torch.zeros(1, dtype=torch.int64),
                torch.from_numpy(np.flatnonzero(row.modality == 0))[None],
                plain.model.new_cache(1, len(row.embeds)),
            )
    return plain


def test_statistics_are_those_of_plain_hooks(source: ModelSource, case: GoldenCase, tmp_path: Path) -> None:
    cases = [ParityCase("What is shown in the picture?", tuple(case.images)), ParityCase("Name three large things.")]
    plain = plainly(source, cases)
    wanted = {name: Needs(gram="experts" in name) for name in plain.inputs}
    collect(source, cases, wanted, tmp_path / "statistics")
    provider = StatisticsProvider(tmp_path / "statistics", min_tokens=1)
    assert provider.tokens.keys() == wanted.keys()
    for name, batches in plain.inputs.items():
        rows = torch.cat(batches).double()
        found = provider.get(name)
        assert found is not None
        assert found.tokens == len(rows)
        np.testing.assert_allclose(found.mean_abs, rows.abs().mean(0), rtol=1e-4, atol=1e-5)
        assert (found.gram is not None) == ("experts" in name)
        if found.gram is not None:
            np.testing.assert_allclose(found.gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-3)
        assert len(found.sample) == min(len(rows), len(found.sample)) <= MAX_SAMPLE
        distances = torch.cdist(torch.from_numpy(found.sample).double(), rows).min(dim=1).values
        assert distances.max() < 1e-3, f"{name}: the sample holds rows that reached it"


def test_coverage_counts_the_routed_tokens(source: ModelSource, case: GoldenCase, tmp_path: Path) -> None:
    cases = [ParityCase("What is shown in the picture?", tuple(case.images)), ParityCase("Name three large things.")]
    plain = plainly(source, cases)
    collect(source, cases, {EXPERT: Needs()}, tmp_path / "statistics")
    provider = StatisticsProvider(tmp_path / "statistics", min_tokens=1)
    for layer in (1, 3):
        for expert in range(4):
            counts = provider.coverage[str(layer)][str(expert)]
            for modality, vision in (("language", False), ("vision", True)):
                assert counts[modality] == plain.chosen.count((layer, expert, vision))
        assert provider.coverage[str(layer)]["0"]["language"] == provider.coverage[str(layer)]["3"]["vision"] == 0
    assert provider.tokens == {EXPERT: provider.coverage["1"]["0"]["vision"]}
    text = table_rows(provider.coverage, 10**6)
    assert text[1][:2] == ["1", "0"]
    assert text[1][-1] == "fewer than 1000000"


def test_an_expert_with_too_few_tokens_has_no_statistics(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=2, vocab=288)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    wanted = {name: Needs() for name in (EXPERT, SHARED, HEAD)}
    with ModelSource.open(checkpoint) as opened:
        collect(opened, [ParityCase("Why?", (tmp_path / "red.png",))], wanted, tmp_path / "s", mark="a")
    provider = StatisticsProvider(tmp_path / "s", min_tokens=5)
    assert provider.starved == {EXPERT: provider.tokens[EXPERT]}, "three vision tokens at most; 60 of text"
    assert provider.get(EXPERT) is None
    for name in (SHARED, HEAD):
        assert provider.get(name) is not None
    assert provider.get("decoder.layers.0.mlp.down_proj.weight") is None, "not wanted"
    everything = StatisticsProvider(tmp_path / "s", min_tokens=10**6)
    assert everything.get(HEAD) is not None, "only experts can starve"
    assert StatisticsProvider.reopen(tmp_path / "s", "a", 5) is not None
    assert StatisticsProvider.reopen(tmp_path / "s", "b", 5) is None
    assert StatisticsProvider.reopen(tmp_path / "none", "a", 5) is None


def test_prompts_without_pictures_starve_vision_experts(source: ModelSource, tmp_path: Path) -> None:
    cases = [ParityCase("What?")]
    other = "decoder.layers.3.mlp.experts.0.down_proj"
    with pytest.raises(MoiieError, match="no picture, so nothing reaches expert 0 of layers 1, 3") as caught:
        collect(source, cases, {name: Needs() for name in (EXPERT, other, SHARED)}, tmp_path / "s")
    assert "method: rtn" in str(caught.value.hint)
    assert not (tmp_path / "s").exists()
    tower = "vision_encoder.tower.layers.0.mlp.fc1.weight"
    with pytest.raises(MoiieError, match="nothing reaches vision_encoder"):
        check_cases(source.config, cases, {tower: Needs()})
    check_cases(source.config, cases, {SHARED: Needs(), HEAD: Needs()})
    with pytest.raises(MoiieError, match=r"calibration\.cases: empty, but 1 weights .* the first: decoder.lm_head"):
        check_cases(source.config, [], {HEAD: Needs()})
    check_cases(source.config, [], {})


def test_what_no_linear_layer_multiplies_with_is_named(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="embed_tokens.weight: nothing flows through it"):
        collect(source, [ParityCase("What?")], {"embed_tokens.weight": Needs()}, tmp_path / "s")


def test_fingerprints_follow_prompts_and_pictures(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(picture)
    cases = [ParityCase("What?", (picture,))]
    first = case_fingerprint(cases)
    assert first == case_fingerprint(cases)
    Image.new("RGB", (8, 8), (3, 2, 1)).save(picture)
    assert case_fingerprint(cases) != first
    assert case_fingerprint([ParityCase("Why?", (picture,))]) != case_fingerprint(cases)
    with pytest.raises(MoiieError, match=r"calibration\.cases: .*none\.png: no such file"):
        case_fingerprint([ParityCase("What?", (tmp_path / "none.png",))])


@pytest.mark.parametrize("cuts", [[], [1], [700], [3, 100, 512, 513], list(range(0, 1300, 7))])
def test_how_rows_are_batched_changes_nothing(cuts: list[int]) -> None:
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((1300, 5)).astype(np.float32))
    whole, parts = Gathering(5, gram=True), Gathering(5, gram=True)
    whole.add(rows)
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        parts.add(rows[start:stop])
    expected, found = whole.statistics(), parts.statistics()
    np.testing.assert_array_equal(found.sample, expected.sample)
    np.testing.assert_array_equal(found.sample, rows[::4], err_msg="evenly spread")
    np.testing.assert_allclose(found.mean_abs, rows.abs().mean(0), rtol=1e-6)
    assert found.gram is not None
    np.testing.assert_allclose(found.gram, (rows.double().T @ rows.double() / len(rows)), atol=1e-5)
    assert found.tokens == 1300


def test_nothing_gathered_is_empty() -> None:
    empty = Gathering(3, gram=True)
    empty.add(torch.empty(0, 3))
    found = empty.statistics()
    assert (found.tokens, found.sample.shape, found.usable) == (0, (0, 3), False)
    assert found.gram is not None
    assert not found.gram.any()
