"""Serves one engine: python -m tests.bench.peers.serve ENGINE check|prepare|run JSON

check says what is missing, prepare makes the engine's files from a checkpoint, run answers requests, a JSON line each,
on stdin: {"do": "about"}, {"do": "memory"}, {"do": "sample", ...}. Answers are JSON lines on stdout. It runs under the
interpreter that has the engine's packages, so nothing here needs more than the standard library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

ENGINES = ("ours", "llama_cpp", "genai", "torch_eager", "bandwidth")


def main() -> None:
    """Serve."""
    name, verb, text = sys.argv[1:4]
    if name not in ENGINES:
        raise SystemExit(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    options = json.loads(text)
    # Libraries print what they like: stdout is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"tests.bench.peers.{name}")
    if verb == "check":
        _answer(answers, {"missing": module.missing(options)})
    elif verb == "prepare":
        checkpoint, folder = Path(options.pop("checkpoint")), Path(options.pop("folder"))
        _answer(answers, {"path": str(module.prepare(checkpoint, folder, options))})
    else:
        _serve(module.Engine(Path(options.pop("path")), options), answers)


def _serve(engine: Any, answers: IO[str]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        answer = memory() if do == "memory" else getattr(engine, do)(**request)
        _answer(answers, answer)


def _answer(answers: IO[str], answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def memory(pid: int | str = "self") -> dict[str, int]:
    """Resident bytes of a process: not backed by files, and mapped from them."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: 1024 * int(status[name].split()[0]) for key, name in (("anon", "RssAnon"), ("file", "RssFile"))}


def random_ids(count: int, vocabulary: int, seed: int) -> list[int]:
    """The same token ids for every engine; random ones reach all experts, a repeated one would reach two."""
    import random

    return random.Random(f"{seed} {count}").choices(range(min(100, vocabulary // 2), vocabulary), k=count)


def packages_missing(*names: str) -> str | None:
    """Which of these modules cannot be imported, as a sentence; None when all can."""
    from importlib.util import find_spec

    absent = [name for name in names if find_spec(name) is None]
    return f"{sys.executable} has no package {', '.join(absent)}" if absent else None


if __name__ == "__main__":
    main()
