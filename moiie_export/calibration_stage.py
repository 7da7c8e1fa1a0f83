"""Stage `calibration`: how large each vision expert's features are on pictures of the user's kind.

The runtime's `skip_below` needs it: experts' features differ in scale, so their weights alone do not tell what an expert
contributes (spec mome.md, 6.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moiie_export.stages import Progress
from moiie_runtime.errors import MissingDependency, MoiieError

CALIBRATION_CODE = 1
"""Raised whenever this stage would find other numbers for the same pictures."""


def check_calibration(described: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """Refuse pictures that nothing would be done with, or that are not there.

    Args:
        described: the manifest so far.
        pictures: the recipe's `calibration.images`.

    Raises:
        MoiieError: the model weighs no vision experts, or a file is missing.
    """
    if pictures and "vision_experts" not in described:
        raise MoiieError(
            "calibration.images: this model has one vision encoder, whose features nothing weighs",
            "leave the key out of the recipe",
        )
    for path in pictures:
        if not path.is_file():
            raise MoiieError(f"calibration.images: {path}: no such file", "paths start at the recipe file's folder")


def calibrate(
    described: Mapping[str, Any], pictures: Sequence[Path], directory: Path, progress: Progress
) -> Mapping[str, Any]:
    """Run every vision expert's graph on the pictures.

    Args:
        described: the manifest so far.
        pictures: files.
        directory: the bundle under construction, with its graphs and weights.
        progress: called for each picture.

    Returns:
        {"mean_abs_feature": {expert: mean absolute value of its rows that are weighted}}

    Raises:
        MissingDependency: onnxruntime is not installed.
        MoiieError: a picture cannot be read.
    """
    try:
        from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
    except ImportError as error:
        raise MissingDependency(
            "calibration.images: running the vision experts needs onnxruntime", "pip install 'moiie-export[cpu]'"
        ) from error
    from moiie_runtime.fields import Fields
    from moiie_runtime.images import Picture, load_image
    from moiie_runtime.vision import encoder_inputs
    from moiie_runtime.vision_settings import read_encoders

    top = Fields(dict(described), "bundle.json", hint="this is a defect of the exporter")
    encoders = read_encoders(top, described["tokens"]["image_tokens"])
    found: dict[str, float] = {}
    for number, encoder in enumerate(encoders):
        session = OnnxRuntimeSession(directory / "onnx" / f"{encoder.component}.onnx", component=encoder.component)
        sizes = []
        for index, path in enumerate(pictures):
            features = session.run(encoder_inputs(encoder, Picture(load_image(path))), ["image_features"])
            sizes.append(float(np.abs(features["image_features"][0][encoder.cls :]).mean()))
            progress("calibration", number * len(pictures) + index + 1, len(encoders) * len(pictures))
        session.close()
        found[encoder.name] = float(np.mean(sizes))
    return {"mean_abs_feature": found}
