"""Curves of a training run as PNG, drawn with Pillow from log.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = (960, 420)
_FRAME = (64, 40, 940, 380)
_COLOURS = (
    (31, 105, 180),
    (214, 96, 22),
    (40, 140, 60),
    (170, 50, 140),
    (110, 110, 110),
    (190, 40, 40),
    (20, 150, 160),
)


@dataclass(frozen=True)
class Curve:
    """A line of a figure: its name and its points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


Figures = Mapping[str, tuple[str, Sequence[str]]]
"""File name without its ending -> title, and which numbers of the log it shows; a name with a star stands for all that
begin with what is before it."""

MOIIE: Figures = {
    "loss": ("Cross entropy of the answers (mean over tokens)", ["answer"]),
    "accuracy": ("Share of held-out questions answered, by kind", ["test*"]),
    "balance": ("Load-balancing loss by modality (2 is balanced)", ["balance_vision", "balance_language"]),
    "routing": ("Share of tokens by modality and expert", ["share_*"]),
}


def draw_curves(run: Path, figures: Figures = MOIIE) -> list[Path]:
    """Write a PNG for each figure beside the log of a run; returns those that had something to show."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    x, marks = _places(records)
    written = []
    for name, (title, wanted) in figures.items():
        keys = [key for each in wanted for key in (_keys(records, each[:-1]) if each.endswith("*") else [each])]
        curves = [Curve(key, [(at, r[key]) for at, r in zip(x, records, strict=True) if key in r]) for key in keys]
        curves = [curve for curve in curves if len(curve.points) > 1]
        if curves:
            figure(title, curves, marks).save(run / f"{name}.png", optimize=True)
            written.append(run / f"{name}.png")
    return written


def figure(title: str, curves: Sequence[Curve], marks: Sequence[tuple[float, str]]) -> Image.Image:
    """A figure with a frame, numbers at its corners, named marks along x, and a legend."""
    picture = Image.new("RGB", SIZE, "white")
    canvas = ImageDraw.Draw(picture)
    left, top, right, bottom = _FRAME
    points = [point for curve in curves for point in curve.points]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    high_y = max(y for _, y in points) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / max(high_x - low_x, 1e-9)
        return left + across * (right - left), bottom - y / high_y * (bottom - top)

    for part in range(5):
        value = high_y * part / 4
        y = place(low_x, value)[1]
        canvas.line((left, y, right, y), fill=(225, 225, 225))
        canvas.text((8, y - 6), f"{value:.2f}", fill="black")
    for at, name in marks:
        if low_x <= at <= high_x:
            x = place(at, 0)[0]
            canvas.line((x, top, x, bottom), fill=(180, 180, 180))
            canvas.text((x + 4, bottom + 6), f"{name} ({at:.0f})", fill="black")
    canvas.rectangle(_FRAME, outline=(120, 120, 120))
    canvas.text((left, 6), title, fill="black")
    x = float(left)
    for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
        canvas.line([place(*point) for point in curve.points], fill=colour, width=2)
        canvas.rectangle((x, 24, x + 10, 34), fill=colour)
        canvas.text((x + 14, 23), curve.name, fill="black")
        x += 30 + 6.5 * len(curve.name)
    return picture


def _places(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[tuple[float, str]]]:
    """Steps counted through all stages, and where each stage begins. A resumed run may have logged steps twice."""
    ends: dict[str, int] = {}
    for record in records:
        ends[record["stage"]] = max(ends.get(record["stage"], 0), record["step"])
    starts, total = {}, 0
    for stage, steps in ends.items():
        starts[stage] = total
        total += steps
    return [float(starts[r["stage"]] + r["step"]) for r in records], [(float(at), name) for name, at in starts.items()]


def _keys(records: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record if key.startswith(prefix)))
