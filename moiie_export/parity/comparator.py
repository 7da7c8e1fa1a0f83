"""Polygraphy as the judge: sessions as its runners, two runners on the same inputs, their outputs in its Comparator."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moiie_export.parity.metrics import Array
from moiie_export.parity.values import Caches, values
from moiie_runtime.backends.session import Session, TensorSpec
from moiie_runtime.cores import available_cores
from moiie_runtime.errors import MissingDependency, MoiieError
from moiie_runtime.versions import version_numbers

OLDEST = (0, 53)
"""Version of Polygraphy whose Comparator this is written for."""
INSTALL = "pip install 'moiie-export[polygraphy]'"

try:
    import polygraphy
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER
except ImportError as error:
    raise MissingDependency(f"Polygraphy is not installed: {error}", INSTALL) from error
if version_numbers(polygraphy.__version__) < OLDEST:
    oldest = ".".join(map(str, OLDEST))
    raise MissingDependency(f"Polygraphy {polygraphy.__version__} is too old: at least {oldest} is needed", INSTALL)

__all__ = ["BaseRunner", "SessionRunner", "Verdict", "judge", "largest_of", "metadata_of", "onnxruntime_runner"]
__all__ += ["outputs_of", "results_of", "run_both", "save_results"]


class SessionRunner(BaseRunner):  # type: ignore[misc]  # ships no types
    """A session of any backend as a Polygraphy runner.

    Args:
        name: for Polygraphy's messages.
        open_session: gives it, opened when the runner is activated and closed when it is deactivated.
        inputs: what is fed: the inputs of the bundle's own graph. A built one may take some in another type, or not at all.
        caches: of its graph, from `caches_of`.
        outputs: names of what is wanted; None for everything that it gives.
    """

    def __init__(
        self,
        name: str,
        open_session: Callable[[], AbstractContextManager[Session]],
        inputs: Mapping[str, TensorSpec],
        caches: Caches,
        outputs: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name=name)
        self._open, self._inputs, self._caches, self._outputs = open_session, inputs, caches, outputs
        self._opened: ExitStack | None = None
        self._session: Session | None = None

    def activate_impl(self) -> None:
        """Open the session."""
        with ExitStack() as opening:
            self._session = opening.enter_context(self._open())
            self._opened = opening.pop_all()

    def deactivate_impl(self) -> None:
        """Close it."""
        if self._opened is not None:
            self._opened.close()
        self._opened = self._session = None

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of what is fed."""
        return metadata_of({name: (np.dtype(spec.dtype), spec.shape) for name, spec in self._inputs.items()})

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> Any:
        """One run, with caches that are updated in place."""
        assert self._session is not None
        wanted = list(self._session.outputs if self._outputs is None else self._outputs)
        start = time.perf_counter()
        found = OrderedDict(values(self._session, wanted, feed_dict, self._caches))
        self.inference_time = time.perf_counter() - start
        return found


def onnxruntime_runner(name: str, graph: bytes, folder: Path) -> Any:
    """Polygraphy's own runner of ONNX Runtime on the CPU, for a graph whose weights lie in `folder`.

    The session is opened here, since Polygraphy's loader knows no folder and copies all weights into another order.
    """

    def open_session() -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # what matters comes back as an exception
        settings.intra_op_num_threads = available_cores()
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        with _failures(name):
            return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])

    return OnnxrtRunner(open_session, name=name)


def metadata_of(inputs: Mapping[str, tuple[Any, Sequence[int | str]]]) -> Any:
    """Inputs as Polygraphy describes them: name -> element type and sizes, where a name stands for any size."""
    metadata = TensorMetadata()
    for name, (dtype, shape) in inputs.items():
        metadata.add(name, dtype, shape)
    return metadata


@dataclass(frozen=True)
class Verdict:
    """What Polygraphy says of one output.

    Attributes:
        passed: whether it is as near as was allowed.
        largest: max|difference|; infinite where shapes differ, NaN where a number is none.
    """

    passed: bool
    largest: float


def run_both(reference: Any, runner: Any, feeds: Mapping[str, Array]) -> Any:
    """Two runners on the same inputs, one after the other.

    Returns:
        Polygraphy's `RunResults`, with one iteration of each.

    Raises:
        MoiieError: a graph cannot be loaded or run.
    """
    with _quiet(f"{reference.name}, {runner.name}"):
        return Comparator.run([reference, runner], data_loader=[dict(feeds)])


def judge(runs: Any, allowed: Mapping[str, float]) -> dict[str, Verdict]:
    """Polygraphy's comparison of two runners' outputs: the largest absolute difference of each against what is allowed.

    Args:
        runs: of `run_both`; the second is compared with the first.
        allowed: the largest absolute difference by name, for every output of the first.

    Returns:
        A verdict for each output that both give, in the first one's order. Infinities that are the same do not differ.
    """
    (first, _), (second, _) = runs.items()
    with _quiet(f"{first}, {second}"):
        (judged,) = Comparator.compare_accuracy(
            runs,
            compare_func=SimpleCompareFunc(
                rtol=0.0,
                atol=dict(allowed),
                check_error_stat="max",
                infinities_compare_equal=True,
                find_output_func=_same_name,
            ),
        )
    return {
        name: Verdict(bool(result), float(getattr(result, "max_absdiff", np.inf)))
        for name, result in judged[first, second][0].items()
    }


def outputs_of(runs: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """What both runners gave, by name."""
    first, second = ({name: np.asarray(array) for name, array in each[0].items()} for _, each in runs.items())
    return first, second


def results_of(sides: Mapping[str, Mapping[str, Array]]) -> Any:
    """Polygraphy's `RunResults` for outputs of one iteration: runner's name -> arrays by name. Holds no times."""
    results = RunResults()
    for name, arrays in sides.items():
        results.add([OrderedDict(arrays)], runner_name=name)
    return results


def save_results(results: Any, path: Path) -> None:
    """Write `RunResults` as the JSON that `polygraphy run --save-outputs` writes."""
    with _quiet(str(path)):
        results.save(str(path))


def largest_of(array: Array) -> float:
    """Largest finite number, at least 1: what an error is a share of."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=1.0))


def _same_name(name: str, _: int, other: Any) -> list[str]:
    # Polygraphy's own would take `hidden.10` for a `hidden.1` that is not there.
    return [name] if name in other else []


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Nothing on standard output, where Polygraphy says all it does, and its failures as our errors."""
    with _failures(what), G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its statistics divide by 0 and subtract infinities
        yield


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Those of ONNX Runtime share no base class.
        for module, who in (("onnxruntime.", "ONNX Runtime"), ("polygraphy.", "Polygraphy")):
            if type(error).__module__.startswith(module):
                said = str(error).strip().partition("\n")[0]
                raise MoiieError(
                    f"{what}: {who} failed: {said}",
                    "check the files with `moiie inspect --verify BUNDLE`, and the installation with `moiie doctor`",
                ) from error
        raise
