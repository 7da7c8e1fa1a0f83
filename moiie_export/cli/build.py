"""`moiie build`: bundle -> BUNDLE/engines/<target>."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiie_export.cli.common import (
    BUNDLE_ARGUMENT,
    CONTEXT,
    JSON_OPTION,
    VERBOSE_OPTION,
    emit_json,
    memory_limit_option,
    note,
    table,
)
from moiie_export.cli.progress import Progress
from moiie_runtime.errors import MoiieError
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_export.builders import BuildPlan, BuildRequest, BuildResult
    from moiie_export.targets import Target

EPILOG = """\b
Examples:
  moiie build moiie-phi3.bundle --target cpu
  moiie build moiie-phi3.bundle --target rtx --sm 89,120
  moiie build moiie-phi3.bundle --target my-orin --recipe my.yaml --dry-run

\b
Built-in targets: cpu, ort-cuda, rtx, orin-nano, orin-nx, orin-32, orin,
thor, server.
A recipe adds others. The bundle itself stays as it is.
"""

DEFAULT_PLUGINS = Path("plugins-build/libmoiie_plugins.so")
"""Where `moiie plugins build` puts it."""


def sm_list(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Option callback: the compute capabilities that `87,89` or `8.7` means, ascending."""
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm").removeprefix("_").replace(".", "") for part in text.lower().split(",")]
    if not all(part.isascii() and part.isdigit() and 2 <= len(part) <= 3 and part[0] != "0" for part in parts):
        raise click.BadParameter(f"{text!r} is no list of compute capabilities; write for example 87 or 86,89,120")
    return tuple(sorted({int(part) for part in parts}))


def with_sms(target: Target, sms: tuple[int, ...] | None) -> Target:
    """The target for the GPUs of `--sm`, where it is given.

    Raises:
        UsageError: the target has no engines of TensorRT.
    """
    _need_tensorrt(target, "--sm", sms)
    return target if sms is None else replace(target, sms=sms)


def _need_tensorrt(target: Target, option: str, value: object) -> None:
    """Refuse an option that is given and means nothing to the target."""
    if value is not None and not target.sms:
        runs = {"onnxruntime_cuda": "one form for all NVIDIA GPUs"}.get(target.backend, "for a CPU")
        raise click.UsageError(f"{option} belongs to targets of TensorRT; {target.name} is ONNX Runtime, {runs}")


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@BUNDLE_ARGUMENT
@click.option("-t", "--target", "target_name", required=True, metavar="NAME", help="What to build for.")
@click.option(
    "--recipe", metavar="RECIPE", help="A recipe with targets of its own.  [default: the one the bundle was made with]"
)
@click.option(
    "--sm",
    callback=sm_list,
    metavar="LIST",
    help="For TensorRT: compute capabilities instead of the target's, e.g. 87,89.",
)
@memory_limit_option("What building may take on this machine, e.g. 8GiB.  [default: what is free]")
@click.option(
    "--plugins",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="libmoiie_plugins.so, for TensorRT.  [default: plugins-build/libmoiie_plugins.so if it is there]",
)
@click.option("--keep-graphs", is_flag=True, help="Leave the graphs that went into TensorRT engines beside them.")
@click.option("--dry-run", is_flag=True, help="Show what would be done and what it takes; write nothing.")
@click.option("--force", is_flag=True, help="Build again what is up to date.")
@JSON_OPTION
@VERBOSE_OPTION
def command(
    bundle: Path,
    target_name: str,
    recipe: str | None,
    sm: tuple[int, ...] | None,
    **options: Any,
) -> None:
    """Build a bundle for a target.

    The result lies in BUNDLE/engines/NAME, where `moiie run --target NAME` finds it.
    """
    from moiie_export.builders import BuildRequest, build, plan
    from moiie_export.cli.environment import available_memory

    target, told = _target(bundle, target_name, recipe, sm)
    _need_tensorrt(target, "--plugins", options["plugins"])
    request = BuildRequest(
        bundle,
        target,
        force=options["force"],
        memory_limit=options["memory_limit"] or available_memory(),
        plugin_library=options["plugins"] or (DEFAULT_PLUGINS if DEFAULT_PLUGINS.is_file() else None),
        keep_graphs=options["keep_graphs"],
        options=told,
    )
    planned = plan(request)
    if _goes_dense(request):
        note(
            f"target {target.name}: no plugin library is given, so each token goes through every expert; "
            "`moiie plugins build` makes one, --plugins FILE gives it"
        )
    if options["dry_run"]:
        _show_plan(planned, request, options["as_json"])
        return
    if not planned.cached:
        note(f"target {target.name}: predicted peak {readable(planned.peak_bytes)} of memory while building")
    progress = Progress()
    result = build(request, progress)
    progress.finish()
    _show_result(result, target, options["as_json"])


def _target(bundle: Path, name: str, recipe: str | None, sm: tuple[int, ...] | None) -> tuple[Target, dict[str, Any]]:
    """The target with the options applied, and those that its name does not say; see `BuildRequest`.

    A recipe's own targets go before the built-in ones.
    """
    from moiie_export.recipe_targets import manifest_targets, recipe_targets
    from moiie_export.targets import find_target
    from moiie_runtime.bundle import Bundle

    raw = Bundle.open(bundle).raw
    told: dict[str, Any] = {}
    if recipe is None:
        found = find_target(name, manifest_targets(raw))
    else:
        from moiie_export.recipe import load_recipe

        found = find_target(name, recipe_targets(load_recipe(recipe).targets))
        told |= {} if _found_without(raw, name) == found else {"recipe": recipe}
    target = with_sms(found, sm)
    return target, told | ({} if target.sms == found.sms else {"sm": list(target.sms)})


def _found_without(raw: Mapping[str, Any], name: str) -> Target | None:
    """The target of this name where no recipe is given; None where there is none."""
    from moiie_export.recipe_targets import manifest_targets
    from moiie_export.targets import find_target

    try:
        return find_target(name, manifest_targets(raw))
    except MoiieError:
        return None


def _goes_dense(request: BuildRequest) -> bool:
    """Whether experts that a plugin library could compute become standard layers for want of one."""
    from moiie_export.targets import has_native_moe
    from moiie_runtime.bundle import Bundle

    target = request.target
    if target.plugins != "optional" or request.plugin_library is not None or has_native_moe(target):
        return False
    return target.backend.startswith("tensorrt") and Bundle.open(request.bundle).model.moe is not None


def _show_plan(planned: BuildPlan, request: BuildRequest, as_json: bool) -> None:
    target = request.target
    if as_json:
        emit_json({"target": target, "output": request.output, **vars(planned)})
        return
    rows = [
        ["target", f"{target.name}: {target.about}"],
        ["output", str(request.output) + (" (up to date)" if planned.cached else "")],
        ["memory", f"{readable(planned.peak_bytes)} while building"],
        ["disk", readable(planned.disk_bytes)],
        *(["note", line] for line in planned.notes),
    ]
    click.echo(table(rows))
    for line in planned.commands:
        click.echo(line)


def _show_result(result: BuildResult, target: Target, as_json: bool) -> None:
    if as_json:
        emit_json({"target": target.name, **vars(result)})
        return
    total = sum(int(entry["bytes"]) for entry in result.files.values())
    done = "up to date" if result.cached else f"built in {result.seconds:.1f} s"
    for name, entry in result.files.items():
        note(f"  {readable(entry['bytes']):>10}  {name}")
    bundle = result.path.parent.parent
    note(f'{readable(total)}, {done}; next: moiie run {bundle} --target {target.name} -p "..."')
    click.echo(str(result.path))
