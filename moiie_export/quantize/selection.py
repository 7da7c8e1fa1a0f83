"""The better of two quantised forms, row by row: what makes the calibrated methods never worse than round-to-nearest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moiie_export.quantize.packing import Float32, Quantized, restore
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.statistics import InputStatistics


def keep_better_rows(
    weight: Float32, made: Quantized, nearest: Quantized, scheme: Scheme, stats: InputStatistics
) -> Quantized:
    """Take each row from whichever form changes the layer's outputs less; from `nearest` where they are equal.

    Args:
        weight: float32 [N, K].
        made: by the method that was asked for.
        nearest: by round-to-nearest.
        scheme: the form of both.
        stats: the inputs on which outputs are compared.

    Returns:
        The mixture; `nearest` itself, with a note, where the method helps no row.
    """
    better = stats.output_error(restore(made, scheme) - weight) < stats.output_error(restore(nearest, scheme) - weight)
    if better.all():
        return made
    if not better.any():
        return replace(nearest, note=f"{made.method} is not better than rtn on the calibration inputs")
    return replace(
        made,
        values=np.where(better[:, None], made.values, nearest.values),
        scales=np.where(better[:, None], made.scales, nearest.scales),
    )


def without_statistics(nearest: Quantized) -> Quantized:
    """Round-to-nearest, with the reason."""
    return replace(nearest, note="calibration saw no inputs of this layer")
