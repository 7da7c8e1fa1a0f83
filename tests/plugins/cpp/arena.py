"""Tensors in a file that a plugin process maps into memory, with guards between them, and the launches it recorded."""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

GUARD = 4096
POISON = 0xFF
"""NaN in every float type and -1 in every integer type: what is read or kept without having been written shows."""


@dataclass
class Arena:
    """A mapped file; nothing may be placed once it is `opened`.

    Attributes:
        path: the file.
        places: name -> offset, shape and type of each tensor.
    """

    path: Path
    places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    size: int = GUARD

    def place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Room for a tensor; returns its offset, a multiple of 256."""
        offset = self.size
        count = torch.Size(shape).numel() * dtype.itemsize
        self.places[name] = (offset, tuple(shape), dtype)
        self.size = -(-(offset + count) // 256) * 256 + GUARD
        return offset

    def open(self) -> None:
        """Make the file, everything poisoned, and map it."""
        self.path.write_bytes(bytes([POISON]) * self.size)
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape, dtype = self.places[name]
        return self.at(offset, dtype)[: torch.Size(shape).numel()].view(shape)

    def at(self, offset: int, dtype: torch.dtype) -> torch.Tensor:
        """Everything from an offset on, as values of a type."""
        rest = self.bytes[offset:]
        return rest[: rest.numel() // dtype.itemsize * dtype.itemsize].view(dtype)

    def damage(self) -> list[int]:
        """Offsets of guard bytes that something wrote to."""
        guarded = torch.ones(self.size, dtype=torch.bool)
        for offset, shape, dtype in self.places.values():
            guarded[offset : offset + torch.Size(shape).numel() * dtype.itemsize] = False
        return (guarded & (self.bytes != POISON)).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Library:
    """Table and images of a compiled library, as the replay looks them up."""

    table: Mapping[str, Any]
    images: bytes

    def find(self, call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
        """Name, kernel and image of a recorded launch, known by the checksum of what was loaded."""
        for name, kernel in self.table["kernels"].items():
            for image in kernel["images"]:
                raw = self.images[image["offset"] : image["offset"] + image["size"]]
                raw = raw.rstrip(b"\0") if image["kind"] == "ptx" else raw
                if kernel["entry"] == call["entry"] and zlib.crc32(raw) == call["checksum"]:
                    return name, kernel, image
        raise LookupError(f"no kernel of the library is {call['entry']} with checksum {call['checksum']}")


_FORMATS = {"int32": "<i", "int64": "<q", "float32": "<f", "pointer": "<Q", "null": "<Q"}


def replay(library: Library, log: Path, arena: Arena, base: int) -> list[str]:
    """Do on CPU tensors what was recorded, launch by launch, in Triton's interpreter; returns the kernels' names."""
    names = []
    for line in log.read_text(encoding="utf-8").splitlines():
        call = json.loads(line)
        if call["call"] == "copy":
            target, source, count = call["target"] - base, call["source"] - base, call["bytes"]
            arena.bytes[target : target + count] = arena.bytes[source : source + count].clone()
            names.append("copy")
            continue
        name, kernel, image = library.find(call)
        assert call["block"] == [32 * image["num_warps"], 1, 1]
        assert call["shared"] == image["shared"]
        assert len(call["arguments"]) == len(kernel["parameters"])
        module = import_module(f"moiie_plugins.kernels.{kernel['module']}")
        rows = zip(call["arguments"], kernel["names"], kernel["parameters"], kernel["types"], strict=True)
        values = {named: _value(bytes.fromhex(raw), kind, of, arena, base) for raw, named, (_, kind), of in rows}
        values.pop("", None)
        function = getattr(module, kernel["entry"])
        function[tuple(call["grid"])](**values, **image["constants"])
        names.append(name)
    return names


def _value(raw: bytes, kind: str, of: str, arena: Arena, base: int) -> Any:
    value = struct.unpack(_FORMATS[kind], raw)[0]  # an argument of another size than the table says fails here
    if kind == "null":
        assert value == 0
    if kind == "pointer":
        assert 0 < value - base < arena.size
        return arena.at(value - base, getattr(torch, of))
    return value
