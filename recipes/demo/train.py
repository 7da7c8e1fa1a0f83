"""Trains the demo model from nothing: python -m moiie_recipes.demo.train --out DIR

Stages: `tower` learns what fills each patch; `dense` trains a dense model with the tower on questions; `align` trains a
fresh projector between the two, both frozen (the authors' stage 1); then `moiie upcycle` makes it sparse and `sparse`
trains everything with both load-balancing losses (the authors' stage 2). Killed at any moment, the same command goes on
from the last saved state.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moiie_export.model.load import load_model
from moiie_export.model.vlm import VlmModel
from moiie_export.source import ModelSource
from moiie_recipes.demo.architecture import dense_config
from moiie_recipes.demo.curves import draw_curves
from moiie_recipes.demo.saving import init_projector, new_model, save_checkpoint
from moiie_recipes.demo.stages import STAGES, Settings, Stage
from moiie_recipes.demo.tokenizer import BOS, EOS, build_tokenizer
from moiie_recipes.demo.watching import teacher_forced_accuracy

log = logging.getLogger("moiie_recipes.demo.train")

SAVE_EVERY, TEST_EVERY = 50, 150


def train(out: Path, settings: Settings) -> Path:
    """Train, or go on training, in `out`; returns the checkpoint directory with float16 weights."""
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, settings)
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


def run_stage(stage: Stage, out: Path) -> None:
    """Run one stage to its end, from the last state saved in `out`."""
    state = out / f"{stage.name}.pt"
    model = stage.model
    model.requires_grad_(False)
    groups = []
    for share, parameters in stage.trained().items():
        for decay, flat in ((0.05, False), (0.0, True)):
            members = [p.requires_grad_(True) for p in parameters if (p.dim() == 1) == flat]
            groups.append({"params": members, "weight_decay": decay, "share": share})
    shares = [group.pop("share") for group in groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=stage.settings.learning_rate, betas=(0.9, 0.98), fused=True)
    step = _restore(state, stage, optimizer)
    started = time.monotonic()
    while step < stage.steps:
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = share * learning_rate(stage, step)
        loss, numbers = stage.loss(step)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0).item()
        if not math.isfinite(norm):
            raise RuntimeError(f"stage {stage.name}, step {step}: the gradient is not finite")
        optimizer.step()
        step += 1
        if step % 10 == 0 or step == stage.steps:
            if stage.head is None and (step % TEST_EVERY == 0 or step == stage.steps):
                numbers |= teacher_forced_accuracy(model, stage.tokenizer, stage.layout)
            record = {"stage": stage.name, "step": step, "norm": norm, **numbers}
            _append(out / "log.jsonl", {**record, "seconds": time.monotonic() - started})
            log.info("%s", " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        if step % SAVE_EVERY == 0 or step == stage.steps:
            _save(state, stage, optimizer, step)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth; stages before the last stay at a quarter of the peak or more."""
    warmup = min(100, stage.steps // 10 + 1)
    peak, floor = stage.settings.learning_rate, 0.02 if stage.name == "sparse" else 0.25
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, stage.steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _upcycled(model: VlmModel, raw: dict[str, Any], out: Path, seed: int) -> tuple[VlmModel, dict[str, Any]]:
    """The dense model through `moiie upcycle`."""
    from moiie_export.upcycle import Upcycling, upcycle

    dense, sparse = out / "dense-checkpoint", out / "upcycled-checkpoint"
    if not (sparse / "config.json").is_file():
        save_checkpoint(model, raw, dense, torch.float32)
        upcycle(dense, sparse, Upcycling(num_experts=4, top_k=2, seed=seed))
    with ModelSource.open(sparse) as source:
        return load_model(source), json.loads((sparse / "config.json").read_text(encoding="utf-8"))


def _restore(path: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> int:
    """Load the state of an earlier run of this stage; returns its step, 0 when there is none."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    stage.model.load_state_dict(state["model"])
    if stage.head is not None:
        stage.head.load_state_dict(state["head"])
    if state["step"] < stage.steps:
        optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(path: Path, stage: Stage, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state under a temporary name and rename it: a kill leaves the old or the new one."""
    head = stage.head.state_dict() if stage.head is not None else {}
    state = {"model": stage.model.state_dict(), "head": head, "optimizer": optimizer.state_dict(), "step": step}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _keep_memory() -> None:
    """Let glibc keep large blocks: giving them back and faulting them in again takes a third of every step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        log.debug("no glibc: training runs, somewhat slower")


def _check_settings(out: Path, settings: Settings) -> None:
    """Refuse to go on with other settings than a run began with."""
    path, wanted = out / "settings.json", asdict(settings)
    if path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))
        changed = {key for key in wanted if began.get(key) != wanted[key]}
        if changed:
            raise SystemExit(f"error: {path}: was begun with other {', '.join(sorted(changed))}; choose another --out")
    path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for states, curves and the model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU cores to use")
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default: {field.default}")
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    _keep_memory()
    log.info("wrote %s", train(out, Settings(**arguments)))


if __name__ == "__main__":
    main()
