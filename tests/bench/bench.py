"""Speed and memory of a bundle beside PyTorch eager, in one run (see README.md).

usage: python tests/bench/bench.py [--quick] [--samples N] [--keep FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from moiie_export.pipeline import ExportRequest, export_bundle  # noqa: E402
from moiie_export.recipe import load_recipe  # noqa: E402
from tests.synthetic import write_checkpoint  # noqa: E402 - the path comes first

QUICK = {"hidden": 128, "intermediate": 256, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 512}
FULL = {"hidden": 768, "intermediate": 2048, "layers": 8, "heads": 12, "kv_heads": 4, "vocab": 2048}
FOREIGN_LIMIT = 0.06


class Worker:
    """An engine process and its samples."""

    def __init__(self, name: str, kind: str, path: Path, threads: int) -> None:
        self.name, self.samples = name, []
        command = [sys.executable, str(HERE / "engines.py"), kind, str(path), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command, wait for its answer."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the engine's pipes are closed")
        print(command, file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the engine stopped with exit status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, text_tokens: int, images: int, new_tokens: int) -> None:
        """Take one sample and note how much of the CPU others used meanwhile."""
        before, own, started = busy_seconds(), self._cpu(), time.monotonic()
        answer = self.ask(f"sample {text_tokens} {images} {new_tokens}")
        capacity = (time.monotonic() - started) * (os.cpu_count() or 1)
        answer["foreign"] = max(0.0, (busy_seconds() - before) - (self._cpu() - own)) / capacity
        self.samples.append(answer)

    def close(self) -> dict[str, Any]:
        """Memory at the end."""
        used = self.ask("memory")
        self._process.communicate()
        return used

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU seconds all processes have used."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def measure(workers: list[Worker], count: int, request: tuple[int, int, int]) -> dict[str, Any]:
    """Alternate samples after one warm-up each; medians of quiet samples and the memory at the end."""
    for worker in workers:
        worker.ask("sample {} {} {}".format(*request))
    for _ in range(count):
        for worker in workers:
            worker.sample(*request)
    return {worker.name: _summary(worker, request[2]) for worker in workers}


def _summary(worker: Worker, new_tokens: int) -> dict[str, Any]:
    quiet = [sample for sample in worker.samples if sample["foreign"] <= FOREIGN_LIMIT]
    enough = len(quiet) >= max(3, len(worker.samples) // 2)
    used = quiet if enough else worker.samples
    prefill = [sample["prompt_tokens"] / sample["prefill_seconds"] for sample in used]
    decode = [(new_tokens - 1) / sample["decode_seconds"] for sample in used]
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
        "quiet": enough,
        **worker.close(),
        "samples": worker.samples,
    }


def prepare(sizes: dict[str, int], label: str) -> tuple[Path, dict[int, Path]]:
    """A checkpoint and its bundles by capacity, kept in build/bench for the next run."""
    folder = ROOT / "build" / "bench" / label
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        tower = (96, 192, 3, 4, 96, 8)
        write_checkpoint(
            checkpoint, **sizes, experts=4, top_k=2, backbone="phi3", variant="moiie", tower=tower, dtype="F32", seed=1
        )
    recipe = load_recipe("default")
    bundles = {capacity: folder / f"bundle-{capacity}" for capacity in (512, 4096)}
    for capacity, path in bundles.items():
        export_bundle(
            ExportRequest(checkpoint, path, replace(recipe, export=replace(recipe.export, max_context=capacity)))
        )
    return checkpoint, bundles


def main() -> None:
    """Run everything, print a table, append the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a model so small that only the harness is tested")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    checkpoint, bundles = prepare(QUICK if arguments.quick else FULL, "quick" if arguments.quick else "full")
    request = (112, 1, 16 if arguments.quick else 48)
    beside = measure(
        [Worker("bundle", "bundle", bundles[4096], threads), Worker("pytorch", "torch", checkpoint, threads)],
        arguments.samples,
        request,
    )
    capacity = measure(
        [Worker(f"capacity {size}", "bundle", path, threads) for size, path in bundles.items()],
        arguments.samples,
        request,
    )
    result = {
        "benchmark": "quick" if arguments.quick else "full",
        "machine": {"cpu": cpu_name(), "threads": threads, "python": platform.python_version()},
        "versions": {name: version(name) for name in ("moiie-export", "onnxruntime", "torch")},
        "beside": beside,
        "capacity": capacity,
    }
    _print(beside, capacity)
    if arguments.keep:
        with arguments.keep.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, sort_keys=True) + "\n")


def cpu_name() -> str:
    """The processor as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(beside: dict[str, Any], capacity: dict[str, Any]) -> None:
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'RSS MB':>10}{'anon MB':>10}")
    for name, row in {**beside, **capacity}.items():
        noisy = "" if row["quiet"] else "  (noisy: other processes took part of the CPU)"
        print(
            f"{name:14}{row['prefill_tokens_per_second']:15.1f}{row['decode_tokens_per_second']:15.1f}"
            f"{row['rss_mb']:10.0f}{row['rss_anon_mb']:10.0f}{noisy}"
        )
    ours, theirs = beside["bundle"], beside["pytorch"]
    for what in ("prefill", "decode"):
        key = f"{what}_tokens_per_second"
        print(f"bundle / pytorch, {what}: {ours[key] / theirs[key]:.2f}")
    small, large = (capacity[name]["decode_tokens_per_second"] for name in ("capacity 512", "capacity 4096"))
    print(f"decode at capacity 4096 / at 512: {large / small:.2f}")


if __name__ == "__main__":
    main()
