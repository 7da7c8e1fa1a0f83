"""What a conversion reads: the trained part of MoME, and the frozen models from where their authors publish them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moiie_export.checkpoint import Checkpoint, TensorEntry, check_finite
from moiie_export.checkpoint_bin import BinFile
from moiie_export.source import BLOCK_BYTES
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile

MOME, VICUNA, EVA, DINO, PIX2STRUCT, SENTENCE = "MoME checkpoint", "vicuna", "eva", "dino", "pix2struct", "sentence"
"""Names of the sources; all but the first are the command's options."""

_PICKLES = (".pth", ".pt", ".bin")
_INSIDE = ("model", "state_dict", "module")


@dataclass(frozen=True)
class Originals:
    """Where everything lies: files for the MoME checkpoint, EVA and DINOv2, directories for the rest.

    Attributes:
        checkpoint: MoME_ckpt.pth or .safetensors: what was trained, and nothing that was frozen.
        vicuna: Vicuna-7B v1.5 as save_pretrained writes it, with tokenizer.json.
        eva: eva_vit_g.pth, the tower of BLIP-2.
        dino: dinov2_vitl14_pretrain.pth.
        pix2struct: google/pix2struct-base.
        sentence: sentence-transformers/all-MiniLM-L6-v2.
    """

    checkpoint: Path
    vicuna: Path
    eva: Path
    dino: Path
    pix2struct: Path
    sentence: Path


class Weights(Protocol):
    """What a checkpoint directory and a single file have in common."""

    path: Path
    tensors: dict[str, TensorEntry]

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a tensor of floats as a new float32 array."""
        ...

    def close(self) -> None:
        """Unmap the files."""
        ...


class WeightsFile:
    """One file of tensors, safetensors or a PyTorch pickle, read as `Checkpoint` reads directories.

    A pickle may be a trainer's: the state dict is then found under "model", "state_dict" or "module".

    Raises:
        MoiieError: no such file, another kind of file, or what BinFile and TensorFile refuse.
    """

    def __init__(self, path: Path, what: str) -> None:
        if path.is_dir():
            raise MoiieError(
                f"{path}: expected the {what} file, found a directory", "give the .pth or .safetensors file"
            )
        if path.suffix not in (*_PICKLES, ".safetensors"):
            raise MoiieError(
                f"{path}: expected the {what} file with the ending {', '.join((*_PICKLES, '.safetensors'))}",
                "the ending says how the file is read",
            )
        self.path = path
        pickled = path.suffix in _PICKLES
        self._file = BinFile(path, _INSIDE) if pickled else TensorFile(path)
        self.tensors = {
            info.name: TensorEntry(info.name, info.shape, info.dtype, path.name) for info in self._file.header.values()
        }

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of a tensor of floats as a new float32 array."""
        return self._file.rows(name, start, stop)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


@contextmanager
def opened(originals: Originals) -> Iterator[dict[str, Weights]]:
    """All sources by name, their headers read; no tensor is loaded.

    Raises:
        MoiieError: a file or directory that is missing, damaged or of another kind, by name.
    """
    with ExitStack() as stack:
        sources: dict[str, Weights] = {}
        for name, path in _paths(originals).items():
            is_file = name in (MOME, EVA, DINO)
            source: Weights = WeightsFile(path, name) if is_file else Checkpoint.open(path)
            stack.callback(source.close)
            sources[name] = source
        yield sources


def _paths(originals: Originals) -> Mapping[str, Path]:
    return {
        MOME: originals.checkpoint,
        VICUNA: originals.vicuna,
        EVA: originals.eva,
        DINO: originals.dino,
        PIX2STRUCT: originals.pix2struct,
        SENTENCE: originals.sentence,
    }


def where(source: Weights, tensor: str) -> Path:
    """The file that holds a tensor."""
    entry = source.tensors.get(tensor)
    # a single file is its own place, a directory's file lies in it
    return source.path / entry.file if entry is not None and source.path.is_dir() else source.path


def blocks(source: Weights, tensor: str, start: int, stop: int) -> Iterator[npt.NDArray[np.float32]]:
    """Rows [start, stop) as consecutive float32 blocks, bounded in size.

    Raises:
        MoiieError: NaN or infinity, naming the file, the tensor and the row.
    """
    row = 4 * max(1, prod(source.tensors[tensor].shape[1:]))
    step = max(1, BLOCK_BYTES // row)
    for first in range(start, stop, step):
        block = source.rows(tensor, first, min(stop, first + step))
        check_finite(block, tensor, where(source, tensor), first)
        yield block
        del block  # before the next one is read
