"""Whether this machine can run an engine, asked before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moiie_runtime.backends.cuda_driver import driver as cuda_bindings
from moiie_runtime.backends.cuda_driver import release as bindings_release
from moiie_runtime.backends.gpu_info import NUMBERS, Driver, Gpu, find_driver, gpus_here, runs_kernels
from moiie_runtime.backends.tensorrt_library import Library, load_library
from moiie_runtime.errors import MissingDependency
from moiie_runtime.strict_files import sha256_file
from moiie_runtime.versions import version_numbers

if TYPE_CHECKING:
    from moiie_runtime.engines import Engine


def check_machine(engine: Engine) -> Library:
    """Packages, their versions, driver, GPU and plugins, in this order.

    Returns:
        TensorRT, imported.

    Raises:
        MissingDependency: what is missing first, and what to do about it.
    """
    library = load_library(engine.backend)
    cuda_bindings()
    _check_version(engine, library)
    driver, gpu = find_gpu(engine)
    _check_floor(engine, driver)
    _check_sm(engine, gpu)
    _check_plugins(engine)
    _check_kernels(engine, gpu)
    return library


def _check_version(engine: Engine, library: Library) -> None:
    wanted = engine.needs.get(library.name)
    if wanted is None or wanted == library.version:
        return
    other = f"pip install 'tensorrt-rtx=={wanted}'"
    if library.name == "tensorrt":
        other = f"run it where TensorRT {wanted} is (on a Jetson the release of JetPack decides)"
    raise MissingDependency(
        f"engine {engine.target} was built with {library.name} {wanted}, here is {library.version}; "
        "an engine runs only with the version that built it",
        f"build it again here: {engine.build}; or {other}",
    )


def find_gpu(engine: Engine) -> tuple[Driver, Gpu]:
    """The driver, and the GPU that an engine is to run on.

    Raises:
        MissingDependency: there is none, or cuda-bindings are too new for the driver.
    """
    driver = find_driver()
    hint = "run it on a machine with an NVIDIA GPU; `moiie doctor` says what is here; target cpu or portable needs none"
    if driver is None:
        raise MissingDependency(f"engine {engine.target} needs a GPU: there is no NVIDIA driver here", hint)
    if not driver.gpus:
        reason = f" (CUDA error {driver.problem})" if driver.problem else ""
        raise MissingDependency(f"engine {engine.target} needs a GPU: the driver sees none{reason}", hint)
    major = bindings_release()
    if major is not None and major > driver.cuda[0]:
        raise MissingDependency(
            f"cuda-bindings {major} needs a driver for CUDA {major}, the one here is for {_dotted(driver.cuda)}",
            f"pip install 'cuda-bindings=={driver.cuda[0]}.*', or update the driver",
        )
    gpu = driver.gpu(engine.gpu)
    if gpu is None:
        here = gpus_here([each.index for each in driver.gpus])
        raise MissingDependency(f"engine {engine.target}: there is no GPU {engine.gpu} here: {here}", NUMBERS)
    return driver, gpu


def _check_floor(engine: Engine, driver: Driver) -> None:
    floor: Mapping[str, Any] = engine.document.get("floor") or {}
    found = {"cuda": _dotted(driver.cuda), "driver": driver.version}
    basis = f" ({floor['basis']})" if floor.get("basis") else ""
    names = {"cuda": "the CUDA release of the driver", "driver": "the driver"}
    for key, name in names.items():
        oldest, here = floor.get(key), found[key]
        if oldest is not None and here is not None and version_numbers(here) < version_numbers(str(oldest)):
            raise MissingDependency(
                f"engine {engine.target}: {name} is {here}, {engine.backend} needs at least {oldest}{basis}",
                "update NVIDIA's driver (on a Jetson: JetPack)",
            )


def _check_sm(engine: Engine, gpu: Gpu) -> None:
    sms = engine.document.get("sms") or []
    if sms and gpu.sm not in sms:
        built = ", ".join(str(sm) for sm in sms)
        raise MissingDependency(
            f"engine {engine.target} was built for SM {built}; the GPU here, {gpu.name}, has SM {gpu.sm}",
            _sm_hint(engine, sms, gpu.sm),
        )


def _sm_hint(engine: Engine, sms: Sequence[int], here: int) -> str:
    """The command that builds for this GPU, if the target's library can; engines of older versions do not say whether."""
    known = engine.document.get("library_sms")
    if known is not None and here not in known:
        builds = ", ".join(str(sm) for sm in known)
        return f"{engine.backend} builds for SM {builds} only: build for another target, such as ort-cuda or cpu"
    if engine.backend == "tensorrt":
        return f"build it here, on this GPU: {engine.rebuild([here])}"
    return engine.rebuild(sorted({*sms, here})) + ("" if known else f", if {engine.backend} builds for it")


def _check_plugins(engine: Engine) -> None:
    plugins = engine.document.get("plugins") or {}
    if plugins.get("file") is None:  # none, or stored in the engines
        return
    path = engine.bundle.path(f"{engine.folder}/{plugins['file']}")
    again = f"build it with `moiie plugins build`, then {engine.build} --force"
    if not path.is_file():
        raise MissingDependency(f"{path}: the plugin library of engine {engine.target} is missing", again)
    digest = sha256_file(path)
    if digest != plugins.get("sha256"):
        raise MissingDependency(
            f"{path}: is not the plugin library that engine {engine.target} was built with "
            f"(sha256 {digest[:12]}..., expected {str(plugins.get('sha256'))[:12]}...)",
            again,
        )


def _check_kernels(engine: Engine, gpu: Gpu) -> None:
    """What the builder knew of the library; a kernel that is missing would be found when it is launched."""
    kernels = (engine.document.get("plugins") or {}).get("kernels")
    if kernels is None or runs_kernels(gpu.sm, kernels["sms"], kernels["portable"]):
        return
    compiled = ", ".join(str(sm) for sm in kernels["sms"])
    wanted = ",".join(str(sm) for sm in sorted({*kernels["sms"], gpu.sm}))
    raise MissingDependency(
        f"engine {engine.target}: its plugin library has kernels for SM {compiled}, none that the GPU here, "
        f"{gpu.name} with SM {gpu.sm}, can run",
        f"moiie plugins build --sm {wanted}, then {engine.rebuild(plugins='plugins-build/libmoiie_plugins.so')}",
    )


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(each) for each in numbers)
