"""The oldest CUDA and driver that an engine's library runs on, as NVIDIA states them for each CUDA release."""

from __future__ import annotations

from importlib.metadata import distributions

_FLOORS = {12: {"cuda": "12.0", "driver": "525.60.13"}, 13: {"cuda": "13.0", "driver": "580.65.06"}}
"""CUDA release of the library -> floors on Linux (CUDA toolkit release notes, minor-version compatibility)."""


def cuda_floor(library: str) -> dict[str, str] | None:
    """Floors of an installed wheel of TensorRT, by the CUDA release in its name; None for a system's own library."""
    for found in distributions():
        name = str(found.metadata["Name"] or "").lower().replace("-", "_")
        if name.startswith(f"{library}_cu") and name[len(library) + 3 :].isdigit():
            return _FLOORS.get(int(name[len(library) + 3 :]))
    return None
