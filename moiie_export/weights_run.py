"""One run over the work of writing weights: blocks on all cores, in order, noted in the journal as they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from moiie_export.quantize.folding import Fold
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.stages import Progress
from moiie_export.weights_file import WeightsFile
from moiie_export.weights_units import (
    BLOCK,
    PIECE,
    Unit,
    needs_torch,
    units_of,
    write_plain,
    write_quantized,
    write_stored,
)
from moiie_runtime.cores import available_cores

if TYPE_CHECKING:
    from moiie_export.quantize.awq import Consumer
    from moiie_export.weights_stage import WeightsJob

COMMIT_BYTES = 256 << 20
"""What is written between two notes in the journal; a killed export loses at most some times that much."""
MOST_WORKERS = 16
SEARCH_ELEMENTS = 1 << 26
"""Numbers of all the weights together on which factors are searched; of larger ones some rows stand for all."""

Step: TypeAlias = "Fold | Unit"
Float32 = npt.NDArray[np.float32]


class StatisticsProvider(Protocol):
    """What calibration measured."""

    def get(self, parameter: str) -> InputStatistics | None:
        """Statistics of the inputs that a parameter is multiplied with; None when too few tokens reached it."""
        ...

    def shortage(self, parameter: str) -> str:
        """Why there are none."""
        ...


@dataclass
class Run:
    """The steps that are not done yet; factors come first, since blocks depend on them.

    Attributes:
        job: what to write.
        file: where to.
        steps: all steps, done ones too.
        progress: told how many numbers are written.
    """

    job: WeightsJob
    file: WeightsFile
    steps: Sequence[Step]
    progress: Progress
    _notes: dict[str, str] = field(default_factory=dict)
    _scales: dict[str, Float32] = field(default_factory=dict)
    _last: tuple[str, InputStatistics | None] = ("", None)

    def run(self) -> None:
        """Do them.

        Raises:
            MoiieError: see `write_weights`.
        """
        self._notes |= self.file.notes
        self._scales = {fold.tensor: self.file.read(fold.tensor) for fold in self._folds(self.steps[: self.file.done])}
        total = sum(map(_elements, self.steps))
        done, uncommitted = sum(map(_elements, self.steps[: self.file.done])), 0.0
        each = self.file.nbytes / max(1, total)
        with _Commits(self.file) as commits:
            for number, step in enumerate(self._finished(), start=self.file.done + 1):
                done += _elements(step)
                uncommitted += _elements(step) * each
                self.progress("weights", done, total)
                if isinstance(step, Fold):
                    commits.begin(number, self._notes)
                    commits.wait()
                elif uncommitted >= COMMIT_BYTES and (commits.idle or uncommitted >= 2 * COMMIT_BYTES):
                    commits.begin(number, self._notes)
                    uncommitted = 0.0
            commits.wait()  # a system tells only once that data did not reach the disk
        self.file.commit(len(self.steps), self._notes)

    def _finished(self) -> Iterator[Step]:
        """The steps in order, each when it and all before it are done."""
        waiting: deque[tuple[Unit, Future[str]]] = deque()
        workers = min(MOST_WORKERS, available_cores())
        threads = _Threads(map(needs_torch, self.job.forms.values()))
        with threads, ThreadPoolExecutor(workers, "weights", threads.take_one) as pool:
            try:
                for step in self.steps[self.file.done :]:
                    alone = self._takes_all_cores(step)
                    while waiting and (alone or len(waiting) > 2 * workers):
                        yield self._result(*waiting.popleft())
                    if isinstance(step, Fold):
                        self._search(step)
                        yield step
                    elif alone:
                        threads.take_all()
                        self._note(step, self._write_measured(step))
                        yield step
                    else:
                        self.job.source.will_read(step.part, step.start, step.stop)
                        waiting.append((step, pool.submit(self._write, step)))
                while waiting:
                    yield self._result(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _takes_all_cores(self, step: Step) -> bool:
        return isinstance(step, Fold) or self.job.forms[step.weight.name].calibrated

    def _result(self, unit: Unit, future: Future[str]) -> Unit:
        self._note(unit, future.result())
        return unit

    def _note(self, unit: Unit, note: str) -> None:
        if note:
            self._notes[unit.parameter] = note

    def _write(self, unit: Unit) -> str:
        """Write a unit, piece by piece; returns why it was not stored as asked for, or nothing."""
        notes = {self._write_rows(piece, None) for piece in unit.pieces(PIECE)} - {""}
        self.job.source.has_read(unit.part, unit.start, unit.stop)
        return next(iter(notes), "")

    def _write_measured(self, unit: Unit) -> str:
        """The same of a unit that is stored by what reaches it, all at once."""
        statistics, provider = self._statistics(unit.parameter), self.job.statistics
        note = self._write_rows(unit, statistics)
        return provider.shortage(unit.parameter) if note and provider is not None and statistics is None else note

    def _write_rows(self, unit: Unit, statistics: InputStatistics | None) -> str:
        form, folding = self.job.forms[unit.weight.name], self.job.folding
        touched = folding.reads(unit.parameter) or folding.makes(unit.parameter)
        if touched is None and write_stored(unit, self.job.source, form, self.file):
            return ""
        rows = self.job.source.part_rows(unit.part, unit.start, unit.stop)
        rows = folding.apply(unit.parameter, rows, unit.first_row, self._scales)
        if form.scheme is None:
            write_plain(unit, rows, form, self.file)
            return ""
        return write_quantized(unit, rows, form, self.file, statistics)

    def _statistics(self, parameter: str) -> InputStatistics | None:
        """Statistics of what reaches a parameter in the bundle; the same object for all its blocks."""
        if self._last[0] != parameter:
            provider = self.job.statistics
            found = None if provider is None else provider.get(parameter)
            fold = self.job.folding.reads(parameter)
            if found is not None and fold is not None:
                found = found.divided(self._scales[fold.tensor])
            self._last = (parameter, found)
        return self._last[1]

    def _search(self, fold: Fold) -> None:
        from moiie_export.quantize.awq import search_scale

        consumers = [each for name in fold.consumers if (each := self._consumer(name, len(fold.consumers))) is not None]
        scale = search_scale(consumers) if consumers else np.ones(fold.width, np.float32)
        self.file.write(fold.tensor, 0, scale)
        self._scales[fold.tensor] = scale

    def _consumer(self, parameter: str, sharing: int) -> Consumer | None:
        """A reader of the input, by evenly spaced rows where it is large; None when nothing is known of its inputs."""
        from moiie_export.quantize.awq import Consumer

        provider = self.job.statistics
        statistics = None if provider is None else provider.get(parameter)
        weight, _, shape = self.job.source.weight_map.by_parameter()[parameter]
        scheme = self.job.forms[weight.name].scheme
        if statistics is None or scheme is None:
            return None
        step = -(-shape[0] * shape[1] * sharing // SEARCH_ELEMENTS)
        blocks = []
        for unit in units_of(weight, BLOCK):
            if unit.parameter == parameter:
                rows = self.job.source.part_rows(unit.part, unit.start, unit.stop)
                blocks.append(np.array(rows[-unit.first_row % step :: step]))
        return Consumer(np.concatenate(blocks), scheme, statistics, parameter)

    @staticmethod
    def _folds(steps: Iterable[Step]) -> list[Fold]:
        return [step for step in steps if isinstance(step, Fold)]


class _Commits:
    """Notes in the journal beside the work: forcing data to the disk can take as long as making it."""

    def __init__(self, file: WeightsFile) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, "journal")
        self._running: Future[None] | None = None

    def __enter__(self) -> _Commits:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def idle(self) -> bool:
        """Whether the last note is in the journal."""
        return self._running is None or self._running.done()

    def begin(self, done: int, notes: Mapping[str, str]) -> None:
        """Note that so many steps are done, after the note before it.

        Raises:
            MoiieError: the system refused that one.
        """
        self.wait()
        self._running = self._pool.submit(self._file.commit, done, dict(notes))

    def wait(self) -> None:
        """Until the last note is in the journal."""
        if self._running is not None:
            self._running.result()


class _Threads:
    """torch's own threads: one in each of our workers, all where one piece of work has the machine to itself."""

    def __init__(self, needed: Iterable[bool]) -> None:
        self._needed = any(needed)  # torch is not imported for nothing
        self._all = 1

    def __enter__(self) -> None:
        if self._needed:
            import torch

            self._all = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        self.take_all()

    def take_one(self) -> None:
        """In a worker, when it starts."""
        self._set(1)

    def take_all(self) -> None:
        """In the main thread."""
        self._set(self._all)

    def _set(self, threads: int) -> None:
        if self._needed:
            import torch

            torch.set_num_threads(threads)


def _elements(step: Step) -> int:
    return step.elements if isinstance(step, Unit) else 0
