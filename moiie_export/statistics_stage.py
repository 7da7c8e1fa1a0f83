"""What the stage `weights` measures first: the inputs of weights that are quantised by what reaches them.

Statistics lie in the unfinished bundle until it is finished, so that an export which is killed while it quantises does
not calibrate again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moiie_export.quantize.needs import Needs, case_fingerprint, check_cases
from moiie_export.quantize.rules import Resolved
from moiie_export.recipe import Recipe
from moiie_export.source import ModelSource
from moiie_export.stages import Progress, fingerprint
from moiie_export.weights_stage import WEIGHTS_FILE, WeightsJob, write_weights
from moiie_runtime.errors import MissingDependency

CALIBRATION_CODE = 1
"""Raised whenever calibration would find other numbers for the same prompts."""
_FOLDER = "statistics"
_KEY = "quantization"


@dataclass(frozen=True)
class Statistics:
    """What is to be measured for an export.

    Attributes:
        recipe: its cases, and the least tokens of an expert.
        wanted: model parameter -> needs; empty when nothing is quantised by statistics.
        islands: parameters that stay float32, for the manifest.
        inputs: what decides the outcome, for fingerprints; empty when nothing is measured.
    """

    recipe: Recipe
    wanted: Mapping[str, Needs]
    islands: tuple[str, ...]
    inputs: tuple[Any, ...]

    @classmethod
    def plan(cls, recipe: Recipe, source: ModelSource, resolved: Resolved, islands: tuple[str, ...]) -> Statistics:
        """Check that the recipe's cases can serve; nothing is computed.

        Raises:
            MoiieError: there are none, none has a picture where only pictures reach an expert, or a picture is missing.
        """
        wanted = {name: Needs(gram=method == "gptq") for name, method in resolved.calibrated.items()}
        check_cases(source.config, recipe.calibration.cases, wanted)
        if not wanted:
            return cls(recipe, wanted, islands, ())
        cases = case_fingerprint(recipe.calibration.cases)
        return cls(recipe, wanted, islands, (CALIBRATION_CODE, cases, recipe.quantization.min_tokens))

    def write(self, job: WeightsJob, directory: Path, progress: Progress) -> Mapping[str, Any]:
        """Measure where it is needed, and write the weights.

        Returns:
            Notes for the manifest: those of `write_weights`, with `islands` and `coverage` where there are some.
        """
        found: dict[str, Any] = {}
        if self.wanted:
            provider = self._provider(job, directory / _FOLDER, progress)
            job = replace(job, statistics=provider)
            found["coverage"] = dict(provider.coverage)
        notes = dict(write_weights(job, directory / WEIGHTS_FILE, progress))
        if self.islands:
            found["islands"] = list(self.islands)
        return {**notes, _KEY: {"weights": {}, **notes.get(_KEY, {}), **found}} if found else notes

    def _provider(self, job: WeightsJob, folder: Path, progress: Progress) -> Any:
        """The statistics, those of an earlier attempt where they are of the same prompts."""
        try:
            from moiie_export.quantize.calibration import StatisticsProvider, collect
        except ModuleNotFoundError as error:
            raise MissingDependency(f"calibration needs {error.name}", "pip install 'moiie-export[export]'") from error
        least = self.recipe.quantization.min_tokens
        mark = fingerprint(
            job.source.hashes, repr(job.source.config), self.inputs, sorted(map(repr, self.wanted.items()))
        )
        if StatisticsProvider.reopen(folder, mark, least) is None:
            collect(job.source, self.recipe.calibration.cases, self.wanted, folder, progress, mark)
        return StatisticsProvider(folder, least)
