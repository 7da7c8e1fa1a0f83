"""PyTorch pickles (`pytorch_model.bin`): opened without running code in them, mapped, and read by rows."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.strict_files import INCOMPLETE, open_regular, quote
from moiie_runtime.tensors import TensorInfo, cast_rows

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLE_LIMIT = 256 << 20  # the pickle itself holds names and shapes only; the tensors lie beside it
_SAVE_AGAIN = (
    "load it where you trust it and save it again as safetensors: model.save_pretrained(DIR), or for a state dict"
    " safetensors.torch.save_file(state, FILE)"
)


class BinFile:
    """A `torch.save`d state dict, with the same reading methods as `moiie_runtime.tensors.TensorFile`.

    Args:
        path: the file.
        inside: keys under which a trainer may have put the state dict, beside its optimizer and the like.

    Attributes:
        path: the file.
        header: its tensors; `offset` is 0, the container has no use for it.

    Raises:
        MoiieError: truncated, not a torch file, a pickle that wants to run code, or not a flat dict of tensors.
        MissingDependency: torch is not installed.
    """

    def __init__(self, path: Path, inside: Sequence[str] = ()) -> None:
        self.path = path
        _check_container(path)
        self._tensors: dict[str, torch.Tensor] = {}
        self.header: dict[str, TensorInfo] = {}
        for name, tensor in _load(path, inside).items():
            self.header[name] = _describe(path, name, tensor)
            self._tensors[name] = tensor.detach()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of a tensor of floats as a new float32 array; see `TensorFile.rows`."""
        return cast_rows(self.stored_rows(name, start, stop), np.float32, f"{self.path}: tensor {quote(name)}", start)

    def stored_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """The same as they are stored; see `TensorFile.stored_rows`."""
        import torch

        info = self.header.get(name)
        where = f"{self.path}: tensor {quote(name)}"
        if info is None or name not in self._tensors:
            raise MoiieError(f"{where}: not in this file, or the file was closed")
        if info.dtype not in _FLOATS:
            raise MoiieError(f"{where}: expected {', '.join(_FLOATS)}, found {info.dtype}")
        count = info.shape[0] if info.shape else 1
        if not 0 <= start <= stop <= count:
            raise MoiieError(f"{where} has {count} rows, not {start}:{stop}")
        block = self._tensors[name].reshape(info.shape or (1,))[start:stop]
        if info.dtype == "BF16":
            return block.view(torch.int16).numpy().view(np.uint16)
        return block.numpy()

    def will_read(self, name: str, start: int, stop: int) -> None:
        """torch has the mapping: nothing is said to the system."""

    def has_read(self, name: str, start: int, stop: int) -> None:
        """As `will_read`."""

    def close(self) -> None:
        """Give up the mapping. Closing twice is allowed."""
        self._tensors = {}


def _check_container(path: Path) -> None:
    """Refuse what torch.load would load whole into memory, inflate, or explain badly."""
    with open_regular(path) as file:
        magic = file.read(4)
        if magic[:1] == b"\x80":
            raise MoiieError(f"{path}: a bare pickle, as torch before 1.6 wrote them, cannot be mapped", _SAVE_AGAIN)
        if magic != b"PK\x03\x04":
            raise MoiieError(f"{path}: expected a torch file, which begins with {b'PK'!r}, found {magic!r}", INCOMPLETE)
        try:
            members = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise MoiieError(f"{path}: a damaged torch file: {error}", INCOMPLETE) from error
    for member in members:
        is_pickle = member.filename.endswith(".pkl")
        if member.compress_type != zipfile.ZIP_STORED or (is_pickle and member.file_size > _PICKLE_LIMIT):
            raise MoiieError(
                f"{path}: {quote(member.filename)} is compressed or too large, which torch.save never does", _SAVE_AGAIN
            )


def _load(path: Path, inside: Sequence[str]) -> Mapping[str, torch.Tensor]:
    try:
        import torch
    except ImportError as error:
        raise MissingDependency(
            f"{path}: reading a PyTorch pickle needs torch", "pip install 'moiie-export[export]'"
        ) from error
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        log.debug("torch.load refused %s: %s", path, error)
        found = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"it wants to run {quote(found[1])}" if found else "it holds more than tensors"
        raise MoiieError(
            f"{path}: refused, {wants}: a pickle can run any code",
            f"do not use it unless you know who made it; if you do, {_SAVE_AGAIN}",
        ) from error
    except Exception as error:  # a damaged pickle can fail anywhere in the unpickler, with any exception
        log.debug("torch.load failed on %s", path, exc_info=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MoiieError(f"{path}: a damaged torch file: {reason[:200]}", INCOMPLETE) from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in inside if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise MoiieError(f"{path}: expected a dict of tensors, found {type(state).__name__}", _SAVE_AGAIN)
    return state


def _describe(path: Path, name: str, tensor: object) -> TensorInfo:
    import torch

    where = f"{path}: tensor {quote(name)}"
    if not isinstance(tensor, torch.Tensor):
        raise MoiieError(f"{where}: expected a tensor, found {type(tensor).__name__}", _SAVE_AGAIN)
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise MoiieError(f"{where}: expected a dense tensor, found {tensor.dtype} {tensor.layout}", _SAVE_AGAIN)
    nbytes = tensor.numel() * tensor.element_size()
    stored = tensor.untyped_storage().nbytes()
    if nbytes > stored:  # a stride of 0 can claim petabytes
        raise MoiieError(f"{where}: expected {nbytes} bytes for {tuple(tensor.shape)}, found {stored}", INCOMPLETE)
    return TensorInfo(name, dtype, tuple(tensor.shape), 0, nbytes)
