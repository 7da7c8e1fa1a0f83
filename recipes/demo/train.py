"""Trains the demo model from nothing: python -m moiie_recipes.demo.train --out DIR

Stages: `perception` teaches the tower and the decoder's lower layers what fills each patch; `dense` trains the dense model
on questions; `align` trains a fresh projector between tower and decoder, both frozen (the authors' stage 1); then
`moiie upcycle` makes it sparse and `sparse` trains everything with both load-balancing losses (the authors' stage 2);
`specialise` goes on with that while the experts of the language side forget how to see, which upcycling gave them.
Killed at any moment, the same command goes on from the last saved state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moiie_export.model.load import load_model
from moiie_export.model.vlm import VlmModel
from moiie_export.source import ModelSource
from moiie_recipes.demo.architecture import dense_config
from moiie_recipes.demo.curves import draw_curves
from moiie_recipes.demo.running import check_settings, run, run_stage
from moiie_recipes.demo.saving import init_projector, new_model, save_checkpoint
from moiie_recipes.demo.stages import STAGES, Settings, Stage
from moiie_recipes.demo.tokenizer import BOS, EOS, build_tokenizer


def train(out: Path, settings: Settings) -> Path:
    """Train, or go on training, in `out`; returns the checkpoint directory with float16 weights."""
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out, settings)
    tokenizer = build_tokenizer()
    raw = dense_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS))
    model = new_model(raw, settings.seed)
    for name in STAGES:
        torch.manual_seed(settings.seed + STAGES.index(name))
        if name == "align":
            init_projector(model)
        if name == "sparse":
            model, raw = _upcycled(model, raw, out, settings.seed)
        run_stage(Stage(name, settings, model, tokenizer), out)
    final = out / "model"
    save_checkpoint(model, raw, final, torch.float16)
    draw_curves(out)
    return final


def _upcycled(model: VlmModel, raw: dict[str, Any], out: Path, seed: int) -> tuple[VlmModel, dict[str, Any]]:
    """The dense model through `moiie upcycle`."""
    from moiie_export.upcycle import Upcycling, upcycle

    dense, sparse = out / "dense-checkpoint", out / "upcycled-checkpoint"
    if not (sparse / "config.json").is_file():
        save_checkpoint(model, raw, dense, torch.float32)
        upcycle(dense, sparse, Upcycling(num_experts=4, top_k=2, seed=seed))
    with ModelSource.open(sparse) as source:
        return load_model(source), json.loads((sparse / "config.json").read_text(encoding="utf-8"))


def main() -> None:
    """Command line."""
    run(train, Settings, __doc__)


if __name__ == "__main__":
    main()
