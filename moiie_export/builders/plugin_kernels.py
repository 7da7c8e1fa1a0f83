"""Which GPUs a plugin library has kernels for, by what `moiie plugins build` wrote beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moiie_runtime.errors import MissingDependency, MoiieError
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
    """The kernels of a library; None where nothing beside it says so, or speaks of another file.

    Raises:
        MissingDependency: what is beside it is the description of this file, and the file is another one.
    """
    beside = library.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        about = read_json_object(beside, 1 << 20)
        described = about["library"]
        if described["sha256"] != sha256_file(library):
            if described.get("file") == library.name:
                raise MissingDependency(
                    f"{library}: is damaged or was exchanged: it is not the library that {beside.name} describes",
                    "build it again: moiie plugins build",
                )
            return None
        compiled = sorted({int(sm) for sm in about["sms"]})
        portable = sorted({int(key.split()[0]) for key in about["ptx_isa"] if key.endswith(" ptx")})
    except MissingDependency:
        raise
    except (MoiieError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Kernels(tuple(compiled), tuple(portable))
