"""Fixtures shared by all tests: the golden cases, and each of them exported once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# The models are tiny: a second thread costs more at its barriers than it computes. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels are interpreted. Triton looks when it is imported, and tracing imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

from moiie_export.pipeline import ExportRequest, export_bundle
from moiie_export.recipe import load_recipe
from moiie_runtime.tensors import TensorFile
from tests.exports import BUNDLES, sources_digest
from tests.tracing import trace_quickly

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CASES = tuple(sorted(path.parent.name for path in GOLDEN.glob("*/checkpoint")))
"""MoME's cases lie one folder deeper and have their own fixtures."""


@dataclass(frozen=True)
class GoldenCase:
    """Numbers of the authors' own code for one tiny checkpoint (tests/golden/README.md)."""

    name: str

    @property
    def path(self) -> Path:
        """The case's directory."""
        return GOLDEN / self.name

    @property
    def checkpoint(self) -> Path:
        """Its checkpoint directory."""
        return self.path / "checkpoint"

    @cached_property
    def about(self) -> dict[str, Any]:
        """case.json."""
        about: dict[str, Any] = json.loads((self.path / "case.json").read_text(encoding="utf-8"))
        return about

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Every expected tensor."""
        file = TensorFile(self.path / "expected.safetensors")
        return {name: np.array(file[name]) for name in file}

    @property
    def images(self) -> list[Path]:
        """Its pictures, in order."""
        return [self.path / name for name in self.about["images"]]

    @property
    def tolerance(self) -> dict[str, float]:
        """Keyword arguments for numpy.testing.assert_allclose."""
        return {key: self.about["suggested_tolerance"][key] for key in ("atol", "rtol")}


@pytest.fixture(scope="session", params=CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden case in turn."""
    return GoldenCase(request.param)


@pytest.fixture(autouse=True)
def _quick_tracing() -> None:
    trace_quickly()


@pytest.fixture(scope="session")
def golden_bundle() -> Callable[[str], Path]:
    """Case name -> its exported bundle.

    Bundles are kept in build/ under a hash of the exporter's sources, so that a second run of the tests, or a second
    worker, exports nothing.
    """
    folder = BUNDLES / sources_digest()

    def export(name: str) -> Path:
        case = GoldenCase(name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.waiting").open("w") as lock:  # other workers wait for the first
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).is_dir():
                export_bundle(ExportRequest(case.checkpoint, folder / name, load_recipe("default")))
        return folder / name

    return export
