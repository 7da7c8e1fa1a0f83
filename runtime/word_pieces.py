"""The instruction as word pieces for the sentence encoder that the instance router reads (spec mome.md, 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError

Integers = NDArray[np.int64]


class WordPieces:
    """A sentence encoder's tokenizer.

    Args:
        path: its `tokenizer.json`. Truncation and padding that the file asks for are replaced by those here.
        max_length: most word pieces of a text, special ones included; longer texts are cut.

    Raises:
        MoiieError: the file is missing or is not a tokenizer.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_length)
        except Exception as error:  # the library raises bare Exception
            raise MoiieError(
                f"{path}: cannot be read as a tokenizer: {error}", "copy the bundle again, or export it again"
            ) from error

    def __call__(self, texts: Sequence[str]) -> tuple[Integers, Integers]:
        """Texts as a batch.

        Args:
            texts: raw instructions, without a template or pictures; an empty one has only special pieces.

        Returns:
            `input_ids` and `attention_mask`, int64 [texts, length of the longest]; behind a shorter text stand zeros in
            both.
        """
        rows = [self._tokenizer.encode(text).ids for text in texts]
        input_ids = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return input_ids, attention_mask
