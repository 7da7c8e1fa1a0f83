"""One engine in a process of its own: reads a command a line on stdin, answers with JSON lines on stdout.

usage: engines.py bundle BUNDLE THREADS | engines.py torch CHECKPOINT THREADS
commands: "sample TEXT_TOKENS IMAGES NEW_TOKENS", "memory", and end of input
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

PICTURE_SEED = 7


class Engine(Protocol):
    """What is measured: seconds of prefill and of decode for one request, and how many positions the prompt had."""

    def sample(self, text_tokens: int, images: int, new_tokens: int) -> dict[str, float]: ...


class BundleEngine:
    """A bundle in moiie_runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import moiie_runtime

        self._vlm = moiie_runtime.load(path, threads=threads)

    def sample(self, text_tokens: int, images: int, new_tokens: int) -> dict[str, float]:
        """One greedy answer of exactly `new_tokens` tokens."""
        prompt = "<image>" * images + "a " * (text_tokens // 2)
        pictures = [np.random.default_rng(PICTURE_SEED).integers(0, 256, (64, 64, 3), np.uint8)] * images
        answer = self._vlm.generate_prompt(
            prompt, pictures, max_new_tokens=new_tokens, do_sample=False, eos_token_id=()
        )
        return {
            "prompt_tokens": answer.prompt_tokens,
            "prefill_seconds": answer.prefill_seconds,
            "decode_seconds": answer.stats.decode_seconds,
        }


class TorchEngine:
    """The PyTorch reference, eager."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from moiie_export.model.load import load_model
        from moiie_export.source import ModelSource

        torch.set_num_threads(threads)
        self._torch = torch
        self._source = ModelSource.open(path)
        self._model = load_model(self._source)

    def sample(self, text_tokens: int, images: int, new_tokens: int) -> dict[str, float]:
        """The same work as the bundle's, with buffers that just fit (the reference copies them at every step)."""
        torch, config = self._torch, self._source.config
        side, rows = config.vision.input_size, config.vision.image_tokens
        generator = torch.Generator().manual_seed(PICTURE_SEED)
        length = images * rows + text_tokens
        modality = torch.zeros((1, length), dtype=torch.int32)
        modality[:, : max(0, images * rows - 1)] = 1
        ids = torch.arange(text_tokens) % config.text.vocab_size
        cache = self._model.new_cache(1, length + new_tokens)
        with torch.no_grad():
            started = time.perf_counter()
            embeds = [self._model.embed_tokens(ids)]
            if images:
                pixels = torch.rand((images, 3, side, side), generator=generator)
                embeds.insert(0, self._model.vision_encoder(pixels)[0].flatten(0, 1))
            inputs = torch.cat(embeds).unsqueeze(0)
            last = torch.tensor([[length - 1]])
            out = self._model.decoder(inputs, modality, torch.zeros(1, dtype=torch.int64), last, cache)
            prefilled = time.perf_counter()
            for step in range(new_tokens - 1):
                token = out.logits[0, -1].argmax()
                embed = self._model.embed_tokens(token).view(1, 1, -1)
                out = self._model.decoder(embed, None, torch.tensor([length + step]), None, out.present)
            finished = time.perf_counter()
        return {
            "prompt_tokens": length,
            "prefill_seconds": prefilled - started,
            "decode_seconds": finished - prefilled,
        }


def memory() -> dict[str, float]:
    """Resident memory of this process in MB (1e6 bytes): all of it, and what is not backed by files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssAnon")}
    return {"rss_mb": kilobytes["VmRSS"] * 1.024e-3, "rss_anon_mb": kilobytes["RssAnon"] * 1.024e-3}


def main() -> None:
    """Serve commands until the end of input."""
    kind, path, threads = sys.argv[1:4]
    engine: Engine = {"bundle": BundleEngine, "torch": TorchEngine}[kind](Path(path), int(threads))
    for line in sys.stdin:
        command, *numbers = line.split()
        answer = memory() if command == "memory" else engine.sample(*map(int, numbers))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
