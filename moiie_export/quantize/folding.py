"""Where AWQ's factors go: what makes an input is divided by them, and everything that reads it multiplied.

In real numbers nothing changes, so only such places are used where every reader is known: a norm and the projections or
experts behind it with their gates, the rows of `up` and the `down` they feed, the last norm and lm_head. A place is left
alone when one of its readers is not quantised by AWQ, or when adapters of the host read the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moiie_export.quantize.rules import Resolved

SUFFIX = ".awq_scale"
_METHOD = "awq"
_LAYER = re.compile(r"(decoder\.layers\.(\d+)\.)input_layernorm\.weight")

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fold:
    """One place.

    Attributes:
        producer: the norm's weight, or a gate_up whose second half of rows (`up`) is meant; divided.
        consumers: weights that are quantised by AWQ; multiplied by column.
        gates: router gates, which read the same rows; multiplied too.
        width: how many channels.
    """

    producer: str
    consumers: tuple[str, ...]
    gates: tuple[str, ...]
    width: int

    @property
    def tensor(self) -> str:
        """The bundle tensor that holds the factors, float32 [width]."""
        return self.producer + SUFFIX


class Folding:
    """All folds of an export, by what they change.

    Args:
        folds: the places.
    """

    def __init__(self, folds: tuple[Fold, ...] = ()) -> None:
        self.folds = folds
        self._readers = {name: fold for fold in folds for name in (*fold.consumers, *fold.gates)}
        self._producers = {fold.producer: fold for fold in folds}

    def reads(self, parameter: str) -> Fold | None:
        """The fold whose factors multiply a parameter's columns."""
        return self._readers.get(parameter)

    def makes(self, parameter: str) -> Fold | None:
        """The fold whose factors divide a parameter's rows."""
        return self._producers.get(parameter)

    def apply(self, parameter: str, rows: Float32, first_row: int, scales: Mapping[str, Float32]) -> Float32:
        """Rows of a parameter as they are stored, before they are quantised.

        Args:
            parameter: the model parameter.
            rows: float32 [n, ...]; changed in place.
            first_row: their place among the parameter's rows.
            scales: fold's tensor -> its factors.
        """
        reads, makes = self.reads(parameter), self.makes(parameter)
        if reads is not None:
            rows *= scales[reads.tensor]
        if makes is not None:
            skipped = makes.width if rows.ndim > 1 else 0  # the rows of gate come before those of up
            place = np.arange(first_row, first_row + len(rows)) - skipped
            inside = place >= 0
            divisor = scales[makes.tensor][place[inside]]
            rows[inside] /= divisor.reshape(-1, *[1] * (rows.ndim - 1))
        return rows

    def describe(self) -> dict[str, dict[str, object]]:
        """For the manifest: bundle tensor -> what its factors divide and multiply."""
        return {
            fold.tensor: {"divides": fold.producer, "multiplies": [*fold.consumers, *fold.gates]} for fold in self.folds
        }


def plan_folds(resolved: Resolved) -> Folding:
    """The places where the rules' AWQ weights can have factors."""
    shapes = {name: shape for name, (_, _, shape) in resolved.weight_map.by_parameter().items()}
    scaled = {name for name, method in resolved.calibrated.items() if method == _METHOD}
    if not scaled:
        return Folding()
    folds = []
    for producer, consumers, gates in _places(shapes):
        if consumers and all(name in scaled for name in consumers):
            folds.append(Fold(producer, consumers, gates, shapes[consumers[0]][-1]))
    return Folding(tuple(folds))


def _places(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(what makes an input, the matrices that read it, the gates that read it)."""
    for name in shapes:
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        layer, mlp = match[1], f"{match[1]}mlp."
        yield name, (f"{layer}self_attn.qkv_proj.weight",), ()
        inside = [each for each in shapes if each.startswith(mlp)]
        makers = tuple(each for each in inside if "gate_up_proj" in each)
        if f"mole.{match[2]}.down_proj.weight" not in shapes:
            gates = tuple(each for each in inside if each in (f"{mlp}gate.weight", f"{mlp}gate_vis.weight"))
            yield f"{layer}post_attention_layernorm.weight", makers, gates
        for maker in makers:
            yield maker, (maker.replace("gate_up_proj", "down_proj"),), ()
    yield "decoder.norm.weight", ("decoder.lm_head.weight",), ()
