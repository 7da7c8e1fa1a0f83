"""Choices made once for a request: the instruction weighs the vision encoders and picks adapters (spec mome.md, 1.2, 1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_settings import InstanceRouter
from moiie_runtime.sessions import Sessions
from moiie_runtime.word_pieces import Integers, WordPieces


@dataclass(frozen=True)
class Instance:
    """What was chosen for one request; it holds for all its tokens, of the prompt and of the answer.

    Attributes:
        move_weights: float32 [encoders], softmax, in the order of the bundle's encoders.
        mole_index: int32 [layers with adapters], the adapter of each.
        contributions: float32 [encoders] that sum to 1, the share of each encoder's weighted features in the mean
            absolute value of all; of a skipped encoder 0. None without pictures.
    """

    move_weights: NDArray[np.float32]
    mole_index: NDArray[np.int32]
    contributions: NDArray[np.float32] | None = None


class InstanceRouting:
    """Runs the instance router of a bundle.

    Args:
        bundle: an opened bundle.
        settings: its section `instance_router`.
        sessions: its graphs.

    Raises:
        MoiieError: the sentence encoder's tokenizer is missing or damaged.
    """

    def __init__(self, bundle: Bundle, settings: InstanceRouter, sessions: Sessions) -> None:
        self._word_pieces = WordPieces(bundle.path(settings.tokenizer), settings.max_length)
        self._component = settings.component
        self._sessions = sessions
        spec = bundle.components[settings.component].inputs.get("input_ids")
        self._single = spec is not None and spec.shape[:1] == (1,)  # a graph of fixed size takes one after another
        self._num_adapters = 1 if bundle.adapters is None else bundle.adapters.num_experts

    def __call__(self, instructions: Sequence[str]) -> list[Instance]:
        """The choices for each instruction.

        Args:
            instructions: raw questions, without template and pictures. What lies behind the sentence encoder's longest
                input is not read.

        Raises:
            MoiieError: the graph gives weights that are not finite, or an adapter that does not exist.
        """
        parts = [[text] for text in instructions] if self._single else [instructions]
        outputs = [self._run(*self._word_pieces(part)) for part in parts]
        weights, index = (np.concatenate(each) for each in zip(*outputs, strict=True))
        if not np.isfinite(weights).all() or ((index < 0) | (index >= self._num_adapters)).any():
            raise MoiieError(
                f"{self._component}: gives weights {weights.tolist()} and adapters {index.tolist()} "
                f"where there are {self._num_adapters} adapters in a layer",
                "check the files with `moiie inspect --verify BUNDLE`",
            )
        return [Instance(weights[row], index[row]) for row in range(len(instructions))]

    def _run(self, input_ids: Integers, attention_mask: Integers) -> tuple[NDArray[Any], NDArray[Any]]:
        with self._sessions.lock:
            outputs = self._sessions.get(self._component).run(
                {"input_ids": input_ids, "attention_mask": attention_mask}, ["move_weights", "mole_index"]
            )
        return outputs["move_weights"], outputs["mole_index"]
