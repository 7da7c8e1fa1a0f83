"""AWQ: scales and clipping that follow the inputs a layer really sees.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023. Two searches:

* `search_scale`: a factor s per input channel. A layer's weight is multiplied by s and whatever produces its input is
  divided by s, which changes nothing but how channels share the precision of a group. Layers with one input share s.
* `awq`: per group, how far its scale is cut below the range of its numbers.

Both keep what round-to-nearest would do among their candidates, so that no layer comes out worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moiie_export.quantize.methods import Quantizer
from moiie_export.quantize.packing import Float32, Quantized, restore
from moiie_export.quantize.rtn import as_float16, as_tensor, round_groups, rtn
from moiie_export.quantize.scheme import Scheme
from moiie_export.quantize.selection import keep_better_rows, without_statistics
from moiie_export.quantize.statistics import InputStatistics
from moiie_runtime.errors import MoiieError

_EXPONENTS = tuple(float(a) for a in np.linspace(0.1, 1.0, 10))
_CUTS = (1.08, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
_SEARCH_ROWS = 256
"""Rows of a weight on which candidates are ranked; the best are then tried on all."""

_TRIED = 4
_FURTHEST = 64.0
"""Largest factor and inverse of the smallest: what divides by it must keep its precision."""

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Consumer:
    """One of the layers that read a shared input.

    Attributes:
        weight: float32 [N, K], all rows or some; layers that stay float need no mention.
        scheme: how it will be stored.
        stats: of its inputs: of an expert, the tokens routed to it.
        name: for messages.
    """

    weight: Float32
    scheme: Scheme
    stats: InputStatistics
    name: str = "weight"


def search_scale(consumers: Sequence[Consumer]) -> Float32:
    """The factor per channel that lowers the consumers' summed output error most, of those that raise no consumer's.

    Candidates are ranked with clipping, on some rows; what may be raised is the error of round-to-nearest, on all rows
    given. Consumers whose inputs calibration did not see have no say.

    Args:
        consumers: the quantised layers that share an input [.., K].

    Returns:
        float32 [K], all ones where nothing is better: what every consumer's weight is multiplied by (`multiplied`) and
        the producer of their input divided by (`divided`); float consumers are multiplied too.
    """
    known = [consumer for consumer in consumers if consumer.stats.usable]
    width = consumers[0].weight.shape[-1] if consumers else 0
    ones = np.ones(width, np.float32)
    for consumer in known:
        consumer.stats.check(width, consumer.name)
    if not known:
        return ones
    tokens = np.array([consumer.stats.tokens for consumer in known], np.float64)
    thinned = [_thinned(consumer) for consumer in known]
    candidates = [ones, *_candidates(thinned, tokens)]
    sums = [float(_errors(thinned, scale, awq) @ tokens) for scale in candidates]
    ranked = sorted(range(len(candidates)), key=sums.__getitem__)
    usual = _errors(known, ones, rtn)
    for index in ranked[: min(_TRIED, ranked.index(0))]:
        if (_errors(known, candidates[index], rtn) <= usual).all():
            return candidates[index]
    return ones


def multiplied(weight: Float32, scale: Float32) -> Float32:
    """A consumer's weight [N, K] when its input was divided by `scale` [K]."""
    return weight * scale


def divided(producer: Float32, scale: Float32) -> Float32:
    """The rows that make a consumer's input, divided by `scale` [K].

    Args:
        producer: a norm's weight [K], or the rows [K, M] of a linear layer (of gate_up, only the rows of up), or its
            bias [K].
        scale: of `search_scale`.
    """
    return producer / scale.reshape(-1, *[1] * (producer.ndim - 1))


def awq(weight: Float32, scheme: Scheme, stats: InputStatistics | None = None, *, name: str = "weight") -> Quantized:
    """Round to nearest with scales cut for the inputs seen; see `Quantizer`.

    A weight that was multiplied by a factor of `search_scale` needs the statistics of its divided input
    (`InputStatistics.divided`).
    """
    nearest = rtn(weight, scheme, name=name)
    if stats is None or not stats.usable:
        return without_statistics(nearest)
    stats.check(weight.shape[-1], name)
    blocks = torch.from_numpy(stats.group_moments(scheme.group_size))
    values, scales = np.empty_like(nearest.values), np.empty_like(nearest.scales)
    for start in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        values[rows], scales[rows] = _cut(weight[rows], nearest.scales[rows], scheme, blocks)
    return keep_better_rows(weight, Quantized(values, scales, method="awq"), nearest, scheme, stats)


def _cut(weight: Float32, scales: np.ndarray, scheme: Scheme, blocks: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales of rows, each group with the cut that serves its own inputs best (`blocks` [K/g, g, g])."""
    rows, columns = weight.shape
    groups = as_tensor(weight).view(-1, scheme.group_size)
    start = torch.from_numpy(scales.astype(np.float32)).view(-1)
    best_scale, least = start.clone(), torch.full_like(start, torch.inf)
    best, numbers = torch.empty_like(groups), torch.empty_like(groups)
    for cut in (1.0, *_CUTS):
        scale = as_float16(start * cut)
        round_groups(groups, scale, scheme, numbers)
        change = (
            torch.addcmul(groups, numbers, scale.unsqueeze(1), value=-1).view(rows, len(blocks), -1).transpose(0, 1)
        )
        error = (torch.bmm(change, blocks) * change).sum(2).T.reshape(-1)
        better = error < least
        least, best_scale = torch.where(better, error, least), torch.where(better, scale, best_scale)
        best[better] = numbers[better]
    return best.to(torch.int8).view(rows, columns).numpy(), best_scale.half().view(rows, -1).numpy()


def _candidates(consumers: Sequence[Consumer], tokens: np.ndarray) -> list[Float32]:
    """Factors that grow with a channel's inputs, and such that also shrink with its weights."""
    inputs = np.average([consumer.stats.mean_abs for consumer in consumers], axis=0, weights=tokens)
    weights = np.mean([_relative_size(consumer) for consumer in consumers], axis=0)
    found = []
    for exponent in _EXPONENTS:
        for factor in (
            _floored(inputs) ** exponent,
            _floored(inputs) ** exponent / _floored(weights) ** (1 - exponent),
        ):
            centred = factor / np.sqrt(factor.max() * factor.min())
            found.append(np.clip(centred, 1 / _FURTHEST, _FURTHEST).astype(np.float32))
    return found


def _relative_size(consumer: Consumer) -> np.ndarray:
    """[K]: mean size of a column's numbers as shares of the largest in their group."""
    groups = np.abs(consumer.weight.reshape(-1, consumer.scheme.group_size))
    share = groups / np.maximum(groups.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    size: np.ndarray = share.reshape(-1, consumer.weight.shape[-1]).mean(axis=0)
    return size


def _floored(sizes: np.ndarray) -> np.ndarray:
    """Sizes in float64, none below a small share of their mean: a dead channel gets no infinite factor."""
    mean = float(sizes.mean())
    return np.maximum(sizes.astype(np.float64), 1e-4 * mean) if mean > 0 else np.ones(len(sizes))


def _thinned(consumer: Consumer) -> Consumer:
    """Some of its rows, on the sampled inputs alone: a candidate then costs a thousandth of a look at everything."""
    step = -(-len(consumer.weight) // _SEARCH_ROWS)
    rows, stats = np.ascontiguousarray(consumer.weight[::step]), consumer.stats
    if len(stats.sample):
        stats = InputStatistics(stats.tokens, stats.mean_abs, None, stats.sample)
    return Consumer(rows, consumer.scheme, stats, consumer.name)


def _errors(consumers: Sequence[Consumer], scale: Float32, method: Quantizer) -> np.ndarray:
    """float64 [consumers]: mean squared change of each one's outputs, summed over them, with its input scaled."""
    totals = []
    for consumer in consumers:
        if not consumer.scheme.grouped:
            raise MoiieError(f"{consumer.name}: awq makes int4 and int8, not {consumer.scheme.format}")
        total, stats = 0.0, consumer.stats.divided(scale)
        for start in range(0, len(consumer.weight), _CHUNK_ROWS):
            rows = consumer.weight[start : start + _CHUNK_ROWS]
            made = method(rows * scale, consumer.scheme, stats, name=consumer.name)
            change = restore(made, consumer.scheme) / scale - rows
            total += float(consumer.stats.output_error(change).sum(dtype=np.float64))
        totals.append(total)
    return np.array(totals)
