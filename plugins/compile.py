"""Compiles the kernels for a list of SMs into a launch table and one file of images.

Triton compiles without a GPU. Every kernel is compiled once a SM in a process of its own kind: the caller may have
imported the kernels for the interpreter. Images are kept by the hash of all they depend on, so that a second call
compiles only what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moiie_plugins.images import FP8_PTX_VERSION, PTX_VERSION, Image, Job, compile_job, prepare_worker
from moiie_plugins.launch import OLDEST_SM, Kernel, Plan, plan_record, plans
from moiie_plugins.tiles import SHARED_KIB
from moiie_runtime.errors import MissingDependency, MoiieError

SUPPORTED_SMS = tuple(SHARED_KIB)
IMAGE_ALIGNMENT = 64
_OWN_PTX_LIMIT = 90
"""From here on Triton compiles for exactly one SM (sm_90a), and such PTX runs on no other."""


@dataclass(frozen=True)
class Selection:
    """Which plans are compiled; None: all."""

    ops: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    weights: tuple[str, ...] | None = None

    def holds(self, plan: Plan) -> bool:
        """Whether the plan is wanted."""
        pairs = ((self.ops, plan.op), (self.dtypes, plan.dtype), (self.weights, plan.weights))
        return all(wanted is None or have in wanted for wanted, have in pairs)


def source_hash() -> str:
    """Sha256 over the kernels and everything that shapes their launches."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("kernels/*.py"), folder / "launch.py", folder / "tiles.py", folder / "images.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        raise MissingDependency(
            "compiling the TensorRT plugins' kernels needs triton, which is not installed", "pip install triton"
        ) from None


def check_sms(sms: Sequence[int]) -> None:
    """Refuse GPUs for which there are no kernels.

    Raises:
        MissingDependency: naming them, and those there are.
        MoiieError: there is none in the list.
    """
    unknown = sorted({sm for sm in sms if sm not in SUPPORTED_SMS})
    known = ", ".join(map(str, SUPPORTED_SMS))
    if unknown:
        listed = ", ".join(map(str, unknown))
        raise MissingDependency(f"no kernels are made for SM {listed}", f"there are kernels for SM {known}")
    if not sms:
        raise MoiieError("no SM to compile the kernels for", f"name some of {known}")


def fallback_sm(sms: Sequence[int]) -> int:
    """The SM whose PTX is kept for GPUs and drivers that take none of the cubins: the newest whose PTX is portable."""
    return max((sm for sm in sms if sm < _OWN_PTX_LIMIT), default=min(SUPPORTED_SMS))


def _selected(sms: Sequence[int], select: Selection | None) -> list[Plan]:
    """The wanted plans that some of the SMs run; the others are left out, and the library says so when they are asked for."""
    wanted = [plan for plan in plans() if select is None or select.holds(plan)]
    if not wanted:
        raise MoiieError(f"no kernels match {select}")
    selected = [plan for plan in wanted if plan.oldest_sm <= max(sms)]
    if not selected:
        raise MoiieError(
            f"{wanted[0].weights} weights need SM {wanted[0].oldest_sm} or above, not {', '.join(map(str, sms))}",
            "neither Triton nor TensorRT has E4M3 numbers for older GPUs: use int8 or int4 there",
        )
    return selected


def _kernels(selected: Sequence[Plan]) -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for plan in selected:
        found |= {launch.kernel.name: launch.kernel for launch in plan.launches}
    return found


def _jobs(kernels: Mapping[str, Kernel], sms: Sequence[int], ptx_versions: Mapping[int, int]) -> Iterator[Job]:
    for kernel in kernels.values():
        fallback = max(fallback_sm(sms), kernel.oldest_sm)
        floor = FP8_PTX_VERSION if kernel.oldest_sm == OLDEST_SM["fp8"] else 0
        for sm in sorted({*sms, fallback}):
            if sm >= kernel.oldest_sm:
                kinds = (("cubin",) if sm in sms else ()) + (("ptx",) if sm == fallback else ())
                yield Job(kernel, sm, max(floor, ptx_versions.get(sm, PTX_VERSION[sm])), kinds)


def _key(job: Job, salt: str) -> str:
    return hashlib.sha256(f"{salt} {job!r}".encode()).hexdigest()


def _kept(path: Path) -> list[Image] | None:
    try:
        return [Image.load(record) for record in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, images: Sequence[Image]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps([image.record() for image in images]))
    partial.replace(path)


def _result(future: Future[list[Image]], job: Job) -> list[Image]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise MoiieError(
            f"the compiler died while it compiled kernels such as {job.kernel.name} for SM {job.sm}, {job.isa}",
            "a PTX ISA that is older than the SM does this, and so does too little memory",
        ) from None


def _compile_all(
    jobs: Sequence[Job], cache: Path, salt: str, progress: Callable[[int, int, str], None] | None
) -> dict[Job, list[Image]]:
    done: dict[Job, list[Image]] = {}
    for job in jobs:
        images = _kept(cache / f"{_key(job, salt)}.json")
        if images is not None:
            done[job] = images
    left = [job for job in jobs if job not in done]
    workers = max(1, min(os.cpu_count() or 1, len(left), 16))
    with tempfile.TemporaryDirectory() as scratch:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker, (scratch,))
        with pool:
            futures = {pool.submit(compile_job, job): job for job in left}
            try:
                for future in as_completed(futures):
                    job = futures[future]
                    done[job] = _result(future, job)
                    _keep(cache / f"{_key(job, salt)}.json", done[job])
                    if progress is not None:
                        progress(len(done), len(jobs), f"{job.kernel.name} SM{job.sm}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return done


def _kernel_record(kernel: Kernel, images: Sequence[Image], places: Mapping[str, int]) -> dict[str, Any]:
    entries = {image.entry for image in images}
    extra = {image.extra_pointers for image in images}
    if len(entries) != 1 or len(extra) != 1:
        raise MoiieError(
            f"kernel {kernel.name}: its images differ in entry ({entries}) or appended arguments ({extra})"
        )
    scratch = extra.pop()
    return {
        "entry": entries.pop(),
        "oldest_sm": kernel.oldest_sm,
        "module": kernel.module,
        "parameters": [[a.binding, "pointer" if a.pointer else a.type] for a in kernel.arguments]
        + [["", "null"]] * scratch,
        "names": [a.name for a in kernel.arguments] + [""] * scratch,
        "types": [a.type for a in kernel.arguments] + [""] * scratch,
        "images": [
            image.placed(places[image.sha256], dict(kernel.tile(image.sm).blocks), kernel.constants(image.sm))
            for image in images
        ],
    }


def _write_images(path: Path, images: Sequence[Image]) -> dict[str, int]:
    """Writes every different image once; returns where each begins, by its hash."""
    places: dict[str, int] = {}
    with path.open("wb") as file:
        for image in images:
            if image.sha256 not in places:
                file.write(b"\0" * (-file.tell() % IMAGE_ALIGNMENT))
                places[image.sha256] = file.tell()
                file.write(image.code)
    return places


def compile_kernels(
    out: Path,
    sms: Sequence[int],
    *,
    select: Selection | None = None,
    ptx_versions: Mapping[int, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Writes out/launch_table.json and out/kernels.bin; images are kept in out/images for the next call.

    Args:
        out: a folder, made if need be.
        sms: compute capabilities as 10 * major + minor.
        select: what is compiled.
        ptx_versions: PTX ISA (80 is 8.0, of CUDA 12.0) by SM, where not the default of images.PTX_VERSION. A driver
            takes PTX of its own CUDA version and of older ones.
        progress: called with (done, all, what was done last).

    Returns:
        The launch table.

    Raises:
        MissingDependency: Triton is not installed, or there are no kernels for an SM.
        MoiieError: nothing is selected that one of them runs, or a kernel does not fit its GPU.
    """
    triton = _triton_version()
    check_sms(sms)
    selected = _selected(sms, select)
    cache = out / "images"
    cache.mkdir(parents=True, exist_ok=True)
    source = source_hash()
    kernels = _kernels(selected)
    jobs = list(_jobs(kernels, sorted(set(sms)), ptx_versions or {}))
    assembler = os.environ.get("TRITON_PTXAS_PATH", "")
    images = _compile_all(jobs, cache, f"{source} {triton} {assembler}", progress)
    ordered = [image for job in jobs for image in images[job]]
    places = _write_images(out / "kernels.bin", ordered)
    table = {
        "schema": 1,
        "triton": triton,
        "source": source,
        "sms": sorted(set(sms)),
        "plans": [plan_record(plan) for plan in selected],
        "kernels": {
            name: _kernel_record(kernel, [i for job in jobs if job.kernel.name == name for i in images[job]], places)
            for name, kernel in kernels.items()
        },
    }
    (out / "launch_table.json").write_text(json.dumps(table, indent=1) + "\n")
    return table
