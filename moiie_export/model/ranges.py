"""How large activations get: the largest |value| of every linear layer's input and output, by expert and modality.

float16 holds up to 65504. What goes beyond it on the user's own prompts, or comes near, must stay float32 where the rest
of a model computes in float16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moiie_export.model.layerwise import LayerByLayer
from moiie_export.model.moe import Routing
from moiie_export.model.prompts import decoder_rows, lay_out_questions
from moiie_export.parity.cases import Question
from moiie_export.source import ModelSource

FLOAT16_MAX = 65504.0
MARGIN = 2.0
"""What comes within this factor of the largest float16 counts as too near: other prompts reach further."""
INPUT, OUTPUT, RESIDUAL, SCORES = "input", "output", "residual", "scores"
MODALITIES = ("language", "vision")


@dataclass
class Range:
    """The largest absolute values of one tensor.

    Attributes:
        name: the weight that reads or makes it; for the residual stream and attention scores the layer.
        kind: input, output, residual, or scores (an upper bound: longest query times longest key).
        layer: the decoder layer; None outside the decoder.
        peaks: modality -> largest absolute value seen; infinite where one was not finite.
    """

    name: str
    kind: str
    layer: int | None
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The largest of both modalities."""
        return max(self.peaks.values(), default=0.0)

    @property
    def status(self) -> str:
        """`overflows`, `near` (within `MARGIN`), or `fits`."""
        if self.peak > FLOAT16_MAX:
            return "overflows"
        return "near" if self.peak > FLOAT16_MAX / MARGIN else "fits"

    def to_dict(self) -> dict[str, Any]:
        """JSON data; None for a peak that is not finite."""
        peaks = {name: value if math.isfinite(value) else None for name, value in self.peaks.items()}
        return {"name": self.name, "kind": self.kind, "layer": self.layer, "status": self.status, "peaks": peaks}


@dataclass(frozen=True)
class Ranges:
    """All tensors, in the order of the model, and the names of the prompts."""

    found: list[Range]
    cases: list[str]

    @property
    def exceeding(self) -> list[Range]:
        """What overflows float16 or comes near it, the largest first."""
        return sorted((each for each in self.found if each.status != "fits"), key=lambda each: -each.peak)

    @property
    def islands(self) -> list[str]:
        """Parameters whose layer must compute in float32, in the order of the model.

        Linear layers with such an input or output; where the residual stream itself is too large behind a layer, what
        writes to it there. Attention scores are an upper bound and make none.
        """
        named = {each.name for each in self.exceeding if each.kind in (INPUT, OUTPUT)}
        layers = {each.layer for each in self.exceeding if each.kind == RESIDUAL}
        linear = dict.fromkeys(each.name for each in self.found if each.kind == OUTPUT)
        writes = re.compile(r"decoder\.layers\.(\d+)\..*(o_proj|down_proj)(\.weight)?")
        return [
            name for name in linear if name in named or ((match := writes.fullmatch(name)) and int(match[1]) in layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "float16_max": FLOAT16_MAX,
            "margin": MARGIN,
            "cases": self.cases,
            "islands": self.islands,
            "tensors": [each.to_dict() for each in self.found],
        }


def measure_ranges(
    source: ModelSource, questions: Sequence[Question], advance: Callable[[int, int], None] | None = None
) -> Ranges:
    """Run prompts through the checkpoint's model, layer by layer, and note how large everything gets.

    Args:
        source: the checkpoint.
        questions: texts and pictures; what none of them reaches is not judged.
        advance: called with steps done and steps in all.

    Raises:
        MoiieError: a picture that cannot be read, or a prompt that is too long.
    """
    asked = lay_out_questions(source, questions)
    parts, meter = LayerByLayer(source), _Meter(source)
    parts.decode(decoder_rows(parts, asked, meter), meter, advance)
    return Ranges(list(meter.found.values()), [each.name for each in asked])


class _Meter:
    """A watcher that keeps maxima."""

    def __init__(self, source: ModelSource) -> None:
        text = source.config.text
        self._heads = (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        self.found: dict[tuple[str, str], Range] = {}

    def linear(
        self, parameter: str, inputs: torch.Tensor, outputs: torch.Tensor, is_vision: torch.Tensor | None
    ) -> None:
        """Both sides of a linear layer."""
        self._note(parameter, INPUT, inputs, is_vision)
        self._note(parameter, OUTPUT, outputs, is_vision)
        if parameter.endswith(".self_attn.qkv_proj.weight") and is_vision is not None:
            self._scores(parameter.removesuffix(".self_attn.qkv_proj.weight"), outputs, is_vision)

    def routed(self, layer: int, routing: Routing, is_vision: torch.Tensor) -> None:
        """A router computes in float32 everywhere."""

    def hidden(self, layer: int, rows: torch.Tensor, is_vision: torch.Tensor) -> None:
        """The residual stream."""
        self._note(f"decoder.layers.{layer}", RESIDUAL, rows, is_vision)

    def _scores(self, layer: str, outputs: torch.Tensor, is_vision: torch.Tensor) -> None:
        """Rotating keeps lengths, so the longest query of a modality and the longest key bound its scores."""
        heads, kv_heads, size = self._heads
        rows = outputs.view(len(outputs), heads + 2 * kv_heads, size).float().norm(dim=2)
        bounds = rows[:, :heads] * (rows[:, heads : heads + kv_heads].max() / math.sqrt(size))
        self._note(layer, SCORES, bounds, is_vision)

    def _note(self, name: str, kind: str, values: torch.Tensor, is_vision: torch.Tensor | None) -> None:
        found = self._range(name, kind)
        if is_vision is None:
            self._raise(found, "vision", _largest(values))
            return
        for modality, chosen in zip(MODALITIES, (~is_vision, is_vision), strict=True):
            if chosen.any():
                self._raise(found, modality, _largest(values[chosen]))

    def _range(self, name: str, kind: str) -> Range:
        match = re.match(r"decoder\.layers\.(\d+)", name)
        return self.found.setdefault((name, kind), Range(name, kind, int(match[1]) if match else None))

    @staticmethod
    def _raise(found: Range, modality: str, peak: float) -> None:
        found.peaks[modality] = max(found.peaks.get(modality, 0.0), peak)


def _largest(values: torch.Tensor) -> float:
    if not values.numel():
        return 0.0
    largest = float(values.abs().max())
    return math.inf if math.isnan(largest) else largest
