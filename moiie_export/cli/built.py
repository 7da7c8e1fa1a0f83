"""What `moiie doctor` says about the forms that a bundle was built in: whether each runs here, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moiie_export.cli.environment import Finding, Status, available_memory
from moiie_runtime.backends import needs_device
from moiie_runtime.backends.cuda import CudaDevice
from moiie_runtime.backends.gpu_info import find_driver
from moiie_runtime.bundle import Bundle
from moiie_runtime.device_memory import DeviceEstimate, estimate_device, free_memory
from moiie_runtime.engine_files import engine_files
from moiie_runtime.engines import DEFAULT_TARGET, PORTABLE, Engine, open_engine
from moiie_runtime.errors import MoiieError
from moiie_runtime.memory import Prediction, Request, estimate_memory
from moiie_runtime.sizes import readable


def form_findings(bundle: Bundle) -> Iterator[Finding]:
    """The built forms in order, then whether what `moiie run` takes without `--target` fits into memory.

    A form that is not named is no failure when it does not run here: another may. Too little memory is none where a form
    for a GPU runs.
    """
    request = Request(prompt_tokens=bundle.tokens.image_tokens + 100, new_tokens=256, images=1)
    default, others = bundle, []
    for files in engine_files(bundle):
        target = files.target
        wrong = [*files.problems, *([] if files.stale is None else ["was built from another export of this bundle"])]
        if wrong:
            status: Status = "fail" if target == DEFAULT_TARGET else "warn"
            yield Finding(f"target {target}", status, "; ".join(wrong), f"build it again: {files.build} --force")
            continue
        engine = open_engine(bundle, target)
        if needs_device(engine.backend):
            found = list(_on_device(engine, request))
            yield from found
            others += [target] if all(each.status == "ok" for each in found) else []
        else:
            refusal = _refusal(engine)
            yield _row(engine, engine.backend) if refusal is None else _refused(engine, [refusal])
            default = engine.bundle if target == DEFAULT_TARGET else default
    name = PORTABLE if default is bundle else DEFAULT_TARGET
    hint = "free memory, or export with a smaller --max-context"
    if others:
        hint = f"it runs with --target {others[0]}; else {hint}"
    yield _fits("fits", name, (estimate_memory(default, request), available_memory()), hint, failing=not others)


def _on_device(engine: Engine, request: Request) -> Iterator[Finding]:
    gpu, found = _place(engine)
    yield found
    free = None if gpu is None else _free(gpu)
    prediction = estimate_device(engine, request)
    yield _fits(
        f"fits {engine.target}", engine.target, (prediction, free), "; or ".join(prediction.fixes), failing=False
    )


def _place(engine: Engine) -> tuple[int | None, Finding]:
    """The first GPU that an engine runs on, and what is said about it."""
    driver = find_driver()
    gpus = () if driver is None else driver.gpus
    refusals = []
    for gpu in gpus or (None,):
        index = 0 if gpu is None else gpu.index
        wrong = _refusal(engine.on(index))
        if wrong is None:
            library = f"{engine.backend} {engine.needs.get(engine.backend, '')}".strip()
            where = "" if gpu is None else f" on GPU {index}, {gpu.name}"
            option = f" (--gpu {index})" if index else ""
            return index, _row(engine, f"{library}{where}{option}")
        refusals.append(wrong)
    return None, _refused(engine, refusals)


def _refusal(engine: Engine) -> MoiieError | None:
    """Why this machine cannot run it; None when it can."""
    try:
        engine.check()
    except MoiieError as error:
        return error
    return None


def _row(engine: Engine, detail: str) -> Finding:
    return Finding(f"target {engine.target}", "ok", detail)


def _refused(engine: Engine, errors: Sequence[MoiieError]) -> Finding:
    """Good to know, unless it is what runs where no target is named."""
    status: Status = "fail" if engine.target == DEFAULT_TARGET else "info"
    messages = dict.fromkeys(error.message for error in errors)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    return Finding(f"target {engine.target}", status, "; ".join(messages), "; or ".join(hints))


def _free(gpu: int) -> int | None:
    """Bytes that a run on this GPU would find; None when it cannot be opened."""
    try:
        device = CudaDevice(gpu)
    except MoiieError:
        return None
    try:
        return free_memory(device)
    finally:
        device.close()


def _fits(name: str, form: str, sizes: tuple[Prediction, int | None], hint: str, *, failing: bool) -> Finding:
    prediction, free = sizes
    where = "on the GPU" if isinstance(prediction, DeviceEstimate) else "of memory"
    detail = f"{form}: a question about one picture takes about {readable(prediction.total)} {where}"
    if free is None:
        return Finding(name, "info", detail)
    detail += f", {readable(free)} available"
    if prediction.total <= free:
        return Finding(name, "ok", detail)
    return Finding(name, "fail" if failing else "warn", detail, hint)
