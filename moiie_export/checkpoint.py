"""The authors' checkpoints and vision towers as they lie on disk (spec 4.2), read lazily: names now, rows on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moiie_export.checkpoint_bin import BinFile
from moiie_export.checkpoint_files import CONFIG, CONFIG_LIMIT, MERGE, TRAIN, WeightFiles, locate
from moiie_runtime.cores import available_cores
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote, read_json_object, sha256_file
from moiie_runtime.tensors import TensorFile, TensorInfo

__all__ = ["Checkpoint", "TensorEntry", "check_finite"]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the checkpoint.
        shape: its dimensions.
        dtype: as stored, by its safetensors name (`BF16`, `F16`, `F32`, ...).
        file: the file that holds it, relative to the checkpoint directory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


class _Source(Protocol):
    """What TensorFile and BinFile have in common."""

    header: dict[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]: ...

    def stored_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]: ...

    def will_read(self, name: str, start: int, stop: int) -> None: ...

    def has_read(self, name: str, start: int, stop: int) -> None: ...

    def close(self) -> None: ...


class Checkpoint:
    """An opened checkpoint directory. Use `Checkpoint.open`; close it, or use it as a context manager.

    Attributes:
        path: the directory.
        config: its config.json.
        tensors: name -> entry, in the order of the files and of their bytes.
    """

    def __init__(self, path: Path, config: dict[str, Any], files: WeightFiles, sources: Mapping[str, _Source]) -> None:
        self.path = path
        self.config = config
        self._files = files
        self._sources = dict(sources)
        self.tensors = {
            info.name: TensorEntry(info.name, info.shape, info.dtype, file)
            for file, source in sources.items()
            for info in source.header.values()
        }

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read config.json, the index and the headers of all tensor files; no tensor is loaded.

        Raises:
            MoiieError: not a checkpoint (no weights, an adapter or projector alone, a hub name), a missing or damaged
                file, an index that differs from its shards, or a pickle that wants to run code.
            MissingDependency: a `.bin` checkpoint without torch.
        """
        path = Path(directory)
        files = locate(path)
        config = read_json_object(
            path / CONFIG, CONFIG_LIMIT, f"copy {CONFIG} from where the weights are from: a checkpoint needs it"
        )
        sources: dict[str, _Source] = {}
        try:
            for name in files.shards:
                is_pickle = name.endswith(".bin")
                sources[name] = BinFile(path / name) if is_pickle else TensorFile(path / name)
            _check_index(path, files, sources)
            _check_complete_model(path, [name for source in sources.values() for name in source.header])
        except BaseException:
            for source in sources.values():
                source.close()
            raise
        return cls(path, config, files, sources)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) along the first axis of a tensor of floats.

        Returns:
            A new float32 array [stop - start, *shape[1:]]; a scalar counts as one row. Takes memory in proportion to the
            block: the rest of the file stays on disk.

        Raises:
            MoiieError: no such tensor, rows outside it, integers, or a float64 that float32 cannot hold.
        """
        return self._sources[self._entry(name).file].rows(name, start, stop)

    def stored_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """The same rows as they lie in the file, bfloat16 as uint16; a view that is not to be changed."""
        return self._sources[self._entry(name).file].stored_rows(name, start, stop)

    def will_read(self, name: str, start: int, stop: int) -> None:
        """Let the system fetch rows that are read soon."""
        self._sources[self._entry(name).file].will_read(name, start, stop)

    def has_read(self, name: str, start: int, stop: int) -> None:
        """Let the system forget rows first of all."""
        self._sources[self._entry(name).file].has_read(name, start, stop)

    def raw_dtype(self, name: str) -> str:
        """The dtype a tensor is stored in, by its safetensors name. Raises MoiieError for an unknown tensor."""
        return self._entry(name).dtype

    def file_hashes(self) -> dict[str, str]:
        """Relative name -> hex SHA-256 of every file that was read: config.json, the index, the tensor files.

        The last file is read first: what is read next begins with the first, which then still lies in memory where the
        whole checkpoint does not fit.
        """
        names = [CONFIG, *self._files.shards]
        if self._files.index is not None:
            names.append(self._files.index)
        names.sort(reverse=True)
        with ThreadPoolExecutor(available_cores()) as pool:
            digests = pool.map(lambda name: sha256_file(self.path / name), names)
            return dict(sorted(zip(names, digests, strict=True)))

    def close(self) -> None:
        """Unmap the files. Closing twice is allowed."""
        for source in self._sources.values():
            source.close()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise MoiieError(f"{self.path}: no tensor {quote(name)} among {len(self.tensors)}") from None


def check_finite(block: npt.NDArray[Any], tensor: str, file: str | os.PathLike[str], first_row: int = 0) -> None:
    """Refuse a block of weights that holds NaN or infinities.

    Args:
        block: rows [n, ...] of a tensor.
        tensor: its name, for the message.
        file: the file it came from, for the message.
        first_row: index of the block's first row in the tensor.

    Raises:
        MoiieError: naming the file, the tensor, the first bad row and how many numbers are bad.
    """
    finite = np.isfinite(block)
    if finite.all():
        return
    block, finite = np.atleast_1d(block), np.atleast_1d(finite)
    first = int(finite.argmin())
    row = first_row + first // (finite.size // len(finite))
    raise MoiieError(
        f"{file}: tensor {quote(tensor)}, row {row}: expected finite weights, found {block.flat[first]}"
        f" ({finite.size - np.count_nonzero(finite)} such numbers in rows {first_row} to {first_row + len(finite) - 1})",
        "the checkpoint is damaged or its training diverged: use an earlier one",
    )


def _check_index(path: Path, files: WeightFiles, sources: Mapping[str, _Source]) -> None:
    """The index and the shards must name the same tensors, each in the same place."""
    if files.weight_map is None:
        return
    index = path / str(files.index)
    hint = "the index and the shards are from different saves: fetch both again"
    for tensor, shard in files.weight_map.items():
        if tensor not in sources[shard].header:
            raise MoiieError(f"{path / shard}: tensor {quote(tensor)} is missing; {index.name} says it is here", hint)
    for shard, source in sources.items():
        for tensor in source.header:
            says = files.weight_map.get(tensor)
            if says != shard:
                place = "does not name it" if says is None else f"says it is in {says}"
                raise MoiieError(f"{path / shard}: tensor {quote(tensor)}: {index.name} {place}", hint)


def _check_complete_model(path: Path, names: list[str]) -> None:
    if not names:
        raise MoiieError(f"{path}: the weights hold no tensor", "save the checkpoint again")
    adapter = next((name for name in names if name.startswith("base_model.model.") or ".lora_" in name), None)
    if adapter is not None:
        raise MoiieError(f"{path}: an adapter that is not merged: found tensor {quote(adapter)}", MERGE)
    if all("mm_projector" in name for name in names):
        raise MoiieError(f"{path}: a projector without a model: found {len(names)} tensors, all mm_projector", TRAIN)
