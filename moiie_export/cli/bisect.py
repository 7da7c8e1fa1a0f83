"""`moiie parity --bisect`: the first node of a built form that differs from the bundle's own graphs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from moiie_export.cli.common import emit_json, note, table
from moiie_export.cli.progress import Progress
from moiie_export.cli.sources import need_extra
from moiie_runtime.errors import MoiieError, Unsound


def show_bisection(bundle: Path, target: str, *, as_json: bool) -> None:
    """Bisect and print what was found.

    Raises:
        Unsound: a node differs.
        MissingDependency: the engine cannot run on this machine.
    """
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engines import PORTABLE, open_engine

    opened = Bundle.open(bundle)
    if target == PORTABLE:
        raise MoiieError("--bisect: the bundle's own graphs are what it compares with", "name a target that was built")
    engine = open_engine(opened, target)
    need_extra("export")
    from moiie_export.parity.bisect import bisect, values_of

    options = engine.options()
    progress = Progress()
    try:
        with contextlib.closing(values_of(engine, options)) as values:
            found = bisect(opened, engine, values, progress)
    finally:
        options.close()
    progress.finish()
    if as_json:
        emit_json(found.to_dict())
    else:
        rows = [["graph", "values that agree", "largest error"]]
        rows += [[name, str(count), f"{found.worst[name]:.2g}"] for name, count in found.compared.items()]
        click.echo(table(rows))
        for difference in found.differences:
            click.echo(str(difference))
    for component, value in found.ties.items():
        note(f"{component}: routers nearly tie; nothing behind {value} was compared")
    if found.differences:
        raise Unsound(
            f"{bundle}: engine {target} computes something else: {found.differences[0]}",
            f"moiie build {bundle} --target {target} --force; if the node is bad then too, the builder has a defect",
        )
