"""The manifest's `completeness` is true: a tensor reaches exactly the graphs that it says, measured by changing it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiie_export.completeness import prove
from moiie_export.families import family_of
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, read_header, save_tensors
from tests.exports import Storage, exported

Digests = dict[str, str]
COMMON: dict[str, Any] = {"dtype": "F32", "vocab": 288}
CASES: dict[str, tuple[Storage, dict[str, Any]]] = {
    "moiie_phi3": ("float32", {"layers": 2}),
    "moiie_llama_dead_expert": (
        "float32",
        {"backbone": "llama", "experts": 6, "layers": 1, "moe_layers": "all", "kv_heads": 2, "unfreeze": True},
    ),
    "hard_phi3_float16": ("float16", {"variant": "hard", "layers": 1, "moe_layers": "all", "unfreeze": True}),
}


@dataclass
class Lab:
    """A copy of an exported checkpoint whose tensors can be changed, and what its bundle computes."""

    checkpoint: Path
    bundle: Path
    recipe: Recipe
    files: dict[Path, dict[str, np.ndarray]]
    """Every weight file, those of the separate tower included, with its tensors."""

    @property
    def completeness(self) -> dict[str, Any]:
        """That section of the manifest."""
        manifest = json.loads((self.bundle / "bundle.json").read_text(encoding="utf-8"))
        section: dict[str, Any] = manifest["completeness"]
        return section

    def measure(self, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Digests:
        """Export with every tensor replaced by what `change` gives (None: as it is), and digest what is computed."""
        touched = []
        for path, tensors in self.files.items():
            changed = {name: array for name, old in tensors.items() if (array := change(name, old)) is not None}
            if changed:
                save_tensors(path, {**tensors, **changed})
                touched.append(path)
        result = export_bundle(ExportRequest(self.checkpoint, self.bundle, self.recipe))
        assert {plan.name for plan in result.stages if plan.action == "run"} <= {"weights"}
        for path in touched:
            save_tensors(path, self.files[path])
        return digests(self.bundle)


@pytest.fixture(scope="module", params=CASES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    storage, settings = CASES[request.param]
    original = exported({**COMMON, **settings}, storage)
    folder = tmp_path_factory.mktemp(request.param)
    for part in ("checkpoint", "bundle", "vision_tower"):
        shutil.copytree(original.bundle.parent / part, folder / part)
    weights = sorted(folder.glob("checkpoint/*.safetensors")) + sorted(folder.glob("vision_tower/*/*.safetensors"))
    files = {path: {name: np.array(array) for name, array in _tensors(path).items()} for path in weights}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # hundreds of exports, none of which has to survive a power cut
        yield Lab(folder / "checkpoint", folder / "bundle", original.recipe, files)


def test_a_tensor_changes_exactly_the_graphs_that_the_manifest_names(lab: Lab) -> None:
    before = lab.measure(lambda *_: None)
    listed = lab.completeness["tensors"]
    wrong = {}
    for name, entry in listed.items():
        after = lab.measure(lambda tensor, old, name=name, entry=entry: _nudged(old, entry) if tensor == name else None)  # type: ignore[misc]
        changed = sorted(part for part in before if before[part] != after[part])
        if changed != entry["graphs"]:
            wrong[name] = (entry["graphs"], changed)
    assert wrong == {}
    assert len(listed) > 30


def test_what_is_listed_as_unreachable_changes_nothing(lab: Lab) -> None:
    """All of it at once, rows that the vocabulary cut leaves out included."""
    before = lab.measure(lambda *_: None)
    section = lab.completeness
    cut = {name: entry["rows"] for name, entry in section["tensors"].items() if "rows" in entry}
    changed = []

    def scramble(name: str, old: np.ndarray) -> np.ndarray | None:
        if name not in section["unreachable"] and name not in cut:
            return None
        changed.append(name)
        new = old.copy()
        new[cut.get(name, 0) :] = 5 - 3 * new[cut.get(name, 0) :]
        return new

    assert lab.measure(scramble) == before
    assert set(changed) == {*section["unreachable"], *cut}


def test_every_tensor_of_the_files_is_listed_once(lab: Lab) -> None:
    section = lab.completeness
    names = [name for tensors in lab.files.values() for name in tensors]
    assert sorted(names) == sorted([*section["tensors"], *section["unreachable"]])
    assert all(section["unreachable"].values())


def test_the_probe_reaches_every_expert(lab: Lab) -> None:
    """Without this, a tensor could look unreachable because no token happened to be sent to it."""
    manifest = json.loads((lab.bundle / "bundle.json").read_text(encoding="utf-8"))
    moe = manifest["model"]["moe"]
    prefill, decode = (run(lab.bundle, graph) for graph in ("decoder_prefill", "decoder_decode"))
    for layer in moe["layers"]:
        assert set(prefill[f"expert_ids.{layer}"].flat) == {e for ids in moe["expert_groups"].values() for e in ids}
        assert set(decode[f"expert_ids.{layer}"].flat) == set(moe["expert_groups"]["language"])
    for outputs in (prefill, decode, run(lab.bundle, "vision_encoder")):
        assert all(not np.isnan(array).any() for array in outputs.values())


def digests(bundle: Path) -> Digests:
    """Graph (or "host") -> digest of all that it computes from fixed inputs."""
    found = {graph: _digest(run(bundle, graph)) for graph in ("vision_encoder", "decoder_prefill", "decoder_decode")}
    with TensorFile(bundle / "onnx" / "weights.safetensors") as weights:
        found["host"] = _digest({"embed_tokens": weights["embed_tokens.weight"]})
    return found


def run(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    """Every output of a graph for inputs that depend on their shapes only."""
    with OnnxRuntimeSession(bundle / "onnx" / f"{graph}.onnx", component=graph) as session:
        sizes = {"batch": 8 if graph == "decoder_decode" else 2, "sequence": 12, "kept": 12, "images": 2}
        random = np.random.default_rng(7)
        feeds = {}
        for name, spec in session.inputs.items():
            shape = [sizes.get(str(size), size) for size in spec.shape]
            feeds[name] = random.standard_normal(shape).astype(spec.dtype)
        batch = len(feeds.get("past_lengths", []))
        if graph == "decoder_prefill":
            feeds["token_modality"] = np.tile(
                np.array([[0] * 12, [0, 0] + [1] * 8 + [0, 0]], np.int32), (batch // 2, 1)
            )
            feeds["logits_to_keep"] = np.tile(np.arange(12), (batch, 1))
            feeds["past_lengths"] = np.zeros(batch, np.int64)
        elif graph == "decoder_decode":
            feeds["past_lengths"] = np.arange(batch, dtype=np.int64)
        return session.run(feeds)


def test_prove_refuses_a_graph_that_lacks_a_parameter(source: ModelSource) -> None:
    for graph, parameters in _used(source).items():
        for parameter in parameters:
            used = _used(source)
            used[graph].remove(parameter)
            with pytest.raises(MoiieError, match=f"parameter {parameter}: expected in .*{graph}"):
                prove(source.config, source.weight_map, used)


def test_prove_refuses_a_graph_with_a_parameter_that_it_should_not_have(source: ModelSource) -> None:
    used = _used(source)
    extra = {graph: sorted(set(source.weight_map.by_parameter()) - set(names)) for graph, names in used.items()}
    assert any("experts.0." in name for name in extra["decoder_decode"])
    assert "decoder.layers.1.mlp.gate_vis.weight" in extra["decoder_decode"]
    for graph, parameters in extra.items():
        for parameter in parameters:
            wrong = {**used, graph: [*used[graph], parameter]}
            with pytest.raises(MoiieError, match=f"parameter {parameter}: expected in .*found in .*{graph}"):
                prove(source.config, source.weight_map, wrong)


def test_prove_accepts_what_should_be(source: ModelSource) -> None:
    section = prove(source.config, source.weight_map, _used(source))
    names = [*source.checkpoint.tensors, *(source.tower.tensors if source.tower else ())]
    assert sorted([*section["tensors"], *section["unreachable"]]) == sorted(names)


@pytest.fixture
def source() -> Iterator[ModelSource]:
    with ModelSource.open(exported({**COMMON, **CASES["moiie_phi3"][1]}).checkpoint) as opened:
        yield opened


def _used(source: ModelSource) -> dict[str, list[str]]:
    """Graph -> its parameters, as they should be."""
    graphs: dict[str, list[str]] = {"vision_encoder": [], "decoder_prefill": [], "decoder_decode": []}
    for parameter in source.weight_map.by_parameter():
        for user in family_of(source.config).expected_users(parameter, source.config) & set(graphs):
            graphs[user].append(parameter)
    return graphs


def _nudged(old: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """The tensor with its last number changed that counts: the smallest change, at the end that a short view would miss."""
    new = old.copy()
    new[: entry.get("rows")].reshape(-1)[-1] += 3
    return new


def _tensors(path: Path) -> dict[str, np.ndarray]:
    file = TensorFile(path)
    return {name: file[name] for name in read_header(path)}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
