"""The oldest CUDA and driver with which an engine's library is expected to run, by the CUDA release it was made for."""

from __future__ import annotations

from importlib.metadata import distributions

_FLOORS = {12: {"cuda": "12.0", "driver": "525.60.13"}, 13: {"cuda": "13.0", "driver": "580.65.06"}}
"""CUDA release of the library -> floors on Linux."""

_BASIS = "expected by CUDA's minor-version compatibility, not tried"


def cuda_floor(library: str) -> dict[str, str] | None:
    """Floors of an installed wheel of TensorRT, by the CUDA release in its name, and what they rest on.

    None for a system's own library.
    """
    for found in distributions():
        name = str(found.metadata["Name"] or "").lower().replace("-", "_")
        if name.startswith(f"{library}_cu") and name[len(library) + 3 :].isdigit():
            floor = _FLOORS.get(int(name[len(library) + 3 :]))
            return None if floor is None else {**floor, "basis": _BASIS}
    return None
