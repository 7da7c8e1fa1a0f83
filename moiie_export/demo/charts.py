"""The share of each vision expert by kind of question, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moiie_export.demo.shares import Shares

FILE = "contributions.png"


def write_shares(directory: Path, shares: Mapping[str, Shares]) -> Path:
    """Write a bar chart into `directory`; returns its file. Needs matplotlib, of the extra `report`."""
    from matplotlib.figure import Figure

    names = list(next(iter(shares.values())).contributions)
    figure = Figure(figsize=(7.5, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(shares)
    for name in names:
        width = [each.contributions[name] for each in shares.values()]
        bars = axes.barh(list(shares), width, left=left, label=name)
        axes.bar_label(bars, [f"{value:.0%}" if value >= 0.05 else "" for value in width], label_type="center")
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the mean absolute weighted features")
    axes.set_title("What each vision expert contributes, by kind of question")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(names), frameon=False)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / FILE, metadata={"Software": None})
    return directory / FILE
