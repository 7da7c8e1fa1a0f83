"""`moiie doctor`: can this machine run a bundle?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_export.cli.environment import Finding

EPILOG = """\b
Examples:
  moiie doctor
  moiie doctor moiie-phi3.bundle
  moiie doctor --json > report.json

Exits 4 when this machine lacks something that a run needs.
"""


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@JSON_OPTION
@VERBOSE_OPTION
def command(bundle: Path | None, as_json: bool) -> None:
    """Check whether this machine can run a bundle.

    Looks at the installed packages and the GPUs and, when BUNDLE is given, at its files, at each form it was built in, and
    at the memory that a question takes.
    """
    from moiie_export.cli.environment import Finding, environment

    findings = list(environment())
    broken: MoiieError | None = None
    if bundle is not None:
        try:
            findings += list(_bundle(bundle))
        except MoiieError as error:
            broken = error
            findings.append(Finding("bundle", "fail", error.message, error.hint))
    failed = [each for each in findings if each.status == "fail"]
    if as_json:
        emit_json({"ok": not failed, "findings": [each.to_dict() for each in findings]})
    else:
        click.echo(table([[each.status, each.name, each.detail] for each in findings]))
        for each in findings:
            if each.hint and (each.status == "warn" or each.name.startswith("target ")):
                note(f"{each.name}: {each.hint}")
    lacking = [each for each in failed if broken is None or each.name != "bundle"]
    if lacking:
        text = "; ".join(f"{each.name}: {each.detail}" for each in lacking)
        raise MissingDependency(f"a run would fail here: {text}", "; ".join(each.hint for each in lacking if each.hint))
    if broken is not None:
        raise broken
    if not as_json:
        note("everything that a run needs is here")


def _bundle(path: Path) -> Iterator[Finding]:
    from moiie_export.cli.built import form_findings
    from moiie_export.cli.environment import Finding
    from moiie_runtime.bundle import Bundle

    bundle = Bundle.open(path)
    bundle.check_files()
    size = sum(record.bytes for record in bundle.files.values())
    yield Finding("bundle", "ok", f"{path}: {bundle.name}, {len(bundle.files)} files, {readable(size)}")
    yield from form_findings(bundle)
