"""`moiie parity --bisect`: the first node of a built form that differs from the bundle's own graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moiie_export.cli.common import emit_json, note, table
from moiie_export.cli.progress import Progress
from moiie_export.cli.sources import need_extra
from moiie_runtime.errors import MoiieError, Unsound

if TYPE_CHECKING:
    from moiie_export.parity.bisect import Bisection
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engines import Engine


def show_bisection(
    bundle: Path, target: str, save: Path | None, *, plugins: Path | None, gpu: int | None, as_json: bool
) -> None:
    """Bisect and print what was found.

    Args:
        bundle: the bundle's directory.
        target: a form of it that was built.
        save: a directory for what Polygraphy can look on with; None for none.
        plugins: the plugin library that its engines hold; None for the one that `moiie plugins build` made.
        gpu: which GPU runs it; None for the first.
        as_json: print one JSON document.

    Raises:
        Unsound: a node differs.
        MissingDependency: Polygraphy or something else is missing, or the engine cannot run on this machine.
    """
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engines import PORTABLE, open_engine

    opened = Bundle.open(bundle)
    if target == PORTABLE:
        raise MoiieError("--bisect: the bundle's own graphs are what it compares with", "name a target that was built")
    engine = open_engine(opened, target, gpu)
    for extra in ("build", "polygraphy", "cpu"):
        need_extra(extra)
    if save is not None and bundle.resolve() in (save.resolve(), *save.resolve().parents):
        raise MoiieError(f"{save}: lies in the bundle, whose files are all listed", "choose a --save beside it")
    _refuse_unread(engine, plugins)
    graphs = {name: bundle / each.file for name, each in opened.components.items()}
    found, commands = _bisect(opened, engine, plugins, None if save is None else (graphs, save))
    if as_json:
        emit_json(found.to_dict() | {"commands": commands})
    else:
        _print(found, commands)
    for component, value in found.ties.items():
        note(f"{component}: routers nearly tie; nothing behind {value} was compared")
    if save is not None and not commands:
        note(f"nothing differs, so nothing was written to {save}")
    if found.differences:
        raise Unsound(
            f"{bundle}: engine {target} computes something else: {found.differences[0]}",
            _hint(found, f"{engine.build} --force"),
        )


def _refuse_unread(engine: Engine, plugins: Path | None) -> None:
    from moiie_export.parity.bisect_plugins import holds_plugins

    if plugins is not None and not holds_plugins(engine):
        raise MoiieError(f"--plugins: the engines of target {engine.target} hold no plugin library", "leave it out")


def _bisect(
    bundle: Bundle, engine: Engine, plugins: Path | None, save: tuple[Mapping[str, Path], Path] | None
) -> tuple[Bisection, list[str]]:
    """What was found, and commands to look on with what `saving` of these arguments wrote."""
    from moiie_export.cli.build import DEFAULT_PLUGINS
    from moiie_export.parity.bisect import bisect
    from moiie_export.parity.bisect_save import saving
    from moiie_export.parity.bisect_sides import values_of

    with contextlib.ExitStack() as stack:
        saved = None if save is None else stack.enter_context(saving(*save))
        options = engine.options()
        stack.callback(options.close)
        values = stack.enter_context(contextlib.closing(values_of(engine, options, plugins or DEFAULT_PLUGINS)))
        progress = Progress()
        found = bisect(bundle, engine, values, progress, *([] if saved is None else [saved.keep]))
        progress.finish()
    return found, [] if saved is None else saved.commands


def _print(found: Bisection, commands: list[str]) -> None:
    rows = [["graph", "values that agree", "largest error"]]
    rows += [[name, str(count), f"{found.worst[name]:.2g}"] for name, count in found.compared.items()]
    click.echo(table(rows))
    for difference in found.differences:
        click.echo(str(difference))
    if commands:
        click.echo(
            "\nto look on with Polygraphy: what the engine gave, the bundle's graph against it, that graph up to the bad value"
        )
        for each in commands:
            click.echo(f"  {each}")


def _hint(found: Bisection, build: str) -> str:
    if all(each.gradual for each in found.differences):
        return (
            f"values before it are nearly as far off, so rounding may have added up: allow more "
            f"(parity.bounds.{found.bounds}.hidden_error of the recipe, then export again) or build with more precision"
        )
    return f"{build}; if the node is bad then too, the builder has a defect"
