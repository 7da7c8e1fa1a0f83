"""`moiie plugins`: the TensorRT plugin library."""

from __future__ import annotations

from pathlib import Path

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_export.cli.progress import Progress
from moiie_runtime.sizes import readable

EPILOG = """\b
Examples:
  moiie plugins build
  moiie plugins build --sm 87 --out orin-plugins
"""
BUILD_EPILOG = """\b
Examples:
  moiie plugins build
  moiie plugins build --sm 87,110 --out jetson-plugins

\b
Needs triton, cmake, a C++17 compiler and TensorRT's headers: those of the folder TENSORRT_INCLUDE_DIR, else the
system's, else those of the pip package kernel-lens. No GPU, no CUDA toolkit and no TensorRT library are needed.
Experts in fp8 have kernels for SM 89 and above; a library for older GPUs alone leaves them out.
Build on the device itself where its driver is older than Triton's compiler (JetPack 6).
Exits 4 when one of these is missing, or there are no kernels for an SM.
"""


@click.group(context_settings=CONTEXT, epilog=EPILOG)
@VERBOSE_OPTION
def command() -> None:
    """Build the TensorRT plugins that engines with experts need."""


def _sm_list(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    from moiie_export.cli.build import sm_list

    return sm_list(context, parameter, text)


@command.command("build", context_settings=CONTEXT, epilog=BUILD_EPILOG)
@click.option(
    "--sm",
    "sms",
    callback=_sm_list,
    metavar="LIST",
    help="Compute capabilities to compile for, e.g. 87 or 86,89,120.  [default: 80,86,87,89,90,100,110,120]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("plugins-build"),
    metavar="DIR",
    help="Where libmoiie_plugins.so and its manifest go.",
)
@JSON_OPTION
@VERBOSE_OPTION
def build(sms: tuple[int, ...] | None, out: Path, as_json: bool) -> None:
    """Compile libmoiie_plugins.so: the kernels for each SM, and the C++ around them."""
    from moiie_plugins.build import SMS, build_library

    progress = Progress()
    built = build_library(out, SMS if sms is None else sms, progress=progress)
    progress.finish()
    if as_json:
        emit_json({**built.facts, "path": built.library, "manifest": built.manifest})
        return
    facts = built.facts
    rows = [
        ["kernels", f"{facts['kernels']['count']} for SM {', '.join(map(str, facts['sms']))}"],
        ["TensorRT headers", f"{facts['tensorrt_headers']['version']} ({facts['tensorrt_headers']['origin']})"],
        ["size", readable(facts["library"]["bytes"])],
    ]
    note(table(rows))
    click.echo(str(built.library))
