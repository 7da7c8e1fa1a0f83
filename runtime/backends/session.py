"""What every backend offers: one `Session` per graph, with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """Type of one graph input or output.

    Attributes:
        dtype: numpy's name of the element type, for example `float32`.
        shape: sizes; a string names a dimension that is only known at run time.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Session(Protocol):
    """One graph, ready to run. Not safe to run from two threads at once."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name, in graph order."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name, in graph order."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs (all that are not bound when `outputs` is None)."""

    def bind(self, name: str, array: Array) -> None:
        """Tie an input or output to this buffer, by address, for all later runs."""

    def unbind(self) -> None:
        """Forget all buffers that were bound, so that their memory can go."""

    def close(self) -> None:
        """Release the graph and its weights."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feeds(
    where: str, inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array], bound: Mapping[str, Array]
) -> None:
    """Refuse feeds that do not fit the graph, before a backend sees them.

    Args:
        where: what is run, for the message.
        inputs: the graph's inputs.
        feeds: arrays given for this run.
        bound: buffers bound earlier; they count as given and take part in the check of shared dimensions.

    Raises:
        MoiieError: an unknown, missing or doubly given input, a wrong element type or shape, or two inputs that
            disagree about a dimension of the same name.
    """
    for name in feeds:
        if name not in inputs:
            raise MoiieError(f"{where}: no input is called `{name}`", f"its inputs are {', '.join(inputs)}")
        if name in bound:
            raise MoiieError(f"{where}: input `{name}` is bound to a buffer and was also fed", "give it once")
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in inputs.items():
        array = feeds.get(name, bound.get(name))
        if array is None:
            raise MoiieError(f"{where}: input `{name}` ({spec}) was not given")
        check_array(where, name, spec, array)
        for label, size in _named_sizes(spec, array):
            known, owner = sizes.setdefault(label, (size, name))
            if known != size:
                raise MoiieError(
                    f"{where}: inputs `{owner}` and `{name}` disagree about dimension `{label}`: {known} and {size}"
                )


def check_array(where: str, name: str, spec: TensorSpec, array: Array) -> None:
    """Refuse an array whose element type, rank or fixed sizes differ from `spec`."""
    if not isinstance(array, np.ndarray):
        raise MoiieError(f"{where}: `{name}` must be a numpy array of {spec}, got {type(array).__name__}")
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(spec.shape, array.shape, strict=True)
    )
    if array.dtype.name != spec.dtype or not fits:
        got = TensorSpec(array.dtype.name, array.shape)
        raise MoiieError(f"{where}: `{name}` must be {spec}, got {got}")


def _named_sizes(spec: TensorSpec, array: Array) -> Iterator[tuple[str, int]]:
    for label, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(label, str):
            yield label, size
