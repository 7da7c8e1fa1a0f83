"""Writing a safetensors file as a stream: the header is known before the data, and no tensor is ever held whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote
from moiie_runtime.tensor_header import NUMPY_DTYPES, Specs, TensorInfo, build_header

Array = npt.NDArray[Any]
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class TensorWriter:
    """Writes a safetensors file as a stream: the header first, then the tensors in the order of `specs`.

    The caller picks a temporary name and renames. Use it as a context manager: leaving it normally closes it.

    Args:
        path: the file to write; replaced when it exists.
        specs: name -> (safetensors dtype, shape). The data section starts at a multiple of 64 bytes and has no holes,
            so tensors are aligned to their item size when wide dtypes come first.
        metadata: strings stored beside the tensors.

    Attributes:
        header: where each tensor lies, known before a byte of it is written.
        nbytes: the size of the finished file.

    Raises:
        MoiieError: a dtype, shape or name that the format cannot hold; a file that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], specs: Specs, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        head, self.header = build_header(self.path, specs, metadata)
        self.nbytes = len(head) + sum(info.nbytes for info in self.header.values())
        self._queue = [info for info in self.header.values() if info.nbytes]
        self._queue.reverse()
        self._done = 0  # bytes written of the tensor at the end of the queue
        self._digest = hashlib.sha256()
        self._sha256: str | None = None
        try:
            self._file: BinaryIO | None = self.path.open("wb")
        except OSError as error:
            raise self._failed(error) from error
        self._put(head)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the whole file, known after `close`."""
        if self._sha256 is None:
            raise MoiieError(f"{self.path}: its sha256 is known only after close()")
        return self._sha256

    def write(self, array: Array, name: str | None = None) -> None:
        """Write the next rows of the tensor whose turn it is.

        Args:
            array: the whole tensor, or a block [n, *shape[1:]] of its rows; of the tensor's dtype (BF16 as uint16 bits).
            name: when given, checked against the tensor whose turn it is. A tensor without elements has no turn: writing it
                is allowed and does nothing.

        Raises:
            MoiieError: another dtype or shape, more rows than are left, another tensor's turn, or a failed write.
        """
        info = self._turn(array, name)
        if info is None:
            return
        if array.shape != info.shape and (array.ndim == 0 or array.shape[1:] != info.shape[1:]):
            raise MoiieError(
                f"{self.path}: tensor {quote(info.name)}: expected rows of {info.shape}, found a block {array.shape}"
            )
        self._append(info, array)

    def write_elements(self, array: Array, name: str | None = None) -> None:
        """Write the next elements of the tensor whose turn it is, in row-major order and whatever their shape.

        For a stack that is assembled from pieces smaller than its first axis; otherwise as `write`.
        """
        info = self._turn(array, name)
        if info is not None:
            self._append(info, array)

    def close(self) -> None:
        """Force the file to the disk and close it; closing twice is allowed.

        Raises:
            MoiieError: a tensor is missing or unfinished, or the disk refused.
        """
        if self._file is None:
            return
        if self._queue:
            info = self._queue[-1]
            self._abandon()
            raise MoiieError(
                f"{self.path}: tensor {quote(info.name)}: expected {info.nbytes} bytes, {self._done} were written;"
                f" {len(self._queue)} tensors are unfinished"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._abandon()
            raise self._failed(error) from error
        self._file = None
        self._sha256 = self._digest.hexdigest()

    def _append(self, info: TensorInfo, array: Array) -> None:
        expected = np.dtype("<u2") if info.dtype == "BF16" else NUMPY_DTYPES.get(info.dtype, np.dtype("u1"))
        if array.dtype != expected:
            raise MoiieError(f"{self.path}: tensor {quote(info.name)}: expected {expected}, found {array.dtype}")
        left = info.nbytes - self._done
        if array.nbytes > left:
            raise MoiieError(
                f"{self.path}: tensor {quote(info.name)}: expected {left} more bytes, found {array.nbytes}"
            )
        self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._done += array.nbytes
        if self._done == info.nbytes:
            self._queue.pop()
            self._done = 0

    def _turn(self, array: Array, name: str | None) -> TensorInfo | None:
        if self._file is None:
            raise MoiieError(f"{self.path}: written to after close()")
        if name is not None and name not in self.header:
            raise MoiieError(f"{self.path}: tensor {quote(name)} was not announced")
        if array.size == 0 and (name is None or self.header[name].nbytes == 0):
            return None
        if not self._queue:
            raise MoiieError(f"{self.path}: all tensors are written, found {array.nbytes} bytes more")
        info = self._queue[-1]
        if name is not None and name != info.name:
            raise MoiieError(f"{self.path}: expected tensor {quote(info.name)} next, found {quote(name)}")
        return info

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            self._abandon()
            raise self._failed(error) from error
        self._digest.update(data)

    def _abandon(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing flushes and may fail again; the first error is the one to show
                file.close()

    def _failed(self, error: OSError) -> MoiieError:
        return MoiieError(
            f"{self.path}: cannot be written: {error.strerror or error}",
            f"check the folder's permissions and that {self.nbytes} bytes are free",
        )


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Array]) -> None:
    """Save numpy arrays as a safetensors file, in the given order: written beside it under a temporary name, then renamed.

    Raises:
        MoiieError: a dtype that the format lacks, or a file that cannot be written; an existing file is then untouched.
    """
    path = Path(path)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, array in tensors.items():
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise MoiieError(f"{path}: tensor {quote(name)}: safetensors has no dtype {array.dtype}")
        specs[name] = (dtype, array.shape)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with TensorWriter(partial, specs) as writer:
            for name, array in tensors.items():
                writer.write(array, name)
        partial.replace(path)
    except OSError as error:
        raise MoiieError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone after a rename
            partial.unlink()
