"""Numerics and speed of the kernels on this machine's GPU; see run.sh. Exits with 1 where numbers are wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.speed import Row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="toy sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--only", choices=["numerics", "speed", "pipeline"], help="a part of it")
    parser.add_argument("--formats", nargs="+", default=[], help="of weights, for speed; default: all")
    parser.add_argument("--bundle", type=Path, help="for the pipeline; default: the smallest is exported here")
    parser.add_argument("--checkpoint", type=Path, help="what --bundle was exported from, for parity in the pipeline")
    parser.add_argument("--plugins", type=Path, help="libmoiie_plugins.so, for the pipeline; default: dense experts")
    parser.add_argument("--json", type=Path, help="a file of JSON lines to add the results to")
    given = parser.parse_args()
    for option in ("bundle", "checkpoint", "plugins"):
        path = getattr(given, option)
        if path is not None and not path.exists():
            parser.error(f"--{option}: {path} does not exist")
    return given


def main() -> int:
    """Returns the exit status."""
    arguments = _arguments()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.bench.record import append, environment
    from tests.gpu.numerics import Place, outcomes

    if not arguments.interpret and not torch.cuda.is_available():
        print("error: torch sees no GPU; --interpret runs toy sizes without one", file=sys.stderr)
        return 4
    if arguments.interpret:
        place = Place(torch.device("cpu"), 89, toy=True)
    else:
        major, minor = torch.cuda.get_device_capability()
        place = Place(torch.device("cuda"), 10 * major + minor, toy=False)
    found = []
    if arguments.only in (None, "numerics"):
        for outcome in outcomes(place):
            found.append(outcome)
            print(f"{'ok  ' if outcome.passed else 'FAIL'} {outcome.error:9.2e} <= {outcome.bound:.1e}  {outcome.name}")
    measured = []
    if arguments.only in (None, "speed"):
        from tests.gpu.speed import rows

        for row in rows(place, arguments.formats):
            measured.append(row)
            print(f"measured: {row.what}", file=sys.stderr)
    steps = []
    if arguments.only in (None, "pipeline"):
        from tests.gpu.pipeline import Given, pipeline_steps

        steps = list(pipeline_steps(Given(place.sm, arguments.bundle, arguments.checkpoint, arguments.plugins)))
    device = "the interpreter" if arguments.interpret else torch.cuda.get_device_name()
    about = {"device": device, "sm": place.sm, **environment(("torch", "triton", "numpy"))}
    parts = {"numerics": found, "speed": measured, "pipeline": steps}
    append(arguments.json, {**about, **{name: [asdict(each) for each in part] for name, part in parts.items()}})
    _print_table(about, measured)
    for step in steps:
        print(f"{step.what:58} {step.outcome}")
    wrong = [outcome.name for outcome in found if not outcome.passed] + [step.what for step in steps if step.failed]
    count = len(found) + sum(step.ran for step in steps)
    left = "".join(f"; not run: {step.what}" for step in steps if not step.ran)
    print(f"\n{count - len(wrong)} of {count} checks passed{': wrong: ' + '; '.join(wrong) if wrong else ''}{left}")
    return 1 if wrong else 0


def _print_table(about: dict[str, Any], measured: Sequence[Row]) -> None:
    print(f"\n{about['device']}, SM {about['sm']}, {about['versions']}, commit {about['commit']}\n")
    print(f"{'what':58} {'us':>10} {'fraction':>9}  of      goal")
    for row in measured:
        fraction = "" if row.fraction is None else f"{row.fraction:9.2f}"
        goal = "" if row.goal is None else f"{row.goal:.2f} {'met' if (row.fraction or 0) >= row.goal else 'MISSED'}"
        print(f"{row.what:58} {row.seconds * 1e6:10.1f} {fraction:>9}  {row.of:7} {goal}")


if __name__ == "__main__":
    sys.exit(main())
