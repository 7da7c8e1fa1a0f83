"""Calibration that knows modality: what reaches each weight when the recipe's prompts and pictures run through the model.

The PyTorch reference runs layer by layer (see `moiie_export.model.layerwise`), so a model of any size fits. An expert's
statistics come from the tokens that are routed to it and from no others. They are written to a folder as soon as their
layer is done, and read from there one by one: grams of a whole model would not fit memory.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moiie_export.disk import write_errors, write_json
from moiie_export.model.layerwise import LayerByLayer
from moiie_export.model.moe import Routing
from moiie_export.model.prompts import decoder_rows, lay_out_questions
from moiie_export.parity.cases import from_recipe
from moiie_export.quantize.coverage import Coverage, expert_of
from moiie_export.quantize.gathering import Gathering
from moiie_export.quantize.needs import Needs, check_cases
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.recipe_parity import ParityCase
from moiie_export.source import ModelSource
from moiie_export.stages import Progress
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile, save_tensors

_INDEX = "statistics.json"


class StatisticsProvider:
    """The statistics of one calibration, read from its folder when they are asked for. Safe to use from several threads.

    Args:
        directory: what `collect` wrote.
        min_tokens: an expert that fewer tokens reached has no statistics.

    Attributes:
        coverage: tokens by layer, expert and modality, as in the manifest.
        tokens: parameter -> how many rows reached it, of all that were wanted.
    """

    def __init__(self, directory: Path, min_tokens: int) -> None:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        self._directory, self._min_tokens = directory, min_tokens
        self._lock = threading.Lock()
        self._last: tuple[str, InputStatistics] | None = None
        self.coverage: Mapping[str, Any] = index["coverage"]
        self.tokens: Mapping[str, int] = index["tokens"]

    @property
    def starved(self) -> dict[str, int]:
        """Parameter -> tokens, of the experts that too few tokens reached."""
        return {name: tokens for name, tokens in self.tokens.items() if self._starves(name)}

    def get(self, parameter: str) -> InputStatistics | None:
        """What reached a parameter; None for an expert with too few tokens, and for a parameter that was not wanted."""
        if parameter not in self.tokens or self._starves(parameter):
            return None
        with self._lock:
            if self._last is None or self._last[0] != parameter:  # a weight is often quantised in several blocks
                self._last = (parameter, self._read(parameter))
            return self._last[1]

    def shortage(self, parameter: str) -> str:
        """Why there are no statistics of a parameter."""
        tokens = self.tokens.get(parameter, 0)
        if not tokens:
            return "calibration saw no inputs of this layer"
        return f"calibration saw {tokens} inputs of this layer, fewer than quantization.min_tokens: {self._min_tokens}"

    @classmethod
    def reopen(cls, directory: Path, mark: str, min_tokens: int) -> StatisticsProvider | None:
        """What an earlier `collect` of the same `mark` left in a folder; None when it left nothing usable."""
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls(directory, min_tokens) if isinstance(index, dict) and index.get("mark") == mark else None

    def _read(self, parameter: str) -> InputStatistics:
        with TensorFile(self._directory / _file(parameter)) as file:
            gram = np.array(file["gram"]) if "gram" in file else None
            return InputStatistics(self.tokens[parameter], np.array(file["mean_abs"]), gram, np.array(file["sample"]))

    def _starves(self, parameter: str) -> bool:
        least = self._min_tokens if expert_of(parameter) is not None else 1
        return self.tokens[parameter] < least


def collect(
    source: ModelSource,
    cases: Sequence[ParityCase],
    wanted: Mapping[str, Needs],
    directory: Path,
    progress: Progress | None = None,
    mark: str = "",
) -> None:
    """Run the prompts through the reference and write what reaches the wanted parameters, for `StatisticsProvider`.

    Args:
        source: the checkpoint.
        cases: the recipe's `calibration.cases`.
        wanted: model parameter (`decoder.layers.1.mlp.experts.2.down_proj`, `decoder.lm_head.weight`) -> needs.
        directory: a folder to write into; replaced when it exists.
        progress: called with "calibration", steps done and steps in all.
        mark: what `StatisticsProvider.reopen` will recognise the outcome by.

    Raises:
        MoiieError: see `check_cases`; a picture that cannot be read, a prompt that is too long, a wanted parameter that
            is no weight of a linear layer, or a folder that cannot be written.
    """
    check_cases(source.config, cases, wanted)
    asked = lay_out_questions(source, from_recipe(cases))
    with write_errors(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        collector = _Collector(source, wanted, directory)
        parts = LayerByLayer(source)
        rows = decoder_rows(parts, asked, collector)
        collector.flush()
        collector.follow(parts, rows, progress)
        missing = [name for name in wanted if name not in collector.tokens]
        if missing:
            raise MoiieError(f"{missing[0]}: nothing flows through it that could be measured", "use method: rtn for it")
        index = {"mark": mark, "coverage": collector.coverage.to_dict(), "tokens": collector.tokens}
        write_json(directory / _INDEX, index)  # last, and by renaming: without it the folder counts for nothing


class _Collector:
    """Watches the model; keeps the sums of the layer in work and writes them when the next one begins."""

    def __init__(self, source: ModelSource, wanted: Mapping[str, Needs], directory: Path) -> None:
        self._wanted, self._directory = wanted, directory
        self._open: dict[str, Gathering] = {}
        self.coverage = Coverage(source.config)
        self.tokens: dict[str, int] = {}

    def follow(self, parts: LayerByLayer, rows: Sequence[Any], progress: Progress | None) -> None:
        """Run the decoder; each layer's sums are written when all prompts went through it."""

        def advance(done: int, total: int) -> None:
            if done % len(rows) == 0:
                self.flush()
            if progress is not None:
                progress("calibration", done, total)

        parts.decode(rows, self, advance)

    def linear(self, parameter: str, inputs: torch.Tensor, *_: torch.Tensor | None) -> None:
        """Count what reached a layer in."""
        needs = self._wanted.get(parameter)
        if needs is None:
            return
        if parameter not in self._open:
            self._open[parameter] = Gathering(inputs.shape[1], gram=needs.gram)
        self._open[parameter].add(inputs)

    def routed(self, layer: int, routing: Routing, is_vision: torch.Tensor) -> None:
        """Count which experts were chosen."""
        self.coverage.add(layer, routing.expert_ids.tolist(), is_vision.tolist())

    def hidden(self, layer: int, rows: torch.Tensor, is_vision: torch.Tensor) -> None:
        """Nothing is wanted of the residual stream."""

    def flush(self) -> None:
        """Write what was gathered and give its memory up."""
        while self._open:
            parameter, gathering = self._open.popitem()
            found = gathering.statistics()
            arrays = {"mean_abs": found.mean_abs, "sample": np.ascontiguousarray(found.sample)}
            if found.gram is not None:
                arrays["gram"] = found.gram
            save_tensors(self._directory / _file(parameter), arrays)
            self.tokens[parameter] = found.tokens


def _file(parameter: str) -> str:
    return f"{parameter}.safetensors"
