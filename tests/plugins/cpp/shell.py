"""The plugin library compiled for tests, and a program that drives it as TensorRT does."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_plugins import build
from moiie_plugins.headers import find_headers

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
KEPT = ROOT / "build" / "test-plugins"
SM = 89
"""The only SM that the tests' library holds cubins for: the first that has kernels for every format."""

TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.float8_e4m3fn: 6,
    torch.bfloat16: 7,
    torch.int64: 8,
}
"""nvinfer1::DataType."""

_COMPILE = """
import sys
from pathlib import Path
from moiie_plugins.build import compile_for
from moiie_plugins.compile import Selection
compile_for(Path(sys.argv[1]), [int(sys.argv[2])], Selection(dtypes=("float16", "float32")))
"""


@dataclass(frozen=True)
class Tools:
    """What the tests use, all in one folder: launch_table.json and kernels.bin lie there, too."""

    folder: Path

    @property
    def sanitized(self) -> Path:
        """The library with the address and undefined-behaviour sanitizers."""
        return self.folder / "build-sanitize" / build.LIBRARY

    @property
    def harness(self) -> Path:
        """The program that drives it."""
        return self.folder / "harness"

    @property
    def driver(self) -> Path:
        """A folder with a libcuda.so.1 that only records."""
        return self.folder / "driver"


@cache
def tools() -> Tools:
    """The kernels for one SM and the sanitized library, compiled once for all tests and workers, and kept."""
    (KEPT / "driver").mkdir(parents=True, exist_ok=True)
    with _once("tools") as stale:
        if stale:
            _compile(KEPT)
    return Tools(KEPT)


@cache
def released() -> build.Built:
    """The library as `moiie plugins build` makes it, with the kernels of `tools`."""
    made, out = tools(), KEPT / "released"

    def copied(folder: Path, *_: object) -> Mapping[str, Any]:
        for name in ("launch_table.json", "launch_table.txt", "kernels.bin"):
            shutil.copy(made.folder / name, folder)
        table: Mapping[str, Any] = json.loads((folder / "launch_table.json").read_text(encoding="utf-8"))
        return table

    with _once("released") as stale, pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_for", copied)
        if stale:
            build.build_library(out, [SM])
    manifest = out / build.MANIFEST
    return build.Built(out / build.LIBRARY, manifest, json.loads(manifest.read_text(encoding="utf-8")))


@contextmanager
def _once(name: str) -> Iterator[bool]:
    """Whether what is called `name` was made from other sources; when the block ends it is as new as they are."""
    digest = hashlib.sha256()
    sources = [path for folder in (ROOT / "plugins", HERE) for path in folder.rglob("*") if path.is_file()]
    for path in sorted(sources):
        if path.suffix in (".cpp", ".h", ".txt") or (path.suffix == ".py" and path.parent != HERE):
            digest.update(path.read_bytes())
    stamp = KEPT / f"{name}.stamp"
    with (KEPT / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stale = not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest.hexdigest()
        if stale:
            stamp.unlink(missing_ok=True)
        yield stale
        stamp.write_text(digest.hexdigest(), encoding="utf-8")


def _compile(folder: Path) -> None:
    # In a process of its own: where Triton interprets kernels it does not compile them.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", _COMPILE, str(folder), str(SM)], env=environment, check=True)
    headers = find_headers()
    build.compile_shell(folder, headers, sanitize=True)
    include = ["-I", str(ROOT / "plugins" / "src" / "cuda_types"), "-isystem", str(headers.path)]
    strict = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *include]
    library = ["-shared", "-fPIC", "-o", str(folder / "driver" / "libcuda.so.1")]
    subprocess.run([*strict, *library, str(HERE / "stub_driver.cpp")], check=True)
    # The program itself holds the sanitizers' runtime, which must come before the library's code.
    sanitize = ["-fsanitize=address,undefined", "-o", str(folder / "harness")]
    subprocess.run([*strict, *sanitize, str(HERE / "harness.cpp"), "-ldl"], check=True)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a node: its type, its dims, where it lies, and the profile's largest dims if they differ."""

    dtype: torch.dtype
    dims: Sequence[int]
    offset: int = 0
    most: Sequence[int] | None = None

    def line(self, side: str) -> str:
        """The harness' command for it."""
        words = [side, TYPES[self.dtype], len(self.dims), *self.dims, self.offset]
        words += [] if self.most is None else ["max", *self.most]
        return " ".join(map(str, words))


@dataclass
class Node:
    """A node to drive: op, attributes (lists of whole numbers or one float each), tensors."""

    op: str
    attributes: Mapping[str, Sequence[int] | float]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    kind: str = "int32"

    def lines(self) -> list[str]:
        """The harness' commands for everything but what to do with it."""
        lines = ["clear"]
        for name, value in self.attributes.items():
            if isinstance(value, float):
                lines.append(f"field {name} float32 1 {value}")
            else:
                lines.append(f"field {name} {self.kind} {len(value)} {' '.join(map(str, value))}")
        lines += [tensor.line("input") for tensor in self.inputs]
        return lines + [tensor.line("output") for tensor in self.outputs]


@dataclass
class Said:
    """What the harness answered."""

    lines: list[str] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        """The rest of every line that begins with `word`."""
        return [line.removeprefix(word + " ") for line in self.lines if line.startswith(word + " ")]

    def one(self, word: str) -> str:
        """The rest of the only such line."""
        (only,) = self.all(word)
        return only


def drive(lines: Sequence[str], environment: Mapping[str, str] | None = None, driver: bool = True) -> Said:
    """Run the harness over the library; a memory error, a leak or a crash fails here."""
    made = tools()
    variables = {
        "PATH": os.environ["PATH"],
        "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        **({"LD_LIBRARY_PATH": str(made.driver)} if driver else {}),
        **(environment or {}),
    }
    script = "\n".join([f"library {made.sanitized}", *lines]) + "\n"
    done = subprocess.run(
        [made.harness], input=script, capture_output=True, text=True, env=variables, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return Said(done.stdout.splitlines())
