"""float8 E4M3 with a float32 scale per row, for TensorRT: the largest number of a row becomes 448."""

from __future__ import annotations

import numpy as np
import torch

from moiie_export.quantize.packing import Float32, Quantized
from moiie_export.quantize.rtn import as_tensor, require_finite
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.statistics import InputStatistics

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)


def fp8(weight: Float32, scheme: Scheme, stats: InputStatistics | None = None, *, name: str = "weight") -> Quantized:
    """Round to the nearest E4M3 number; see `Quantizer`. A row of zeros has scale 1. Statistics are not needed."""
    rows = as_tensor(weight)
    scales = row_scales(rows, LARGEST, name)
    stored = (rows / scales.unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Quantized(stored.view(torch.int8).numpy(), scales.numpy())


def row_scales(rows: torch.Tensor, top: float, name: str) -> torch.Tensor:
    """float32 [N]: the scale that takes the largest number of each row [N, K] to `top`; 1 for a row of zeros.

    Raises:
        MoiieError: the weight holds NaN or infinity.
    """
    largest = rows.abs().amax(1)
    require_finite(rows, largest, name)
    scales = (largest / top).clamp_(min=float(np.finfo(np.float32).tiny))
    scales[largest == 0] = 1.0
    return scales
