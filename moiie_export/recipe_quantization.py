"""The recipe's section `quantization`: ordered rules that say how each weight is stored."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moiie_export.quantize.banks import BANKS, EXPERTS, NEVER, PLAIN_ONLY
from moiie_export.recipe_schema import Limits, key

PLAIN = ("float16", "float32")
DEFAULT_GROUP, DEFAULT_METHOD = 32, "rtn"
EXPERTS_ADVICE = "put a rule for experts with int4, int8, fp8 or float16 before"
_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class QuantRule:
    """One rule; the first that matches a weight decides."""

    match: tuple[str, ...] = key(
        "Banks, or names of weights with * ? [ ] as in file names; one, or a list.",
        limits=Limits(single=True),
    )
    format: Literal["int4", "int8", "fp8", "w8a8", "float16", "float32"] = key(
        "How what matches is stored. int4 and int8 run everywhere; for TensorRT: fp8 (SM 89 or above), w8a8 (no experts)."
    )
    group_size: Literal[32, 64, 128] | None = key(
        f"int4 and int8: columns that share a scale; must divide the row. null: {DEFAULT_GROUP}.", None
    )
    method: str | None = key(
        f"rtn: round to nearest; awq and gptq (int4, int8): with calibration. null: {DEFAULT_METHOD}.", None
    )

    @property
    def plain(self) -> bool:
        """Whether what matches is stored as floats."""
        return self.format in PLAIN

    def contradictions(self) -> Iterator[tuple[str, str, str | None]]:
        """(key, what is wrong, hint) of what no checkpoint could make right."""
        from moiie_export.quantize.methods import methods_of
        from moiie_export.quantize.scheme import GROUPED, WEIGHT_ONLY

        for position, pattern in enumerate(self.match):
            yield from _pattern_problems(f"match[{position}]" if len(self.match) > 1 else "match", pattern)
        if not self.match:
            yield "match", "an empty list matches nothing", f"banks: {', '.join(BANKS)}"
        elif not self.plain and all(pattern in (*NEVER, *PLAIN_ONLY) for pattern in self.match):
            yield "match", f"{', '.join(self.match)}: never quantised", "leave the rule out"
        banks = [pattern for pattern in self.match if pattern in ("experts", *EXPERTS)]
        if banks and not self.plain and self.format not in WEIGHT_ONLY:
            yield "format", f"{', '.join(banks)}: experts have no {self.format} form", EXPERTS_ADVICE
        if self.group_size is not None and self.format not in GROUPED:
            yield "group_size", f"contradicts format {self.format}, which has no groups", "leave it out"
        methods = methods_of(self.format)
        if self.method is not None and self.method not in methods:
            hint = f"methods of {self.format}: {', '.join(methods)}" if methods else "leave it out"
            yield "method", f"contradicts format {self.format}, which has no method {self.method!r}", hint


def _pattern_problems(where: str, pattern: str) -> Iterator[tuple[str, str, str | None]]:
    if pattern in BANKS or "." in pattern or _GLOB & set(pattern):
        return
    close = difflib.get_close_matches(pattern, BANKS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"banks: {', '.join(BANKS)}"
    yield where, f"unknown bank {pattern!r}; names of weights have dots, patterns * ? or [", hint


@dataclass(frozen=True)
class QuantizationSection:
    """Which weights are quantised, and how."""

    rules: tuple[QuantRule, ...] = key(
        "Ordered; the first rule that matches a weight decides, and export.dtype stores what none matches.", ()
    )
    min_tokens: int = key(
        "awq and gptq: an expert that fewer calibration tokens reach is rounded to nearest instead.",
        32,
        limits=Limits(minimum=1, maximum=2**31 - 1),
    )
