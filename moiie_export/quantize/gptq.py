"""GPTQ: columns are rounded one after another, and what rounding does to the outputs is made up by the columns to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, section 3.3.
With H the mean of x x^T over a layer's inputs and U the upper Cholesky factor of its inverse: column i is rounded, its
error e_i = (w_i - q_i) / U_ii, and the columns j > i lose e_i U_ij. Scales are fitted when the first column of a group
is reached, on what the group's columns are by then.

Rows are independent. A row whose output error is larger than by round-to-nearest is rounded to nearest instead, so that
no layer comes out worse.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch

from moiie_export.quantize.packing import Float32, Quantized
from moiie_export.quantize.rtn import as_tensor, fit_scales, rtn
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.selection import keep_better_rows, without_statistics
from moiie_export.quantize.statistics import InputStatistics
from moiie_runtime.errors import MoiieError

_DAMPING = (0.01, 0.1, 1.0)
"""Added to the diagonal, as shares of its mean; the first at which the matrix is safely positive definite."""

_WIDEST_IN_FLOAT64 = 4096
"""Wider Hessians are factored in float32: the factor of the widest would take gigabytes."""

_FACTORS: WeakKeyDictionary[InputStatistics, torch.Tensor] = WeakKeyDictionary()
"""A weight comes in blocks of rows, and its factor is dear."""


def gptq(weight: Float32, scheme: Scheme, stats: InputStatistics | None = None, *, name: str = "weight") -> Quantized:
    """Round with error feedback; see `Quantizer`. Without usable statistics it rounds to nearest and says so."""
    nearest = rtn(weight, scheme, name=name)
    if stats is None or not stats.usable:
        return without_statistics(nearest)
    stats.check(weight.shape[-1], name)
    values, scales = _feedback(as_tensor(weight), scheme, _factor(stats, name))
    made = Quantized(values.numpy(), scales.to(torch.float16).numpy(), method="gptq")
    return keep_better_rows(weight, made, nearest, scheme, stats)


def _factor(stats: InputStatistics, name: str) -> torch.Tensor:
    """Upper Cholesky factor [K, K] of the inverse of the damped Hessian, float32.

    Raises:
        MoiieError: the statistics hold NaN or infinity.
    """
    known = _FACTORS.get(stats)
    if known is not None:
        return known
    moment = torch.from_numpy(stats.second_moment())
    hessian = moment.to(torch.float64 if len(moment) <= _WIDEST_IN_FLOAT64 else torch.float32)
    mean = float(hessian.diagonal().mean())
    if not np.isfinite(mean) or not bool(torch.isfinite(hessian).all()):
        raise MoiieError(f"{name}: calibration saw inputs that are not finite", "moiie parity --ranges names the layer")
    added = 0.0
    hessian = hessian.clone() if hessian is moment else hessian
    for share in _DAMPING:
        hessian.diagonal().add_(share * (mean or 1.0) - added)
        added = share * (mean or 1.0)
        # H = M M^T with M upper triangular: Cholesky of the matrix read backwards. Then H^-1 = U^T U, U = M^-1.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed):
            break
    else:
        raise MoiieError(f"{name}: the second moment of its inputs is not positive semidefinite")
    upper = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    factor: torch.Tensor = inverse.float()
    _FACTORS[stats] = factor
    return factor


def _feedback(weight: torch.Tensor, scheme: Scheme, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers int8 [N, K] and scales float32 [N, K/g] of a weight [N, K].

    Columns lie as rows while they are worked on, so that each is contiguous. What a group does to the columns behind it
    is one product per group.
    """
    rows, columns = weight.shape
    size = scheme.group_size
    rest = weight.T.contiguous()  # columns that are not rounded yet, errors made up
    if rest.data_ptr() == weight.data_ptr():
        rest = rest.clone()
    values = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(rows, columns // size)
    buffers = torch.empty(2, rows, size)
    for start in range(0, columns, size):
        stop = start + size
        block = rest[start:stop]
        scale = fit_scales(block.T.contiguous(), scheme, buffers[0], buffers[1])
        scales[:, start // size] = scale
        errors = torch.empty(size, rows)
        for column in range(size):
            step = factor[start + column, start:stop]
            number = torch.div(block[column], scale).round_().clamp_(scheme.lowest, -scheme.lowest - 1)
            values[start + column] = number
            torch.addcmul(block[column], number, scale, value=-1, out=errors[column]).div_(step[column])
            block[column + 1 :].addr_(step[column + 1 :], errors[column], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return values.T.contiguous(), scales
