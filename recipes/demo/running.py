"""Runs a stage of training to its end, from wherever an earlier run was stopped. Both demo models are trained by it."""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from moiie_recipes.demo.optimiser import Optimiser

log = logging.getLogger(__name__)

SAVE_EVERY, TEST_EVERY = 50, 150


class Stage(Protocol):
    """What is trained, on what, and how fast.

    Attributes:
        name: stands in file names and in the log.
        model: what is saved.
        head: what the stage learns besides and nobody needs afterwards.
        peak: the largest learning rate.
        floor: its share that is left at the end.
    """

    name: str
    model: Any
    head: nn.Module | None
    peak: float
    floor: float

    @property
    def steps(self) -> int:
        """How many steps the stage takes."""

    def trained(self) -> dict[float, list[nn.Parameter]]:
        """What the stage changes, by the share of the learning rate it gets."""

    def orthogonal(self) -> frozenset[int]:
        """Ids of the parameters that learn by Muon."""

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of step number `step`, and numbers for the log."""

    def measure(self) -> dict[str, float]:
        """Numbers that take longer, now and then; none for a stage that has none."""


def run_stage(stage: Stage, out: Path) -> None:
    """Run one stage to its end, from the last state saved in `out`."""
    state = out / f"{stage.name}.pt"
    stage.model.requires_grad_(False)
    parameters = stage.trained()
    for members in parameters.values():
        for parameter in members:
            parameter.requires_grad_(True)
    optimiser = Optimiser(parameters, stage.orthogonal())
    step = _restore(state, stage, optimiser)
    started = time.monotonic()
    while step < stage.steps:
        loss, numbers = stage.loss(step)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in optimiser.parameters if p.grad is not None], 1.0).item()
        if not math.isfinite(norm):
            raise RuntimeError(f"stage {stage.name}, step {step}: the gradient is not finite")
        optimiser.step(learning_rate(stage, step))
        step += 1
        if step % 10 == 0 or step == stage.steps:
            if step % TEST_EVERY == 0 or step == stage.steps:
                numbers |= stage.measure()
            record = {"stage": stage.name, "step": step, "norm": norm, **numbers}
            _append(out / "log.jsonl", {**record, "seconds": time.monotonic() - started})
            log.info("%s", " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        if step % SAVE_EVERY == 0 or step == stage.steps:
            _save(state, stage, optimiser, step)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then a cosine down to the stage's floor."""
    warmup = min(100, stage.steps // 10 + 1)
    if step < warmup:
        return stage.peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, stage.steps - warmup)
    return stage.peak * (stage.floor + (1 - stage.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _restore(path: Path, stage: Stage, optimiser: Optimiser) -> int:
    """Load the state of an earlier run of this stage; returns its step, 0 when there is none."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    stage.model.load_state_dict(state["model"])
    if stage.head is not None:
        stage.head.load_state_dict(state["head"])
    if state["step"] < stage.steps:
        optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def _save(path: Path, stage: Stage, optimiser: Optimiser, step: int) -> None:
    """Write the state under a temporary name and rename it: a kill leaves the old or the new one."""
    head = stage.head.state_dict() if stage.head is not None else {}
    state = {"model": stage.model.state_dict(), "head": head, "optimiser": optimiser.state_dict(), "step": step}
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


def check_settings(out: Path, settings: Any) -> None:
    """Refuse to go on in `out` with other settings than a run began with; `settings` is a dataclass of numbers."""
    path, wanted = out / "settings.json", asdict(settings)
    if path.is_file():
        began = json.loads(path.read_text(encoding="utf-8"))
        changed = {key for key in wanted if began.get(key) != wanted[key]}
        if changed:
            raise SystemExit(f"error: {path}: was begun with other {', '.join(sorted(changed))}; choose another --out")
    path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


Settings = TypeVar("Settings")


def run(train: Callable[[Path, Settings], Path], settings: type[Settings], description: str | None) -> None:
    """A command line that trains: --out, --threads, and an option for each of the settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for states, curves and the model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU cores to use")
    for field in fields(settings):  # type: ignore[arg-type]
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default: {field.default}")
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    _keep_memory()
    log.info("wrote %s", train(out, settings(**arguments)))
