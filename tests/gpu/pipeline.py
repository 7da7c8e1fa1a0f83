"""The whole way on this machine, when a TensorRT is there: engines of a bundle, asked the same as ONNX Runtime.

A bundle that travelled here is named by --bundle; without one the smallest synthetic model is exported, which takes the
packages of the extra `export`. What is missing is said, in the table, and is no failure.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from moiie_runtime.errors import MoiieError

BACKENDS = {"tensorrt": "server", "tensorrt_rtx": "rtx"}
"""Module -> the built-in target that its engines are like."""
PROMPTS = ("USER: What? ASSISTANT:", "USER: Name a colour. ASSISTANT:")
NEW_TOKENS = 12
"""Both fit into the smallest model's 64 tokens of context."""


@dataclass(frozen=True)
class Step:
    """One line: what was tried, and `ok`, `FAIL`, or `not run` with the reason behind it."""

    what: str
    outcome: str

    @property
    def failed(self) -> bool:
        """Whether it ran and was wrong."""
        return self.outcome.startswith("FAIL")


def pipeline_steps(sm: int, bundle: Path | None, plugins: Path | None) -> Iterator[Step]:
    """What became of each TensorRT that can be imported; at least one line.

    Args:
        sm: compute capability of the GPU times ten.
        bundle: one to build; None: the smallest is exported.
        plugins: libmoiie_plugins.so; None: dense experts of standard layers.
    """
    found = [name for name in BACKENDS if _importable(name)]
    if not found:
        yield Step("pipeline", f"not run: none of {', '.join(BACKENDS)} can be imported here")
    for name in found:
        with tempfile.TemporaryDirectory() as folder:
            try:
                source = bundle if bundle is not None else _smallest()
                copy = Path(shutil.copytree(source, Path(folder) / "bundle"))
                yield from _compared(name, sm, copy, plugins)
            except ImportError as error:
                yield Step(f"{name}", f"not run: {error}")
            except MoiieError as error:
                word = "not run" if error.exit_code == 4 else "FAIL"  # 4: the machine lacks something
                yield Step(f"{name}", f"{word}: {error.message}")


def _compared(name: str, sm: int, bundle: Path, plugins: Path | None) -> Iterator[Step]:
    """Engines are built and deserialised; their tokens are those of ONNX Runtime on the bundle's own graphs."""
    import moiie_runtime as mr
    from moiie_export.builders import BuildRequest, build
    from moiie_export.targets import BUILT_IN

    wanted = "off" if plugins is None else "required"
    target = replace(BUILT_IN[BACKENDS[name]], name="here", sms=(sm,), prefill=(64,), plugins=wanted)
    result = build(BuildRequest(bundle, target, plugin_library=plugins), lambda *_: None)
    yield Step(f"{name}: build", f"ok: {len(result.files)} files in {result.seconds:.1f} s")
    answers = {}
    for form in ("portable", "here"):
        with mr.load(bundle, target=form) as vlm:
            answers[form] = [vlm.generate_prompt(each, [], max_new_tokens=NEW_TOKENS).token_ids for each in PROMPTS]
    pairs = list(zip(answers["portable"], answers["here"], strict=True))
    same = sum(one == other for one, other in pairs)
    word = "ok" if same == len(pairs) else "FAIL"
    yield Step(f"{name}: tokens", f"{word}: {same} of {len(pairs)} are those of ONNX Runtime")


def _importable(name: str) -> bool:
    """Not imported: moiie has to prepare for one of them first."""
    return find_spec(name) is not None


def _smallest() -> Path:
    from tests.exports import SMALLEST, exported

    return exported(SMALLEST, "float16").bundle
