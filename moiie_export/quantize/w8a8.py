"""int8 weights and int8 activations, for TensorRT: a float32 scale per row, and one for the layer's input.

The input's scale is static, from calibration: of a few cuts of the range, the one with the least squared error on the
sampled inputs. A single outlier would otherwise cost all other numbers their precision.
"""

from __future__ import annotations

import numpy as np
import torch

from moiie_export.quantize.fp8 import row_scales
from moiie_export.quantize.packing import Float32, Quantized
from moiie_export.quantize.rtn import as_tensor
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.statistics import InputStatistics
from moiie_runtime.errors import MoiieError

_CUTS = np.linspace(1.0, 0.2, 33, dtype=np.float32)


def w8a8(weight: Float32, scheme: Scheme, stats: InputStatistics | None = None, *, name: str = "weight") -> Quantized:
    """Round rows to the nearest of 255 steps; see `Quantizer`.

    Raises:
        MoiieError: as `Quantizer`; or calibration saw none of the layer's inputs.
    """
    rows = as_tensor(weight)
    scales = row_scales(rows, 127.0, name)
    values = (rows / scales.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return Quantized(values.numpy(), scales.numpy(), input_scale(stats, name))


def input_scale(stats: InputStatistics | None, name: str) -> np.float32:
    """The step of a layer's int8 inputs; the same for all rows of its weight.

    Raises:
        MoiieError: there is no sample of the inputs.
    """
    if stats is None or not stats.sample.size:
        raise MoiieError(
            f"{name}: w8a8 rounds a layer's inputs too, and calibration saw none of them, or too few",
            "give calibration pictures and prompts that reach this layer, or use another format for it",
        )
    largest = np.float32(np.abs(stats.sample).max())
    if not np.isfinite(largest):
        raise MoiieError(f"{name}: calibration saw inputs that are not finite", "moiie parity --ranges names the layer")
    if largest == 0:
        return np.float32(1)
    steps = np.maximum(_CUTS * largest / np.float32(127), np.finfo(np.float32).tiny)
    errors = [float(np.square(_rounded(stats.sample, step) - stats.sample).sum()) for step in steps]
    return np.float32(steps[int(np.argmin(errors))])


def _rounded(inputs: Float32, step: np.float32) -> Float32:
    rounded: Float32 = np.clip(np.rint(inputs / step), -128, 127) * step
    return rounded
