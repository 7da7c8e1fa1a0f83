"""The answer of `moiie check`: rows of support and a prediction of memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from moiie_export.check.devices import Refusal, refusals
from moiie_export.check.memory import predict_memory
from moiie_export.check.model_ops import model_ops, stored_weights
from moiie_export.check.support import Row, judge
from moiie_export.quantize.rules import resolve
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_export.targets import Target
from moiie_runtime.device_memory import DeviceEstimate


@dataclass(frozen=True)
class CheckReport:
    """What a target makes of a model.

    Attributes:
        target: the target.
        refused: what its library does for no model.
        rows: one for each kind of op, on the GPUs that are left; none where none is left.
        memory: the prediction.
        context: tokens of the key-value buffers it holds for.
    """

    target: Target
    refused: tuple[Refusal, ...]
    rows: tuple[Row, ...]
    memory: DeviceEstimate
    context: int

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the target's memory."""
        return self.target.memory is None or self.memory.peak <= self.target.memory

    @property
    def supported(self) -> bool:
        """Whether everything has a lowering and fits."""
        return not self.refused and self.fits and all(row.supported for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        released = self.target.residency == "after_prefill"
        memory = {**asdict(self.memory), "peak": self.memory.peak, "answering": self.memory.answering(released)}
        return {
            "supported": self.supported,
            "target": asdict(self.target),
            "expected": self.target.expected,
            "context": self.context,
            "refused": [asdict(each) for each in self.refused],
            "ops": [asdict(row) for row in self.rows],
            "memory": {**memory, "budget": self.target.memory, "fits": self.fits},
        }


def check_model(source: ModelSource, recipe: Recipe, target: Target) -> CheckReport:
    """Judge a model for a target. Only headers of weight files are read.

    Raises:
        Unsound: the recipe's rules do not fit the model.
    """
    config = source.config
    context = recipe.export.max_context or config.max_context
    weights = stored_weights(config, resolve(recipe.quantization, recipe.export.dtype, source.weight_map, config))
    refused = tuple(refusals(target))
    lost = {sm for each in refused for sm in each.sms}
    left = replace(target, sms=tuple(sm for sm in target.sms if sm not in lost))
    nothing = refused and not left.sms
    rows = () if nothing else tuple(judge(use, left) for use in model_ops(config, weights, context))
    return CheckReport(target, refused, rows, predict_memory(config, weights, target, context), context)
