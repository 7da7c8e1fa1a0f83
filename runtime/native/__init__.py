"""The CPU operators, compiled on the machine that runs them; a bundle never carries native code.

`library()` gives the file for `SessionOptions.register_custom_ops_library`. It adds the domain `moiie.cpu`: `QLinear` and
`QExperts`, quantised products over weights as `moiie_runtime.native_packing` lays them out (operators.h says what they take).
The library chooses the instructions at run time; MOIIE_CPU_ISA=portable|avx2|avx512|amx makes it take lesser ones.
"""

from __future__ import annotations

from pathlib import Path

from moiie_runtime.native.compiling import compiled, find_compiler

# Of packed weights (native_packing.py, layout.h). An engine says which one it has; it rises when the bytes change.
LAYOUT = 1

_SOURCES = Path(__file__).parent
# No flag names a processor: the sources ask for instruction sets function by function. GCC warns of uninitialised values
# inside its own vector intrinsics.
_FLAGS = ("-O3", "-Wno-maybe-uninitialized", "-Wno-psabi")


def library() -> Path:
    """The compiled operators; the first call on a machine compiles them, which takes some ten seconds.

    Raises:
        MissingDependency: there is no C++ compiler.
        MoiieError: the compiler fails, or others may write to the cache of compiled libraries.
    """
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in {".cpp", ".h"})
    return compiled("native", sources, _FLAGS, "the CPU operators", "run the bundle's own graphs: --target portable")


def available() -> bool:
    """Whether there is a compiler for `library`; nothing is compiled."""
    return find_compiler() is not None
