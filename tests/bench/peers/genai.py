"""onnxruntime-genai on int4 weights in blocks of 32, made by its own builder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.bench.peers.hf_checkpoint import write_hf
from tests.bench.peers.serve import packages_missing, random_ids


def missing(options: dict[str, Any]) -> str | None:
    """Why it cannot run."""
    return packages_missing("onnxruntime_genai", "onnxruntime", "transformers", "safetensors")


def prepare(checkpoint: Path, folder: Path, options: dict[str, Any]) -> Path:
    """The model directory. Its default is one thread and no accuracy level for experts: both are set here."""
    target = folder / "genai"
    if (target / "ready").is_file():
        return target
    from tests.bench.peers.genai_builder import build

    build(write_hf(checkpoint, folder), target)
    path = target / "genai_config.json"
    config = json.loads(path.read_text())
    decoder = config["model"]["decoder"]
    decoder.setdefault("session_options", {})["intra_op_num_threads"] = int(options["threads"])
    path.write_text(json.dumps(config, indent=1) + "\n")
    (target / "ready").touch()
    return target


class Engine:
    """Greedy generation with a fixed number of steps."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(path))
        config = json.loads((path / "genai_config.json").read_text())
        self._vocabulary = config["model"]["vocab_size"]
        self._bytes = sum(each.stat().st_size for each in path.glob("*.onnx*"))

    def about(self) -> dict[str, Any]:
        """Versions and the size of the model."""
        from importlib.metadata import version

        names = ("onnxruntime-genai", "onnxruntime")
        return {**{name: version(name) for name in names}, "file_bytes": self._bytes}

    def sample(self, prompt_tokens: int, new_tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds of the prompt up to its first token, and of `new_tokens` steps after it."""
        parameters = self._genai.GeneratorParams(self._model)
        length = prompt_tokens + new_tokens + 1
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        ids = random_ids(prompt_tokens, self._vocabulary, seed)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        finished = time.perf_counter()
        first = int(generator.get_sequence(0)[prompt_tokens])
        seconds = {"prefill_seconds": prefilled - started, "first_token": first}
        return {**seconds, "decode_seconds": finished - prefilled} if new_tokens else seconds
