"""Logit agreement along the sequence: the error at every compared position, and whether the best token is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moiie_export.report.axes import Axes
from moiie_export.report.document import Document, real
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import counted, listed, short
from moiie_export.report.scale import ErrorScale
from moiie_export.report.section import Section
from moiie_export.report.svg import Drawing
from moiie_export.report.table import figure, figures, table

_LEGEND = [("circle", "series s0 area", "same best token"), ("cross", "differs", "another")]
_PICTURE = ("bar", "shade", "picture")


@dataclass(frozen=True)
class LogitPoint:
    """One position: its phase, the error of its logits, and whether both sides like the same token best."""

    position: int
    phase: str
    error: float
    same: bool


@dataclass(frozen=True)
class LogitTrack:
    """One case.

    Attributes:
        points: by position.
        prompt: positions of the prompt; the answer begins after them.
        vision: [start, stop) of the stretches that hold pictures.
        bounds: the largest errors allowed.
    """

    case: str
    points: list[LogitPoint]
    prompt: int
    vision: list[tuple[int, int]]
    bounds: list[float]

    @property
    def differing(self) -> list[int]:
        """Positions with another best token."""
        return [point.position for point in self.points if not point.same]

    @property
    def scale(self) -> ErrorScale:
        """A scale for every point and the bounds."""
        return ErrorScale.of((point.error for point in self.points), self.bounds)

    def description(self) -> str:
        """What there is to see, in words."""
        worst = max(self.points, key=lambda point: (point.error != point.error, point.error))
        at = "none" if not self.differing else f"at position {listed(self.differing)}"
        return (
            f"{counted(len(self.points), 'position')}; the largest error is {short(worst.error)} at position "
            f"{worst.position}, the bound {', '.join(map(short, self.bounds))}. Another best token: {at}."
        )


def logit_tracks(document: Document) -> list[LogitTrack]:
    """The track of each case that measured logits."""
    bound = document.data.get("bounds", {}).get("logits_error")
    tracks = []
    for case in document.cases:
        points = []
        for phase in document.phases:
            if phase.case != case["name"] or "logits" not in phase.data:
                continue
            logits = phase.data["logits"]
            after = range(case["positions"], case["positions"] + len(logits["errors"]))
            positions = logits.get("positions", after)
            measured = zip(positions, logits["errors"], logits["same_best_token"], strict=True)
            points += [LogitPoint(position, phase.name, real(error), same) for position, error, same in measured]
        if points:
            points.sort(key=lambda point: point.position)
            vision = [(start, stop) for start, stop in case.get("vision_spans", [])]
            tracks.append(LogitTrack(case["name"], points, case["positions"], vision, [] if bound is None else [bound]))
    return tracks


def section(document: Document) -> Section | None:
    """The charts; None where no logits were measured."""
    tracks = logit_tracks(document)
    if not tracks:
        return None
    lead = tag(
        "p",
        "Error of the logits at positions of the prompt, evenly chosen where it is long, and at every decoded token. "
        "Both sides are fed the same tokens, whichever they would have chosen.",
        class_="lead",
    )
    drawn = [figure(_draw(track, index), _caption(track), _table(track)) for index, track in enumerate(tracks)]
    return Section("logits", "Logits along the sequence", join([lead, figures(drawn)]))


def _caption(track: LogitTrack) -> Markup:
    same = len(track.points) - len(track.differing)
    return join([tag("strong", track.case), f": same best token at {same} of {len(track.points)}"])


def _draw(track: LogitTrack, index: int) -> Drawing:
    legend = [*_LEGEND, *[_PICTURE] * bool(track.vision)]
    axes = Axes(f"logits-{index}", f"{track.case}: logit error by position", track.description(), legend)
    axes.across(0, max(point.position for point in track.points), "position")
    for start, stop in track.vision:
        axes.shade(start, stop, "picture")
    axes.up(track.scale)
    axes.divide(track.prompt - 0.5)
    axes.bounds(track.bounds)
    for point in track.points:
        shape, class_ = ("circle", "series s0 area") if point.same else ("cross", "differs")
        told = "same best token" if point.same else "another best token"
        note = f"position {point.position} ({point.phase}): {short(point.error)}, {told}"
        axes.mark((point.position, point.error), shape, class_, note)
    return axes.drawing


def _table(track: LogitTrack) -> Markup:
    rows: list[list[Any]] = [
        [point.position, point.phase, point.error, "same" if point.same else "another"] for point in track.points
    ]
    return table(f"{track.case}: logits by position", ["position", "phase", "error", "best token"], rows)
