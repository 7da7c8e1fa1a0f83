"""MoME through `moiie parity`: the golden model passes, and each way of being another model exits 3 and is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import moiie_runtime.vision
from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_runtime.instance_routing import Instance
from tests.cli.conftest import Moiie
from tests.exports import Exported, exported_mome
from tests.moiie_export.parity.conftest import change_graph, edit_manifest

Tensors = dict[str, torch.Tensor]
REFERENCE_POINTS = "move.dino.adt.reference_points"


@pytest.fixture(scope="module")
def base() -> Exported:
    return exported_mome(max_context=640)


def copied(base: Exported, folder: Path) -> Path:
    return Path(shutil.copytree(base.bundle, folder / "bundle"))


def with_tensors(base: Exported, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A bundle of the same graphs, exported from a checkpoint with other tensors."""
    checkpoint = Path(shutil.copytree(base.checkpoint, folder / "checkpoint"))
    path = checkpoint / "model.safetensors"
    changed = change(load_file(path))
    save_file(changed, path)
    bundle = copied(base, folder)
    export_bundle(ExportRequest(checkpoint, bundle, base.recipe))
    return bundle


def failures(moiie: Moiie, base: Exported, bundle: Path) -> list[dict[str, Any]]:
    """Failed checks in the order they are judged, of a run that exits 3."""
    result = moiie("parity", bundle, "--checkpoint", base.checkpoint, "--json")
    assert result.code == 3, result.err
    return [check for check in result.document["checks"] if check["ran"] and not check["passed"]]


def test_the_bundle_itself_passes(base: Exported, moiie: Moiie) -> None:
    result = moiie("parity", base.bundle, "--checkpoint", base.checkpoint, "--json")
    assert result.code == 0, result.err
    checks = result.document["checks"]
    compared = {check["where"] for check in checks if check["stage"] == "vision" and check["ran"]}
    inside = {f"{name} {part}" for name in ("dino", "pix2struct") for part in ("tower", "pooling", "ADT", "projector")}
    assert compared == {"clip tower", "clip projector", *inside, "weighted sum"}
    assert {"instruction", "instance routing", "hidden states", "KV cache", "logits", "text"} <= {
        check["stage"] for check in checks
    }
    [case] = [case for case in result.document["cases"] if case["name"] == "picture"]
    assert sum(case["instance"]["move_weights"]) == pytest.approx(1)
    assert sum(case["instance"]["contributions"]) == pytest.approx(1)
    assert len(case["instance"]["mole_index"]) == 2


def test_reference_points_transposed(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    bundle = with_tensors(base, tmp_path, lambda t: t | {REFERENCE_POINTS: t[REFERENCE_POINTS].flip(-1)})
    first = failures(moiie, base, bundle)[0]
    assert (first["stage"], first["phase"], first["where"]) == ("vision", "vision_dino", "dino ADT")


def test_sampling_with_aligned_corners(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    """R * (W - 1) instead of R * W - 0.5: what grid sampling with align_corners=True does to the anchors."""
    bundle, parameter = copied(base, tmp_path), "vision_dino.adt.reference_points"

    def align(model: onnx.ModelProto) -> None:
        scaled = {node.output[0] for node in model.graph.node if node.op_type == "Mul" and parameter in node.input}
        [shift] = [node for node in model.graph.node if node.op_type == "Sub" and node.input[0] in scaled]
        shift.input[1] = parameter

    change_graph(bundle, "vision_dino", align)
    first = failures(moiie, base, bundle)[0]
    assert (first["stage"], first["phase"], first["where"]) == ("vision", "vision_dino", "dino ADT")


def test_dino_with_imagenet_statistics(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    bundle = copied(base, tmp_path)
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    edit_manifest(bundle, lambda manifest: manifest["vision_experts"][1]["processor"].update(imagenet))
    first = failures(moiie, base, bundle)[0]
    assert (first["stage"], first["where"]) == ("manifest", "dino preprocessing")
    assert "mean" in first["note"]


def test_adapter_scale_dropped(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        scales = [name for name in tensors if ".mlp.mole." in name and name.endswith(".scale")]
        assert len(scales) == 8
        return tensors | {name: torch.ones_like(tensors[name]) for name in scales}

    first = failures(moiie, base, with_tensors(base, tmp_path, drop))[0]
    assert (first["stage"], first["layer"], first["phase"]) == ("hidden states", 0, "prefill")


def test_class_token_weighted(base: Exported, moiie: Moiie, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and files are right; the host multiplies what no weight may touch."""
    right = moiie_runtime.vision.Vision.rows

    def wrong(self: Any, pictures: Any, instance: Instance | None = None) -> Any:
        found = right(self, pictures, instance)
        if instance is not None:
            found.rows[:, 0] *= instance.move_weights[0]
        return found

    monkeypatch.setattr(moiie_runtime.vision.Vision, "rows", wrong)
    first = failures(moiie, base, base.bundle)[0]
    assert (first["stage"], first["where"], first["note"]) == ("vision", "weighted sum", "picture 1")


def test_another_adapter_is_taken(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    """The routers of layer 0 give adapter 0 a large lead."""

    def lead(tensors: Tensors) -> Tensors:
        name = "language_model.model.layers.0.mlp.mole.router.fc2.bias"
        return tensors | {name: tensors[name] + torch.tensor([50, 0, 0, 0])}

    first = failures(moiie, base, with_tensors(base, tmp_path, lead))[0]
    assert (first["stage"], first["phase"], first["where"]) == ("instance routing", "router", "adapters")


def test_a_forced_tie_takes_the_first_adapter_on_both_sides(base: Exported, moiie: Moiie, tmp_path: Path) -> None:
    """In layer 0 adapters 1 and 2 lead, with equal logits whatever the instruction says."""
    router = "language_model.model.layers.0.mlp.mole.router.fc2."

    def tie(tensors: Tensors) -> Tensors:
        weight, bias = tensors[f"{router}weight"], tensors[f"{router}bias"]
        level = torch.tensor([0, 1, 1, 0], dtype=bias.dtype)
        return tensors | {f"{router}weight": torch.zeros_like(weight), f"{router}bias": level}

    bundle = with_tensors(base, tmp_path, tie)
    result = moiie("parity", bundle, "--checkpoint", tmp_path / "checkpoint", "--json")
    assert result.code == 0, result.err
    cases = [case["instance"] for case in result.document["cases"]]
    assert len(cases) == 3
    for case in cases:
        assert (case["mole_index"][0], case["mole_margins"][0], case["ties"]) == (1, 0, 0)
