"""PyTorch eager, by transformers' own Llama and Mixtral, in float32 or bfloat16; logits of the last position only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.peers.hf_checkpoint import write_hf
from tests.bench.peers.serve import packages_missing, random_ids


def missing(options: dict[str, Any]) -> str | None:
    """Why it cannot run."""
    return packages_missing("torch", "transformers", "safetensors")


def prepare(checkpoint: Path, folder: Path, options: dict[str, Any]) -> Path:
    """A checkpoint that transformers reads."""
    return write_hf(checkpoint, folder)


class Engine:
    """Options: `dtype`, `threads`, and `experts`, how transformers computes them (None: its default)."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(options["threads"]))
        dtype = getattr(torch, options["dtype"])
        more = {"experts_implementation": options["experts"]} if options.get("experts") else {}
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more).eval()

    def about(self) -> dict[str, Any]:
        """Versions."""
        import transformers

        config = self._model.config
        experts = getattr(config, "_experts_implementation", None) if hasattr(config, "num_local_experts") else None
        return {"torch": self._torch.__version__, "transformers": transformers.__version__, "experts": experts}

    def sample(self, prompt_tokens: int, new_tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds of the prompt up to its first token, and of `new_tokens` steps after it."""
        torch, model = self._torch, self._model
        ids = torch.tensor([random_ids(prompt_tokens, model.config.vocab_size, seed)])
        with torch.inference_mode():
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            first = token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            for _ in range(new_tokens):
                out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            finished = time.perf_counter()
        seconds = {"prefill_seconds": prefilled - started, "first_token": int(first)}
        return {**seconds, "decode_seconds": finished - prefilled} if new_tokens else seconds
