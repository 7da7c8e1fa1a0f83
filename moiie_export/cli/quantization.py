"""What a manifest says about quantised weights, for `moiie inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from moiie_export.cli.common import table
from moiie_export.quantize.coverage import table_rows


def quantization_summary(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's section with its weights counted; None for a bundle that has none."""
    section = raw.get("quantization")
    if not isinstance(section, Mapping):
        return None
    kinds = Counter(_kind(entry) for entry in section.get("weights", {}).values())
    kept = {name: section[name] for name in ("fallbacks", "islands", "coverage") if section.get(name)}
    return {"weights": dict(sorted(kinds.items())), **kept}


def quantization_lines(summary: Mapping[str, Any], min_tokens: int) -> Iterator[str]:
    """The same for people: forms, what fell back and why, islands, and who saw how many tokens."""
    counts = ", ".join(f"{count} as {kind}" for kind, count in summary["weights"].items())
    yield f"\nquantised: {counts or 'nothing'}"
    for name, reason in summary.get("fallbacks", {}).items():
        yield f"  {name}: {reason}"
    if "islands" in summary:
        yield f"\nfloat32 islands: {len(summary['islands'])}"
        yield from (f"  {name}" for name in summary["islands"])
    if "coverage" in summary:
        yield "\ncalibration: tokens by layer, expert and modality"
        yield table(table_rows(summary["coverage"], min_tokens), "  ")


def _kind(entry: Mapping[str, Any]) -> str:
    group = entry.get("group_size")
    return " ".join(
        [str(entry.get("format")), *([f"in groups of {group}"] if group else []), f"by {entry.get('method')}"]
    )
