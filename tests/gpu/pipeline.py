"""The whole way on this machine, where its libraries are: engines of a bundle, asked the same as ONNX Runtime on the CPU.

A bundle that travelled here is named by --bundle, and its checkpoint, for parity with PyTorch through the engines, by
--checkpoint; without a bundle the smallest synthetic model is exported, which takes the packages of the extra `export`.
Engines that a bundle has of `rtx`, `server` or `ort-cuda` are used as they are; those for RTX need no GPU to be built.
What is missing is said, in the table: it counts neither as passed nor as wrong.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from moiie_runtime.errors import MoiieError

BACKENDS = {"tensorrt": "server", "tensorrt_rtx": "rtx", "onnxruntime": "ort-cuda"}
"""Module -> the built-in target that its engines are like."""
PROMPTS = ("USER: What? ASSISTANT:", "USER: Name a colour. ASSISTANT:")
NEW_TOKENS = 12
CONTEXT = 256
"""Of the smallest model, which holds parity's own prompts too."""


@dataclass(frozen=True)
class Step:
    """One line: what was tried, and `ok`, `FAIL`, or `not run` with the reason behind it."""

    what: str
    outcome: str

    @property
    def failed(self) -> bool:
        """Whether it ran and was wrong."""
        return self.outcome.startswith("FAIL")

    @property
    def ran(self) -> bool:
        """Whether there is something to judge."""
        return not self.outcome.startswith("not run")


@dataclass(frozen=True)
class Given:
    """What is built and compared.

    Attributes:
        sm: compute capability of the GPU times ten.
        bundle: one to build; None: the smallest is exported, with its checkpoint.
        checkpoint: what `bundle` was exported from; None: parity with it is left out.
        plugins: libmoiie_plugins.so; None: dense experts of standard layers.
    """

    sm: int
    bundle: Path | None = None
    checkpoint: Path | None = None
    plugins: Path | None = None


def pipeline_steps(given: Given) -> Iterator[Step]:
    """What became of each library that can be imported; at least one line."""
    found = [name for name in BACKENDS if _importable(name)]
    if not found:
        yield Step("pipeline", f"not run: none of {', '.join(BACKENDS)} can be imported here")
    for name in found:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = given if given.bundle is not None else _smallest(given)
                assert found.bundle is not None
                copy = Path(shutil.copytree(found.bundle, Path(folder) / "bundle"))
                yield from _compared(name, replace(found, bundle=copy))
            except ImportError as error:
                yield Step(f"{name}", f"not run: {error}")
            except MoiieError as error:
                word = "not run" if error.exit_code == 4 else "FAIL"  # 4: the machine lacks something
                yield Step(f"{name}", f"{word}: {error.message}")


def _compared(name: str, given: Given) -> Iterator[Step]:
    """Engines are built and deserialised; their tokens are those of the bundle's own graphs, their values PyTorch's."""
    import moiie_runtime as mr

    bundle = given.bundle
    assert bundle is not None
    form = BACKENDS[name]
    if not (bundle / "engines" / form).is_dir():
        form = "here"
        yield _built(name, given)
    answers = {}
    for each in ("portable", form):
        with mr.load(bundle, target=each) as vlm:
            answers[each] = [vlm.generate_prompt(text, [], max_new_tokens=NEW_TOKENS).token_ids for text in PROMPTS]
    pairs = list(zip(answers["portable"], answers[form], strict=True))
    same = sum(one == other for one, other in pairs)
    word = "ok" if same == len(pairs) else "FAIL"
    yield Step(f"{name}: tokens", f"{word}: {same} of {len(pairs)} are those of ONNX Runtime on the CPU")
    yield _parity(name, form, given)


def _built(name: str, given: Given) -> Step:
    """Engines of the bundle as target `here`."""
    from moiie_export.builders import BuildRequest, build
    from moiie_export.targets import BUILT_IN

    assert given.bundle is not None
    target = replace(BUILT_IN[BACKENDS[name]], name="here", prefill=(64, 128))
    plugins, experts = None, ""
    if target.backend != "onnxruntime_cuda":
        plugins, experts = given.plugins, ", experts by plugins"
        if plugins is None:
            experts = ", dense experts: --plugins names the library that puts our kernels into engines"
        target = replace(target, sms=(given.sm,), plugins="off" if plugins is None else "required")
    result = build(BuildRequest(given.bundle, target, plugin_library=plugins), lambda *_: None)
    return Step(f"{name}: build", f"ok: {len(result.files)} files in {result.seconds:.1f} s{experts}")


def _parity(name: str, form: str, given: Given) -> Step:
    """Values through the engine against the checkpoint in PyTorch, within the recipe's bounds."""
    if given.checkpoint is None:
        return Step(f"{name}: parity", "not run: name the checkpoint that the bundle was exported from, --checkpoint")
    from moiie_export.parity import check_parity

    assert given.bundle is not None
    report = check_parity(given.bundle, given.checkpoint, target=form)
    return Step(f"{name}: parity", f"{'ok' if report else 'FAIL'}: {report.verdict()}")


def _importable(name: str) -> bool:
    """Not imported: moiie has to prepare for one of them first."""
    return find_spec(name) is not None


def _smallest(given: Given) -> Given:
    from tests.exports import SMALLEST, exported

    made = exported(SMALLEST, "float16", CONTEXT)
    return replace(given, bundle=made.bundle, checkpoint=made.checkpoint)
