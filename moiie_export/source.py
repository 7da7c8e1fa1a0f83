"""A checkpoint with everything that belongs to it: its vision tower, tokenizer, parsed config and weight map."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moiie_export.checkpoint import Checkpoint, check_finite
from moiie_export.checkpoint_files import CONFIG, CONFIG_LIMIT
from moiie_export.config import PUBLISHED_TOWER, has_separate_tower, parse_config
from moiie_export.config_reader import ConfigReader
from moiie_export.families import family_of
from moiie_export.model_config import ModelConfig
from moiie_export.tokenizer_files import load_tokenizer
from moiie_export.weights import CHECKPOINT, TOWER, Part, Weight, WeightMap, check_tensors
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object

BLOCK_BYTES = 16 << 20
"""Weights are streamed in blocks of rows of about this many float32 bytes."""

_PUBLISHED_NAME = "siglip-so400m-patch14-384"


class Described(Protocol):
    """What a model is, without the values of its weights: all that tracing needs."""

    @property
    def config(self) -> ModelConfig:
        """Its sizes."""
        ...

    @property
    def weight_map(self) -> WeightMap:
        """Its weights."""
        ...


@dataclass
class ModelSource:
    """An opened checkpoint, checked against the model its config.json describes.

    Attributes:
        checkpoint: the checkpoint directory.
        tower: the separate vision tower, opened only when its weights count.
        tower_path: where the separate tower lies; None when it was not found and is not needed.
        config: the model, its vocabulary cut to the tokenizer's length.
        weight_map: which tensors make up which weights.
        tokenizer: the tokenizer.
    """

    checkpoint: Checkpoint
    tower: Checkpoint | None
    tower_path: Path | None
    config: ModelConfig
    weight_map: WeightMap
    tokenizer: Tokenizer

    @classmethod
    def open(cls, directory: Path, vision_tower: Path | None = None) -> ModelSource:
        """Open a checkpoint and check names and shapes of all its tensors; no weight is loaded.

        Args:
            directory: the checkpoint.
            vision_tower: where the separate SigLIP lies; default: where config.json says, beside the checkpoint or
                beside its parent. It only says where a separate tower lies: config.json's unfreeze_vision_tower
                decides whose weights count (spec 4.3).

        Raises:
            MoiieError: whatever does not fit, by name.
        """
        checkpoint = Checkpoint.open(directory)
        tower: Checkpoint | None = None
        try:
            where = str(checkpoint.path / CONFIG)
            separate = has_separate_tower(checkpoint.config, where)
            tower_path, tower_config = _find_tower(checkpoint, vision_tower) if separate else _no_tower(vision_tower)
            config = parse_config(checkpoint.config, tower_config, where)
            rows = config.text.vocab_size
            tokenizer = load_tokenizer(checkpoint.path)
            config = _with_tokenizer(config, tokenizer, checkpoint.path)
            if config.reads_separate_tower and tower_path is not None:
                tower = Checkpoint.open(tower_path)
            weight_map = _checked_map(config, rows, checkpoint, tower)
        except BaseException:
            checkpoint.close()
            if tower is not None:
                tower.close()
            raise
        return cls(checkpoint, tower, tower_path, config, weight_map, tokenizer)

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()
        if self.tower is not None:
            self.tower.close()

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def blocks(self, weight: Weight) -> Iterator[npt.NDArray[np.float32]]:
        """The weight's values as consecutive float32 blocks, bounded in size, checked to be finite.

        Raises:
            MoiieError: NaN or infinity, naming the checkpoint's tensor and row.
        """
        for part in weight.parts:
            yield from self._part_blocks(part)

    def tensor(self, weight: Weight) -> npt.NDArray[np.float32]:
        """The whole weight as one float32 array; for the reference model, never for export."""
        array = np.empty(prod(weight.shape), np.float32)
        filled = 0
        for block in self.blocks(weight):
            array[filled : filled + block.size] = block.reshape(-1)
            filled += block.size
        return array.reshape(weight.shape)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file that counts, and of both config files; computed once."""
        found = {f"checkpoint/{name}": digest for name, digest in self.checkpoint.file_hashes().items()}
        if self.tower is not None:
            found |= {f"vision_tower/{name}": digest for name, digest in self.tower.file_hashes().items()}
        return found

    def part_rows(self, part: Part, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a part as float32, checked to be finite; any thread may call it.

        Raises:
            MoiieError: NaN or infinity, naming the checkpoint's tensor and row.
        """
        source = self._source_of(part)
        block = source.rows(part.tensor, start, stop)
        check_finite(block, part.tensor, source.path / source.tensors[part.tensor].file, start)
        return block

    def stored_rows(self, part: Part, start: int, stop: int) -> npt.NDArray[Any]:
        """The same rows as the checkpoint has them, unchecked; see `Checkpoint.stored_rows`."""
        return self._source_of(part).stored_rows(part.tensor, start, stop)

    def will_read(self, part: Part, start: int, stop: int) -> None:
        """Let the system fetch rows of a part that are read soon."""
        self._source_of(part).will_read(part.tensor, start, stop)

    def has_read(self, part: Part, start: int, stop: int) -> None:
        """Let the system forget rows of a part first of all."""
        self._source_of(part).has_read(part.tensor, start, stop)

    def _source_of(self, part: Part) -> Checkpoint:
        source = self.tower if part.source == TOWER else self.checkpoint
        if source is None:
            raise RuntimeError(f"{part.tensor}: its source was not opened")
        return source

    def _part_blocks(self, part: Part) -> Iterator[npt.NDArray[np.float32]]:
        rows = part.used_shape[0]
        step = max(1, BLOCK_BYTES // (4 * max(1, prod(part.shape[1:]))))
        for start in range(0, rows, step):
            yield self.part_rows(part, start, min(rows, start + step))


def _find_tower(checkpoint: Checkpoint, override: Path | None) -> tuple[Path | None, dict[str, Any] | None]:
    """Directory and config.json of the separate tower."""
    name = checkpoint.config.get("mm_vision_tower")
    needed = not checkpoint.config.get("unfreeze_vision_tower", False)
    if override is not None:
        candidates = [override]
    elif isinstance(name, str) and name:
        beside = checkpoint.path.resolve().parent
        candidates = [Path(name)] if Path(name).is_absolute() else [beside / name, beside.parent / name]
    else:
        candidates = []
    for path in candidates:
        if os.path.isfile(path / CONFIG):  # noqa: PTH113 - Path.is_file() raises where a name is too long
            return path, read_json_object(
                path / CONFIG, CONFIG_LIMIT, "the tower's config.json is damaged: copy it again"
            )
    if override is None and not needed and isinstance(name, str) and _PUBLISHED_NAME in name:
        return None, dict(PUBLISHED_TOWER)
    looked = ", ".join(str(path) for path in candidates) or "nowhere: config.json names none"
    reason = (
        "its weights count (unfreeze_vision_tower is false)" if needed else "its config.json gives the tower's sizes"
    )
    raise MoiieError(
        f"{checkpoint.path / CONFIG}: mm_vision_tower: found no directory with a config.json for {name!r};"
        f" it is needed: {reason}; looked in: {looked}",
        "pass the SigLIP directory: --vision-tower DIR",
    )


def _no_tower(override: Path | None) -> tuple[None, None]:
    """For models whose checkpoint holds everything."""
    if override is not None:
        raise MoiieError(
            f"--vision-tower {override}: this model's vision encoders are in its checkpoint", "leave the option out"
        )
    return None, None


def _with_tokenizer(config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> ModelConfig:
    """Cut the vocabulary to the tokenizer's length and settle the end tokens (spec 5.4)."""
    entries = tokenizer.get_vocab_size(with_added_tokens=True)
    if entries > config.text.vocab_size:
        raise MoiieError(
            f"{directory}: the tokenizer has {entries} entries, the embedding only {config.text.vocab_size} rows",
            "the tokenizer belongs to another model: copy the one the checkpoint was trained with",
        )
    config = config.with_vocab(entries)
    if config.prompt.stop_is_forced:
        stop = tokenizer.token_to_id(config.prompt.stop_string)
        if stop is None:
            raise MoiieError(
                f"{directory}: the tokenizer has no {config.prompt.stop_string!r}, which ends every answer"
            )
        return replace(config, eos_token_id=(stop,))
    return replace(config, eos_token_id=_end_tokens(config, directory, entries))


def _end_tokens(config: ModelConfig, directory: Path, entries: int) -> tuple[int, ...]:
    """generation_config.json decides where it names end tokens, else config.json."""
    where, ids = directory / CONFIG, config.eos_token_id
    generation = directory / "generation_config.json"
    if generation.is_file():
        raw = read_json_object(generation, CONFIG_LIMIT, "copy it again, or delete it")
        if raw.get("eos_token_id") not in (None, []):
            where, ids = generation, ConfigReader(raw, str(generation)).int_list("eos_token_id")
    for token in ids:
        if token >= entries:
            raise MoiieError(
                f"{where}: eos_token_id: {token} is not among the tokenizer's {entries} entries",
                "answers would never end: name the token the checkpoint was trained to end with",
            )
    return ids


def _checked_map(config: ModelConfig, rows: int, checkpoint: Checkpoint, tower: Checkpoint | None) -> WeightMap:
    opened = {CHECKPOINT: checkpoint} | ({} if tower is None else {TOWER: tower})
    names = {source: files.tensors for source, files in opened.items()}
    weight_map = family_of(config).weight_map(config, rows, names)
    shapes = {source: {name: entry.shape for name, entry in files.tensors.items()} for source, files in opened.items()}
    check_tensors(weight_map, shapes, {source: str(files.path) for source, files in opened.items()})
    return weight_map
