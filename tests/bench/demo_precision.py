"""What quantisation costs the trained demo model: right answers and routing, per precision and form of the bundle.

    python tests/bench/demo_precision.py [--questions 500] [--seed 0]

Held-out questions of recipes/demo are asked of bundles in float32, int8 and int4, each as exported and as built for the
CPU (activations rounded to int8). Routing agreement is the share of tokens and layers whose two experts are those of the
float32 bundle, over the prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import moiie_runtime as mr  # noqa: E402
from moiie_export.builders import BuildRequest, build  # noqa: E402
from moiie_export.demo.evaluate import NEW_TOKENS, conversation, score  # noqa: E402
from moiie_export.demo.families import demo_family  # noqa: E402
from moiie_export.demo.family import Asked, DemoFamily  # noqa: E402
from moiie_export.demo.shipped import shipped_checkpoint  # noqa: E402
from moiie_export.pipeline import ExportRequest, export_bundle  # noqa: E402
from moiie_export.recipe import Recipe, load_recipe  # noqa: E402
from moiie_export.targets import find_target  # noqa: E402
from tests.bench.record import append, environment  # noqa: E402

FORMS = ("portable", "cpu")


def recipes() -> dict[str, Recipe]:
    """Precision -> recipe; float32 is the recipe of the demo with its storage changed."""
    demo = load_recipe("demo")
    plain = replace(demo, export=replace(demo.export, dtype="float32"))
    return {"float32": plain, "int8": load_recipe("demo-int8"), "int4": load_recipe("demo-int4")}


def ask(bundle: Path, form: str, family: DemoFamily, items: Sequence[Asked]) -> tuple[float, list[np.ndarray]]:
    """Share of right answers, and the experts [layers, tokens, k] of each prompt, ids in ascending order."""
    answers, chosen = [], []
    with mr.load(bundle, target=form) as vlm:
        for item in items:
            record = mr.Record(routing=True)
            got = vlm.generate(conversation(family, item), record=record, max_new_tokens=NEW_TOKENS)
            answers.append(got.text)
            assert got.routing is not None
            chosen.append(np.sort(np.stack([each.expert_ids for each in got.routing.prefill.values()]), axis=-1))
    return score(family, items, answers).overall, chosen


def main() -> None:
    """Measure, print, and add a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON-lines file to add the result to")
    wanted = parser.parse_args()
    family = demo_family("moiie")
    items = family.held_out(wanted.questions, wanted.seed)
    rows: dict[str, dict[str, float]] = {}
    reference: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision, recipe in recipes().items():
            bundle = Path(folder) / precision
            export_bundle(ExportRequest(shipped_checkpoint(family), bundle, recipe))
            build(BuildRequest(bundle, find_target("cpu")), lambda *_: None)
            for form in FORMS:
                accuracy, chosen = ask(bundle, form, family, items)
                reference = reference or chosen
                same = [(a == b).all(axis=-1).reshape(-1) for a, b in zip(chosen, reference, strict=True)]
                rows[f"{precision} {form}"] = {
                    "accuracy": accuracy,
                    "routing_agreement": float(np.concatenate(same).mean()),
                }
                print(f"{precision:8} {form:9} {accuracy:7.1%}   routing {np.concatenate(same).mean():.2%}", flush=True)
    line = {"benchmark": "demo_precision", "questions": wanted.questions, "seed": wanted.seed, "rows": rows}
    append(wanted.output, {**environment(), **line})


if __name__ == "__main__":
    main()
