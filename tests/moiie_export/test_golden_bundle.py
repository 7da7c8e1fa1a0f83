"""What the authors' code computed, against the inner values of exported graphs: features, every layer's hidden states.

Token ids, logits and routing of whole answers are compared in tests/runtime/test_generate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moiie_export.families import family_of
from moiie_export.parity.graphs import BundleGraphs
from moiie_export.parity.interface import load_graph
from moiie_export.source import ModelSource
from moiie_runtime.bundle import Bundle
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.processor import Processor
from moiie_runtime.prompt import Prompt
from moiie_runtime.tensors import TensorFile
from tests.conftest import GoldenCase


@dataclass
class Exported:
    """A golden case with its bundle's graphs, probes marked as outputs."""

    case: GoldenCase
    bundle: Bundle
    graphs: BundleGraphs
    prompt: Prompt

    def embeds(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the bundle's embedding table."""
        reference = self.bundle.embed_tokens
        return TensorFile(self.bundle.path(reference.file))[reference.tensor][ids]


@pytest.fixture(scope="module")
def exported(golden: GoldenCase, golden_bundle: Callable[[str], Path]) -> Iterator[Exported]:
    bundle = Bundle.open(golden_bundle(golden.name))
    with ModelSource.open(golden.checkpoint) as source:
        wanted = family_of(source.config).components(source.config, bundle.kv_cache.capacity)
    prompt = Processor(bundle).from_text((golden.path / "inputs" / "prompt.txt").read_text("utf-8"), golden.images)
    with BundleGraphs.marked(bundle, wanted, {item.name: load_graph(bundle, item) for item in wanted}) as graphs:
        yield Exported(golden, bundle, graphs, prompt)


def close(exported: Exported, actual: np.ndarray, key: str) -> None:
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, exported.case.expected[key], **exported.case.tolerance, err_msg=key)


def test_vision_features(exported: Exported) -> None:
    if exported.prompt.pixel_values is None:
        pytest.skip("the case has no image")
    outputs = exported.graphs.run("vision_encoder", {"pixel_values": exported.prompt.pixel_values})
    features, projected = outputs["vision_features"], outputs["image_features"]
    close(exported, features, "vision_features")
    close(exported, projected, "projected_features")


def test_hidden_states_of_prefill_and_decode(exported: Exported) -> None:
    expected, bundle = exported.case.expected, exported.bundle
    np.testing.assert_array_equal(exported.prompt.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(exported.prompt.token_modality, expected["vision_mask"])
    is_image = expected["token_type_ids"] == 1
    embeds = np.empty((len(is_image), bundle.model.hidden_size), np.float32)
    embeds[~is_image] = exported.embeds(expected["input_ids"][expected["input_ids"] >= 0])
    if exported.prompt.pixel_values is not None:
        embeds[is_image] = expected["projected_features"].reshape(-1, embeds.shape[1])
    cache = KVCache(bundle, 1)
    keep = np.arange(len(embeds) - 8, len(embeds))[None]
    trace = exported.graphs.prefill(embeds[None], expected["vision_mask"].astype(np.int32)[None], keep, cache)
    for layer, hidden in enumerate(trace.hidden):
        close(exported, hidden[0][expected["rows"]], f"hidden.{layer}")
    close(exported, trace.logits[0], "prefill_logits")
    cache.lengths += len(embeds)
    for step, token in enumerate(expected["generated_ids"][:-1]):
        trace = exported.graphs.decode(exported.embeds(np.array([[token]])), cache)
        for layer, hidden in enumerate(trace.hidden):
            np.testing.assert_allclose(
                hidden[0, 0], expected[f"decode.hidden.{layer}"][step], **exported.case.tolerance
            )
        np.testing.assert_allclose(trace.logits[0, 0], expected["step_logits"][step + 1], **exported.case.tolerance)
        cache.lengths += 1
