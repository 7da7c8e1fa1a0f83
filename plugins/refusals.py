"""Why the plugin library refused a node, for whoever drives TensorRT.

TensorRT says only that a plugin returned an error. The library's own sentences go to TensorRT's log where it has one for
plugins; TensorRT for RTX 1.7 has none, and they are asked for here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_LIMIT = 16 << 10


def take_refusals(library: Path) -> list[str]:
    """The sentences since the last call, oldest first; they are forgotten.

    Args:
        library: the libmoiie_plugins.so that TensorRT has loaded in this process.

    Raises:
        OSError: it cannot be loaded.
    """
    taken = ctypes.CDLL(str(library)).moiieTakeErrors
    taken.restype, taken.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t)
    buffer = ctypes.create_string_buffer(_LIMIT + 1)
    taken(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace").splitlines()
