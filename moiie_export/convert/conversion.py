"""The authors' layout of MoME -> one checkpoint directory that is exported like any other; memory stays at one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_files import CONFIG
from moiie_export.checkpoint_writer import SHARD_BYTES, to_stored, write_checkpoint
from moiie_export.convert.keys import Constant, Piece, Resized
from moiie_export.convert.plan import Converted, Plan, make_plan
from moiie_export.convert.settings import (
    check_language_model,
    check_pix2struct,
    check_sentence_encoder,
    load_settings,
    pretrained_positions,
)
from moiie_export.convert.sources import PIX2STRUCT, SENTENCE, VICUNA, Originals, Weights, blocks, opened
from moiie_export.convert.tokenizers import TOKENIZER_FILES, check_tokenizers
from moiie_export.dino_positions import resize_positions
from moiie_export.disk import check_absent, copy_file, new_directory, write_json
from moiie_export.mome_config import MomeConfig
from moiie_export.stages import Progress

SENTENCE_FOLDER = "sentence_encoder"
_SMALL_FILES = 64 << 20  # room for tokenizers and configs


@dataclass(frozen=True)
class ConvertResult:
    """A written checkpoint.

    Attributes:
        path: its directory.
        stage: 2, or 1 when every adapter of a layer is a copy of the only one.
        trainable_values: numbers that came from the MoME checkpoint.
        bytes: bytes of all tensors.
        files: the tensor files.
        dropped: source -> how many of its tensors were left out.
    """

    path: Path
    stage: int
    trainable_values: int
    bytes: int
    files: tuple[str, ...]
    dropped: Mapping[str, int]


def convert(
    originals: Originals,
    output: Path,
    override: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ConvertResult:
    """Gather MoME from its authors' checkpoint and the frozen models it was trained on.

    Values keep the dtype they have in their file. A first-stage checkpoint, which has one adapter a layer and no routers
    that choose among them, becomes a model with equal adapters of which the first is always taken: it computes what the
    first stage computed.

    Args:
        originals: where everything lies.
        output: directory to write; must not exist, or be empty. It appears when it is complete.
        override: JSON file with sizes that differ from the published ones (see `load_settings`).
        progress: called with (step, bytes done, bytes in all).
        shard_bytes: bytes of tensors a file may hold.

    Raises:
        MoiieError: whatever does not fit, with its file, tensor or key; or the output exists or cannot be written.
        MissingDependency: a .pth or .bin file without torch.
    """
    check_absent(output)
    raw, config = load_settings(override)
    report = progress or (lambda *_: None)
    with opened(originals) as sources:
        _check_configs(sources, config)
        check_tokenizers(originals.vicuna, originals.sentence, config)
        plan = make_plan(config, pretrained_positions(raw), sources)
        total = sum(tensor.bytes for tensor in plan.tensors)
        with new_directory(output, total + _SMALL_FILES) as directory:
            files = write_checkpoint(
                directory, plan.tensors, partial(_values, sources), shard_bytes, partial(report, "convert")
            )
            _write_small_files(originals, raw, config, directory)
    return _result(output, plan, total, files)


def summary(result: ConvertResult) -> Mapping[str, Any]:
    """The result as JSON data."""
    return {
        "checkpoint": result.path,
        "stage": result.stage,
        "trainable_values": result.trainable_values,
        "bytes": result.bytes,
        "files": list(result.files),
        "dropped": dict(result.dropped),
    }


def _result(output: Path, plan: Plan, total: int, files: list[str]) -> ConvertResult:
    stage = 1 if plan.single_adapter else 2
    return ConvertResult(output, stage, plan.trainable_values, total, tuple(files), plan.dropped)


def _check_configs(sources: Mapping[str, Weights], config: MomeConfig) -> None:
    for name, check in (
        (VICUNA, check_language_model),
        (PIX2STRUCT, check_pix2struct),
        (SENTENCE, check_sentence_encoder),
    ):
        source = sources[name]
        assert isinstance(source, Checkpoint)
        check(source, config)


def _values(sources: Mapping[str, Weights], tensor: Converted) -> Iterator[npt.NDArray[Any]]:
    """The tensor's values in its own dtype, block by block."""
    for piece in tensor.pieces:
        for block in _piece(sources, piece):
            if block.size:
                yield to_stored(block, tensor.dtype)


def _piece(sources: Mapping[str, Weights], piece: Piece) -> Iterator[npt.NDArray[np.float32]]:
    if isinstance(piece, Constant):
        yield np.full(piece.shape, piece.value, np.float32)
    elif isinstance(piece, Resized):
        whole = list(blocks(sources[piece.source], piece.tensor, 0, piece.shape[0]))
        yield resize_positions(np.concatenate(whole), piece.grid)
    else:
        yield from blocks(sources[piece.source], piece.tensor, piece.start, piece.stop)


def _write_small_files(originals: Originals, raw: Mapping[str, Any], config: MomeConfig, directory: Path) -> None:
    """Tokenizers, then the configs; config.json is the last file."""
    folder = directory / SENTENCE_FOLDER
    folder.mkdir()
    for source, target, names in (
        (originals.vicuna, directory, TOKENIZER_FILES),
        (originals.sentence, folder, (*TOKENIZER_FILES, CONFIG)),
    ):
        for name in names:
            if (source / name).is_file():
                copy_file(source / name, target / name)
    write_json(directory / "generation_config.json", _generation(raw, config))
    write_json(directory / CONFIG, raw)


def _generation(raw: Mapping[str, Any], config: MomeConfig) -> dict[str, Any]:
    """The authors' generation settings under transformers' names; Vicuna's own are for chatting."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": raw["eos_token_id"],
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
        "num_beams": config.num_beams,
        "repetition_penalty": config.repetition_penalty,
        "length_penalty": config.length_penalty,
        "min_length": 1,
        "max_length": config.max_new_tokens + 1,
    }
