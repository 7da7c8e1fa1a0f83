"""What a bisection found as files that Polygraphy reads, and the commands to look on with them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moiie_export.disk import check_space, new_directory
from moiie_export.parity.bisect import Difference
from moiie_export.parity.comparator import largest_of, outputs_of, results_of, save_results
from moiie_export.parity.metrics import Array
from moiie_runtime.errors import MoiieError

BASE64 = 4 / 3
"""Bytes of text for each byte of an array."""


class Saved:
    """Files about every graph that differs.

    Args:
        graphs: component -> path of the bundle's own graph.
        output: the directory's name when it is finished.
        folder: where it lies until then.
    """

    def __init__(self, graphs: Mapping[str, Path], output: Path, folder: Path) -> None:
        self._graphs, self._output, self._folder = graphs, output, folder
        self.commands: list[str] = []
        """Command lines of Polygraphy that read what was written."""

    def keep(self, difference: Difference, feeds: Mapping[str, Array], runs: Any) -> None:
        """Write the inputs of a graph, and what both sides gave of the values before its first bad one and of that.

        Caches are left out, unless one is what is bad: they are large, and inputs for the most part.

        Raises:
            MoiieError: no room, or the system refuses.
        """
        wanted, found = outputs_of(runs)
        before = list(found)[: list(found).index(difference.value)]
        names = [*(name for name in before if not name.startswith("present.")), difference.value]
        sides = {"portable": {each: wanted[each] for each in names}, "engine": {each: found[each] for each in names}}
        arrays = [*feeds.values(), *(array for side in sides.values() for array in side.values())]
        check_space(self._folder, math.ceil(sum(array.nbytes for array in arrays) * BASE64))
        _write_inputs(self._folder / f"{difference.component}-inputs.json", feeds)
        for (side, outputs), runner in zip(sides.items(), runs.keys(), strict=True):
            save_results(results_of({runner: outputs}), self._folder / f"{difference.component}-{side}.json")
        self.commands += self._commands(difference, wanted[difference.value])

    def _commands(self, difference: Difference, wanted: Array) -> list[str]:
        graph, value = str(self._graphs[difference.component]), difference.value
        inputs, engine, piece = (
            str(self._output / f"{difference.component}{end}") for end in ("-inputs.json", "-engine.json", ".onnx")
        )
        allowed = f"{difference.bound * largest_of(wanted):.6g}"
        run = ["run", graph, "--onnxrt", "--onnx-outputs", value, "--load-inputs", inputs, "--load-outputs", engine]
        run += ["--check-error-stat", "max", "--atol", allowed, "--rtol", "0"]
        cut = ["surgeon", "extract", graph, "-o", piece, "--outputs", f"{value}:{wanted.dtype.name}"]
        cut += ["--save-external-data", f"{difference.component}.data"]
        return [shlex.join(["polygraphy", *each]) for each in (["inspect", "data", engine], run, cut)]


@contextmanager
def saving(graphs: Mapping[str, Path], output: Path) -> Iterator[Saved]:
    """A directory that gets its name when the block ends without an error; there is none when nothing was kept.

    Args:
        graphs: component -> path of the bundle's own graph.
        output: its name; nothing may be there but an empty directory.

    Raises:
        MoiieError: the name is taken, or the system refuses.
    """
    try:
        with new_directory(output) as folder:
            saved = Saved(graphs, output, folder)
            yield saved
    except MoiieError as error:
        if error.hint is None or "another -o" not in error.hint:
            raise
        raise MoiieError(error.message, error.hint.replace("another -o", "another --save")) from error
    if not saved.commands:
        output.rmdir()


def _write_inputs(path: Path, feeds: Mapping[str, Array]) -> None:
    """What `polygraphy run --load-inputs` reads: a list of one set of inputs. One array at a time is held as text."""
    from polygraphy.json import to_json

    with path.open("w", encoding="utf-8") as file:
        file.write("[{")
        for number, (name, array) in enumerate(feeds.items()):
            file.write(f"{', ' if number else ''}{json.dumps(name)}: {to_json(array)}")
        file.write("}]\n")
