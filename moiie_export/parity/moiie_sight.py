"""MoIIE: one vision encoder, whose rows go to the decoder as they are (spec moiie.md, 1.1 to 1.3)."""

from __future__ import annotations

from typing import Any

import torch

from moiie_export.model_config import MoiieConfig
from moiie_export.parity.cases import Question
from moiie_export.parity.graphs import BundleGraphs
from moiie_export.parity.metrics import error, non_finite
from moiie_export.parity.reference import Reference
from moiie_export.parity.report import judge, left_out, tell
from moiie_export.parity.sight import Seen
from moiie_export.recipe_parity import Bounds
from moiie_runtime.prompt import Prompt
from moiie_runtime.vlm import VLM


class MoiieSight:
    """Tower and projector.

    Args:
        _: the bundle as the runtime loads it; prompts hold all that is needed of it.
        graphs: the bundle's marked graphs.
        reference: the PyTorch model.
        bounds: what differences are allowed.
    """

    def __init__(self, _: VLM, graphs: BundleGraphs, reference: Reference, bounds: Bounds) -> None:
        self._graphs, self._model, self._bounds = graphs, reference.model, bounds

    def look(self, question: Question, prompt: Prompt) -> Seen:
        """Features before and behind the projector."""
        config: MoiieConfig = self._model.config
        pixels = prompt.pixel_values
        place: dict[str, Any] = {"case": question.name}
        side = config.vision.input_size
        expected = (len(question.images), 3, side, side) if question.images else None
        shape = None if pixels is None else pixels.shape
        wrong = [] if shape == expected else [f"pixel_values {shape}, expected {expected}"]
        if pixels is not None and non_finite(pixels):
            wrong.append("pixel_values hold NaN or infinity")
        checks = [tell("pixels", wrong, **place)]
        if pixels is None:
            return Seen(checks, None)
        if pixels.shape[2] != side:
            return Seen([*checks, left_out("case", "its pictures have another size", **place)], None, comparable=False)
        with torch.inference_mode():
            projected, features = (each.numpy() for each in self._model.vision_encoder(torch.from_numpy(pixels)))
        place["phase"] = "vision_encoder"
        outputs = self._graphs.run("vision_encoder", {"pixel_values": pixels})
        bad = sum(non_finite(array) for array in outputs.values())
        checks.append(tell("finite", [f"{bad} NaN or infinite features"] * bool(bad), **place))
        for where, name, wanted in (
            ("tower", "vision_features", features),
            ("projector", "image_features", projected),
        ):
            if name in outputs:  # an engine tells less
                value = error(outputs[name], wanted).value
                checks.append(judge("vision", "error", value, self._bounds.vision_error, where=where, **place))
        return Seen(checks, projected)
