"""Which GPUs a plugin library has kernels for, by what `moiie plugins build` wrote beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object, sha256_file


@dataclass(frozen=True)
class Kernels:
    """GPUs by compute capability times ten, ascending.

    Attributes:
        sms: those that it was compiled for.
        portable: those whose PTX it holds, for these and all newer ones.
    """

    sms: tuple[int, ...]
    portable: tuple[int, ...]


def library_kernels(library: Path) -> Kernels | None:
    """The kernels of a library; None where nothing beside it says so, or speaks of another library."""
    beside = library.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        about = read_json_object(beside, 1 << 20)
        if about["library"]["sha256"] != sha256_file(library):
            return None
        compiled = sorted({int(sm) for sm in about["sms"]})
        portable = sorted({int(key.split()[0]) for key in about["ptx_isa"] if key.endswith(" ptx")})
    except (MoiieError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Kernels(tuple(compiled), tuple(portable))
