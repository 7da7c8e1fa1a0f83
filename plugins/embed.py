"""The launch table as the library embeds it: launch_table.json -> lines of words, which C++ reads without a JSON parser.

    source SHA256
    plan OP DTYPE WEIGHTS ALIGNED MIN_ROUTES MAX_ROUTES
    symbol NAME DIVISOR [TERM FACTOR]...
    buffer NAME BYTES [DIM]...
    launch KERNEL SYMBOL BLOCK SYMBOL BLOCK SYMBOL BLOCK
    kernel NAME ENTRY OLDEST_SM
    parameter NAME KIND
    image SM KIND OFFSET SIZE NUM_WARPS SHARED [NAME SIZE]...

`symbol`, `buffer` and `launch` belong to the last plan, `parameter` and `image` to the last kernel; `-` is an empty word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

_ALIGNED = {True: "yes", False: "no", None: "either"}


def table_text(table: Mapping[str, Any]) -> str:
    """The lines for src/launch_table.cpp.

    Args:
        table: launch_table.json (plugins/README.md).

    Raises:
        KeyError: the table lacks something.
        ValueError: a name holds white space.
    """
    lines: list[tuple[object, ...]] = [("source", table["source"])]
    for plan in table["plans"]:
        lines += _plan(plan)
    for name, kernel in sorted(table["kernels"].items()):
        lines += _kernel(name, kernel)
    return "".join(" ".join(map(_word, line)) + "\n" for line in lines)


def _plan(plan: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    names = (plan[key] for key in ("op", "dtype", "weights"))
    yield ("plan", *names, _ALIGNED[plan["aligned"]], plan["min_routes"], plan["max_routes"])
    for symbol in plan["symbols"]:
        terms = zip(symbol["terms"], symbol["factors"], strict=True)
        yield ("symbol", symbol["name"], symbol["divisor"], *chain.from_iterable(terms))
    for buffer in plan["workspace"]:
        yield ("buffer", buffer["name"], buffer["bytes"], *buffer["dims"])
    for launch in plan["launches"]:
        yield ("launch", launch["kernel"], *chain.from_iterable(launch["grid"]))


def _kernel(name: str, kernel: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    yield ("kernel", name, kernel["entry"], kernel["oldest_sm"])
    for parameter, kind in kernel["parameters"]:
        yield ("parameter", parameter, kind)
    for image in kernel["images"]:
        numbers = (image[key] for key in ("offset", "size", "num_warps", "shared"))
        yield ("image", image["sm"], image["kind"], *numbers, *chain.from_iterable(sorted(image["blocks"].items())))


def _word(value: object) -> str:
    word = str(value)
    if any(each.isspace() for each in word) or word == "-":
        raise ValueError(f"{word!r} is no word of a launch table")
    return word or "-"
