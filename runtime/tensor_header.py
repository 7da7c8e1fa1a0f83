"""The header of a safetensors file: parsed strictly and written deterministically.

Layout: 8 bytes little-endian length N, N bytes of JSON (`name -> {dtype, shape, data_offsets}`), then the data. Offsets
in the JSON count from the end of the header; `TensorInfo.offset` counts from the start of the file, as ONNX external
data does. The tensors must fill the data section exactly: no holes, no overlap, no trailing bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import INCOMPLETE, open_regular, parse_json_object, quote, show

MAX_HEADER_BYTES = 100_000_000  # the cap of the safetensors library
ALIGNMENT = 64
_MAX_DIMS = 32  # numpy 1.x has no more
_MAX_BYTES = 2**63 - 1
_DAMAGED = "the header is damaged: download the file again, or save it again with the safetensors library"
Specs = Mapping[str, tuple[str, tuple[int, ...]]]
_LFS = b"version https://git-lfs"

ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# Those that numpy can show as they are.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "C64": np.dtype("<c8"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        dtype: safetensors name (`F32`, `BF16`, ...), a key of `ITEM_SIZES`.
        shape: its dimensions, () for a scalar.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        MoiieError: the file is missing, truncated or not a well-formed safetensors file; the message names the file,
            the tensor, and the bytes expected and found.
    """
    return read_header_and_metadata(path)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The free-form `__metadata__` strings of a safetensors file, {} when it has none. Errors as in `read_header`."""
    return read_header_and_metadata(path)[1]


def read_header_and_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Both parts of the header from one reading; see `read_header` and `read_metadata`."""
    path = Path(path)
    raw, file_size = _read_raw(path)
    entries = parse_json_object(raw, f"{path}: header", _DAMAGED)
    metadata = _parse_metadata(path, entries.pop("__metadata__", {}))
    start = 8 + len(raw)
    tensors = [_parse_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))  # an empty tensor lies before its neighbour
    _check_layout(path, tensors, start, file_size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def build_header(path: Path, specs: Specs, metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a new file and its tensors, laid out back to back in the given order.

    The JSON is padded with spaces so that the data section starts at a multiple of 64 bytes. The format allows no
    holes between tensors, so a tensor is aligned to its item size only when those before it are: give wide dtypes first.

    Args:
        path: the file to be written, for messages.
        specs: name -> (safetensors dtype, shape).
        metadata: strings for `__metadata__`.

    Raises:
        MoiieError: an unknown dtype, a bad shape or a name that the format cannot hold.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = _parse_metadata(path, dict(metadata))
    position = 0
    for name, (dtype, shape) in specs.items():
        if name == "__metadata__":
            _refuse(path, name, "the format keeps this name for itself")
        nbytes = _count_bytes(path, name, dtype, list(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MoiieError(f"{path}: a tensor name or metadata string is not valid Unicode: {error}") from error
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise MoiieError(f"{path}: the header would take {len(raw)} bytes, the format allows {MAX_HEADER_BYTES}")
    entries.pop("__metadata__", None)
    infos = [_parse_entry(path, name, entry, 8 + len(raw)) for name, entry in entries.items()]
    return len(raw).to_bytes(8, "little") + raw, {info.name: info for info in infos}


def _read_raw(path: Path) -> tuple[bytes, int]:
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if (prefix + file.read(len(_LFS) - 8)) == _LFS:
                raise MoiieError(f"{path}: a Git LFS pointer, not the file itself", "fetch the file: git lfs pull")
            if len(prefix) < 8:
                raise MoiieError(
                    f"{path}: expected at least 8 bytes (the header length), found {len(prefix)}", INCOMPLETE
                )
            length = int.from_bytes(prefix, "little")
            _check_length(path, length, size)
            file.seek(8)
            raw = file.read(length)
        except OSError as error:
            raise MoiieError(f"{path}: cannot be read: {error.strerror or error}", INCOMPLETE) from error
    if len(raw) < length:  # the file shrank meanwhile
        raise MoiieError(f"{path}: expected a header of {length} bytes, found {len(raw)}", INCOMPLETE)
    if not raw.startswith(b"{"):
        raise MoiieError(f"{path}: header: expected '{{' at byte 8, found {raw[:1]!r}", _DAMAGED)
    return raw, size


def _check_length(path: Path, length: int, file_size: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise MoiieError(
            f"{path}: the header claims {length} bytes, the format allows {MAX_HEADER_BYTES}",
            "this is not a safetensors file, or its first bytes are damaged: download it again",
        )
    if length > file_size - 8:
        raise MoiieError(
            f"{path}: expected a header of {length} bytes, found {file_size - 8} bytes after the length", INCOMPLETE
        )
    if length < 2:
        raise MoiieError(f"{path}: the header claims {length} bytes, an empty one has 2", _DAMAGED)


def _parse_metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise MoiieError(f"{path}: header: __metadata__: expected an object of strings, found {show(value)}", _DAMAGED)
    return value


def _parse_entry(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        found = sorted(entry) if isinstance(entry, dict) else entry
        _refuse(path, name, f"expected an object with keys {', '.join(sorted(keys))}, found {show(found)}")
    nbytes = _count_bytes(path, name, entry["dtype"], entry["shape"])
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _refuse(path, name, f"data_offsets: expected two sizes, found {show(offsets)}")
    begin, end = offsets
    if begin > end:
        _refuse(path, name, f"data_offsets are reversed: [{begin}, {end}]")
    if end - begin != nbytes:
        shape = "x".join(map(str, entry["shape"])) or "a scalar"
        _refuse(path, name, f"expected {nbytes} bytes for {entry['dtype']} {shape}, found {end - begin}")
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), start + begin, nbytes)


def _count_bytes(path: Path, name: str, dtype: object, shape: object) -> int:
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        _refuse(path, name, f"dtype {show(dtype)} is unknown; known are {', '.join(ITEM_SIZES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(dim) for dim in shape):
        _refuse(path, name, f"shape: expected at most {_MAX_DIMS} sizes, found {show(shape)}")
    # Zeros are left out of the check: numpy cannot hold [0, 2**62] either.
    if math.prod(dim for dim in shape if dim) * ITEM_SIZES[dtype] > _MAX_BYTES:
        _refuse(path, name, f"shape {show(shape)} is too large for any machine")
    return math.prod(shape) * ITEM_SIZES[dtype]


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, file_size: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            _refuse(path, tensor.name, f"{what}: expected to begin at byte {position}, found {tensor.offset}")
        position = tensor.offset + tensor.nbytes
        if position > file_size:
            _refuse(path, tensor.name, f"expected to end at byte {position}, found {file_size} bytes", INCOMPLETE)
    if position != file_size:
        raise MoiieError(
            f"{path}: expected {position} bytes, found {file_size}: {file_size - position} bytes belong to no tensor",
            "the file has a tail that its header does not describe: download it again",
        )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES


def _refuse(path: Path, name: str, detail: str, hint: str = _DAMAGED) -> NoReturn:
    raise MoiieError(f"{path}: tensor {quote(name)}: {detail}", hint)
