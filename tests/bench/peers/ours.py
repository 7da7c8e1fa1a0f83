"""A bundle in moiie_runtime, as exported or as built for a target."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.peers.serve import memory, packages_missing, random_ids

_PICTURE_SEED = 7
_GAP = 0.005  # seconds between two looks at memory


def missing(options: dict[str, Any]) -> str | None:
    """Why it cannot run."""
    return packages_missing("moiie_runtime", "onnxruntime")


class Engine:
    """Options: `threads`, and `target`, the built form to run, or "portable"."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        import moiie_runtime

        self._target = options["target"]
        started = time.perf_counter()
        # No features are kept: each sample runs the vision encoder.
        self._vlm = moiie_runtime.load(path, target=self._target, threads=int(options["threads"]), feature_cache=0)
        self._load_seconds = time.perf_counter() - started

    def about(self) -> dict[str, Any]:
        """Versions and seconds of loading."""
        import onnxruntime

        about = {"onnxruntime": onnxruntime.__version__, "load_seconds": self._load_seconds}
        return {**about, "target": self._target}

    def sample(self, prompt_tokens: int, new_tokens: int, images: int = 0, seed: int = 0) -> dict[str, Any]:
        """Seconds of the prompt up to its first token, and of `new_tokens` steps after it."""
        prompt, settings = self._request(prompt_tokens, new_tokens, images, seed)
        answer = self._vlm.generate_prompt(prompt, **settings)
        found = {"prefill_seconds": answer.stats.prefill_seconds, "first_token": answer.token_ids[0]}
        return {**found, "decode_seconds": answer.stats.decode_seconds} if new_tokens else found

    def watched(self, prompt_tokens: int, new_tokens: int, images: int = 0, seed: int = 0) -> dict[str, Any]:
        """Memory of one request: before, the most until the first token, right after it, and at the end."""
        prompt, settings = self._request(prompt_tokens, new_tokens, images, seed)
        found: dict[str, Any] = {"before": memory()}
        with _Watch() as watch:
            chunks = self._vlm.stream_prompt(prompt, **settings)
            first = next(chunks)
        found |= {"during_prefill": watch.most, "first_seconds": first.stats.prefill_seconds}
        next(chunks)  # the first step of decode: what prefill used has been given back
        found["after_prefill"] = memory()
        for last in chunks:
            stats = last.stats
        return {**found, "at_end": memory(), "decode_seconds": stats.decode_seconds, "load": self._load_seconds}

    def _request(self, prompt_tokens: int, new_tokens: int, images: int, seed: int) -> tuple[Any, dict[str, Any]]:
        """A prompt of pictures and `prompt_tokens` random tokens after them, and settings for exactly the steps asked."""
        from moiie_runtime.prompt import Prompt, token_modality, token_types

        bundle = self._vlm.bundle
        tokens = bundle.tokens
        text = np.array(random_ids(prompt_tokens, bundle.model.vocab_size, seed), np.int64)
        ids = np.concatenate([np.full(images, tokens.image_placeholder, np.int64), text])
        types = token_types(ids, tokens)
        rule = bundle.modality.last_image_token_is_language
        modality = token_modality(types, last_image_token_is_language=rule)
        prompt = Prompt("", ids, modality, int(types.sum()), len(types))
        if images:
            picture = np.random.default_rng(_PICTURE_SEED).integers(0, 256, (384, 384, 3), np.uint8)
            read = self._vlm.processor.from_text("<image>" * images + "picture", [picture] * images, None)
            prompt = replace(prompt, pictures=read.pictures, encoders=read.encoders)
        settings = {"max_new_tokens": new_tokens + 1, "do_sample": False, "eos_token_id": (), "repetition_penalty": 1.0}
        return prompt, settings


class _Watch:
    """The most memory that the process takes while the block runs, looked at from a thread."""

    def __enter__(self) -> _Watch:
        self.most = memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_GAP):
            now = memory()
            self.most = {key: max(self.most[key], now[key]) for key in now}
