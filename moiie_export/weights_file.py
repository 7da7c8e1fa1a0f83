"""The weight file under construction: written at any place by any thread, and continued after a kill.

It lies beside its final name as `.tmp`, and a journal beside it tells how many steps of the work are in it. The journal
is written only after the data it speaks of was forced to the disk, and counts only for the same content: the same
header, fingerprint and number of steps. So a file that is continued holds what one that was never interrupted would.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moiie_export.disk import check_space, flush, write_errors, write_json
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object
from moiie_runtime.tensor_header import Specs, build_header

_JOURNAL_LIMIT = 64 << 20


class WeightsFile:
    """A safetensors file that is being made; use it as a context manager and `finish` it.

    Args:
        path: its final name.
        specs: name -> (safetensors dtype, shape), in the order of their bytes.
        fingerprint: changes whenever other bytes would be written.
        steps: how many steps the work has; `commit` counts them.
        resume: whether what an earlier run left may be used.

    Attributes:
        header: where each tensor lies.
        nbytes: size of the finished file.
        done: steps that are in the file already.
        notes: what the last `commit` noted.
        complete: whether `path` itself is there and whole.

    Raises:
        MoiieError: no room, or the system refuses.
    """

    def __init__(self, path: Path, specs: Specs, fingerprint: str, steps: int, *, resume: bool = True) -> None:
        self.path, self.steps = path, steps
        self.temporary, self._journal = (path.with_name(path.name + suffix) for suffix in (".tmp", ".journal"))
        head, self.header = build_header(path, specs, None)
        self.nbytes = len(head) + sum(info.nbytes for info in self.header.values())
        self._key = hashlib.sha256(b"".join((head, fingerprint.encode(), b" %d" % steps))).hexdigest()
        self.done, self.notes = self._recovered() if resume else (0, {})
        self.complete = self.done == steps and _size(path) == self.nbytes
        self._descriptor = -1
        if self.complete:
            return
        with write_errors(self.temporary):
            usable = self.done > 0 and _size(self.temporary) == self.nbytes
            if not usable:
                self.done, self.notes = 0, {}
                self._forget()
            held = self.temporary.stat().st_blocks * 512 if usable else 0
            check_space(path.parent, max(0, self.nbytes - held))
            self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666)
            if not usable:
                os.truncate(self.temporary, 0)
                os.truncate(self.temporary, self.nbytes)
                self._put(np.frombuffer(head, np.uint8), 0)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def write(self, name: str, first: int, array: npt.NDArray[Any]) -> None:
        """Write elements of a tensor; any thread, any order.

        Args:
            name: the tensor.
            first: elements before them.
            array: of the tensor's item size, row-major.

        Raises:
            MoiieError: the system refuses.
        """
        info = self.header[name]
        begin = first * array.itemsize
        if begin + array.nbytes > info.nbytes:
            raise RuntimeError(f"{name}: {array.nbytes} bytes at {begin} do not fit {info.nbytes}")
        with write_errors(self.temporary):
            self._put(np.ascontiguousarray(array).reshape(-1).view(np.uint8), info.offset + begin)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 tensor that was written before."""
        info = self.header[name]
        data = os.pread(self._descriptor, info.nbytes, info.offset)
        return np.frombuffer(data, np.float32).reshape(info.shape)

    def commit(self, done: int, notes: Mapping[str, Any]) -> None:
        """Force what was written to the disk, and then note that the first `done` steps need not be done again."""
        with write_errors(self.temporary):
            os.fsync(self._descriptor)
        self.done, self.notes = done, dict(notes)
        write_json(self._journal, {"key": self._key, "done": done, "notes": self.notes})

    def finish(self) -> None:
        """Give the file its name; the journal stays, for a kill before anything else says that the file is whole."""
        if self.done != self.steps:
            raise MoiieError(f"{self.temporary}: {self.steps - self.done} of {self.steps} steps were not written")
        with write_errors(self.path):
            self.temporary.replace(self.path)

    def _put(self, data: npt.NDArray[np.uint8], offset: int) -> None:
        view = data.data
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _recovered(self) -> tuple[int, dict[str, Any]]:
        """What the journal says, when it is about this very content."""
        try:
            said = read_json_object(self._journal, _JOURNAL_LIMIT)
            done, notes = said["done"], said["notes"]
            if said["key"] == self._key and type(done) is int and 0 < done <= self.steps and isinstance(notes, dict):
                return done, notes
        except (MoiieError, KeyError):
            pass
        return 0, {}

    def _forget(self) -> None:
        """Remove the journal for good before the file it speaks of is changed."""
        self._journal.unlink(missing_ok=True)
        flush(self._journal.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
