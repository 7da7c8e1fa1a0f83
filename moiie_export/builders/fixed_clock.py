"""A clock for programs whose results must not depend on how long they take."""

from __future__ import annotations

import logging
from pathlib import Path

from moiie_runtime.errors import MissingDependency
from moiie_runtime.native.compiling import compiled

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("fixed_clock.cpp")


def fixed_clock() -> dict[str, str]:
    """Environment variables for a program that shall see no time pass, but for a microsecond at each look.

    Empty without a C++ compiler, which is said in the log; and without effect where the system knows no LD_PRELOAD.
    """
    try:
        return {"LD_PRELOAD": str(compiled("fixed-clock", [_SOURCE], ["-O2"], "the clock of reproducible builds"))}
    except MissingDependency as error:
        _log.info("%s: the next build may order tables in the engine in another way", error.message)
        return {}
