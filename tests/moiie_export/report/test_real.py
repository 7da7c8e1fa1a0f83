"""Pages of real comparisons: one that holds, and one of a bundle with two experts exchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_export.parity import check_parity
from moiie_export.report import render
from tests.exports import exported
from tests.moiie_export.parity.conftest import CONTEXT, SETTINGS, Model
from tests.moiie_export.report.pages import read


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """The model that parity's own tests use."""
    return Model(exported(SETTINGS, max_context=CONTEXT), tmp_path)


def exchanged(tensors: dict[str, Any]) -> dict[str, Any]:
    """Expert 0 of layer 1 in the place of expert 3, and the reverse."""
    first, second = "layers.1.mlp.experts.0.", "layers.1.mlp.experts.3."
    pairs = {name: name.replace(first, second) for name in tensors if first in name}
    assert pairs
    return tensors | {a: tensors[b] for a, b in pairs.items()} | {b: tensors[a] for a, b in pairs.items()}


def test_a_bundle_that_is_its_checkpoint(model: Model) -> None:
    document = check_parity(model.base.bundle, model.base.checkpoint).to_dict()
    text = json.dumps(document, allow_nan=False)
    assert len(text) < 150_000
    page = read(render(json.loads(text)))
    assert len(page.all("section")) == 8, "all but what was left out"
    assert "passed" in page.all("header")[0].text
    assert "All tokens go to the same experts on both sides" in page.text
    answers = page.all("article")
    assert [answer.all("h3")[0].text.split()[-1] for answer in answers] == ["tokens"] * 3
    assert not page.all("mark")


def test_a_bundle_that_is_not(model: Model) -> None:
    bundle = model.with_tensors(exchanged)
    document = check_parity(bundle, model.base.checkpoint).to_dict()
    page = read(render(document))
    header = page.all("header")[0].text
    assert "layer 1, prefill hidden states, case “picture”" in header
    captions = [caption.text for caption in page.all("figcaption")]
    assert [caption for caption in captions if "first failure in layer 1" in caption] == captions[:2]
    charts = [chart.all("desc")[0].text for chart in page.all("svg")]
    assert "Failed: layers 1–3" in charts[0]
    assert any("Tokens go to other experts in layer 3" in chart for chart in charts), (
        "layer 1 still routes as it should"
    )
