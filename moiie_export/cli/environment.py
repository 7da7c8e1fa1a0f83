"""What `moiie doctor` finds out about the machine and the installed packages."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from moiie_runtime.sizes import readable

OLDEST_ONNXRUNTIME = (1, 23)
"""The first release that runs a bundle's graphs (opset 23)."""


Status: TypeAlias = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. `fail`: a run would not work; `warn`: it would be slow; `info`: good to know."""

    name: str
    status: Status
    detail: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data."""
        return asdict(self)


def environment() -> Iterator[Finding]:
    """Findings about this machine, in the order in which a reader wants them."""
    from moiie_export.cli.jetson import jetson_findings
    from moiie_export.cli.nvidia import nvidia_findings

    yield Finding("moiie-export", "info", version("moiie-export"))
    yield Finding("python", "info", f"{platform.python_version()} ({sys.executable})")
    yield Finding("platform", "info", platform.platform())
    yield _cores()
    yield _memory()
    yield from _packages()
    yield from _onnxruntime()
    yield _export_extra()
    yield from nvidia_findings()
    yield from jetson_findings()


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cores() -> Finding:
    from moiie_runtime.cores import available_cores

    return Finding("cores", "info", f"{available_cores()} usable")


def available_memory() -> int | None:
    """Bytes that a new process can take without swapping, within this container's limit; None when unknown."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    words = fields.get("MemAvailable", "").split()
    if not words or not words[0].isdigit():
        return None
    available = int(words[0]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, or hidden in this container
        return ""


def _memory() -> Finding:
    available = available_memory()
    return Finding("memory", "info", "unknown" if available is None else f"{readable(available)} available")


def _packages() -> Iterator[Finding]:
    for name in ("numpy", "tokenizers", "pillow", "jinja2"):
        found = installed(name)
        if found is None:
            yield Finding(name, "fail", "not installed", f"pip install {name}")
        else:
            yield Finding(name, "ok", found)


def _onnxruntime() -> Iterator[Finding]:
    plain, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    if plain and gpu:
        yield Finding(
            "onnxruntime",
            "fail",
            f"onnxruntime {plain} and onnxruntime-gpu {gpu} are both installed; they overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one: pip install 'moiie-export[cpu]' (or [gpu])",
        )
        return
    try:
        import onnxruntime
    except ImportError as error:
        yield Finding("onnxruntime", "fail", f"cannot be imported: {error}", "pip install 'moiie-export[cpu]'")
        return
    from moiie_runtime.versions import version_numbers

    found = str(onnxruntime.__version__)
    providers = onnxruntime.get_available_providers()
    detail = f"{found} with {', '.join(providers)}"
    if version_numbers(found)[:2] < OLDEST_ONNXRUNTIME:
        oldest = ".".join(str(each) for each in OLDEST_ONNXRUNTIME)
        hint = f"pip install --upgrade 'onnxruntime>={oldest}'"
        yield Finding("onnxruntime", "fail", f"{detail}; a bundle needs at least {oldest}", hint)
    elif "CPUExecutionProvider" not in providers:
        yield Finding("onnxruntime", "fail", f"{detail}; CPUExecutionProvider is missing", "reinstall onnxruntime")
    else:
        yield Finding("onnxruntime", "ok", detail)


def _export_extra() -> Finding:
    from moiie_export.cli.sources import EXTRAS, missing_modules

    missing = missing_modules("export")
    if not missing:
        return Finding(
            "export", "ok", ", ".join(f"{each} {installed(each.replace('_', '-'))}" for each in EXTRAS["export"])
        )
    detail = f"not installed: {', '.join(missing)} (only `moiie export`, `moiie demo` and `moiie parity --checkpoint` need them)"
    return Finding("export", "info", detail, "pip install 'moiie-export[export]'")
