"""What every backend offers: one `Session` per graph, with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.backends.device import Device, DeviceBuffer
from moiie_runtime.errors import MoiieError

if TYPE_CHECKING:
    from moiie_runtime.engines import Engine

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

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has its rank and its fixed sizes."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Shared(Protocol):
    """What a backend keeps for all sessions of one loaded bundle."""

    def end_prefill(self) -> None:
        """Give back what only prefill uses, where the form of the bundle asks for that."""

    def close(self) -> None:
        """Give everything back. Closing twice is allowed."""


@dataclass(frozen=True)
class EngineOptions:
    """What the graphs of a built form ask of their sessions.

    Attributes:
        libraries: of custom ops.
        prepack: bring weights into ONNX Runtime's own order when they are loaded, which takes memory of its own.
        device: where the sessions run and the KV cache lies; None: on the host.
        shared: what the backend keeps for all sessions of one loaded bundle; None where there is nothing.
        after_prefill: components whose sessions are closed when the prompts were run.
        engine: the built form; None for a bundle's own graphs.
    """

    libraries: tuple[Path, ...] = ()
    prepack: bool = False
    device: Device | None = None
    shared: Shared | None = None
    after_prefill: tuple[str, ...] = ()
    engine: Engine | None = None

    def close(self) -> None:
        """Give the device back with all that was shared, after the sessions were closed. Closing twice is allowed."""
        for each in (self.shared, self.device):
            if each is not None:
                each.close()


PORTABLE_OPTIONS = EngineOptions()
"""Of a bundle's own graphs: no library, weights used where they lie."""


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

    def bind(self, name: str, array: Array | DeviceBuffer) -> None:
        """Tie an input or output to this buffer, by address, for all later runs.

        A session on a device also takes its buffers; a host array given to one is an input that is copied now.
        """

    def unbind(self) -> None:
        """Forget all buffers that were bound, so that their memory can go."""

    def close(self) -> None:
        """Release the graph and its weights."""

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Sizes = dict[str, tuple[int, str]]


def check_feeds(
    where: str, inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array], bound: Mapping[str, object], sizes: Sizes
) -> Sizes:
    """Refuse feeds that do not fit the graph, before a backend sees them.

    Args:
        where: what is run, for the message.
        inputs: the graph's inputs.
        feeds: arrays given for this run.
        bound: buffers bound earlier, checked when they were; they count as given.
        sizes: what the bound inputs say about named dimensions, from `named_sizes`.

    Returns:
        `sizes` with those of the feeds.

    Raises:
        MoiieError: an unknown, missing or doubly given input, a wrong element type or shape, or two inputs that
            disagree about a dimension of the same name.
    """
    for name, array in feeds.items():
        if name not in inputs:
            raise MoiieError(f"{where}: no input is called `{name}`", f"its inputs are {', '.join(inputs)}")
        if name in bound:
            raise MoiieError(f"{where}: input `{name}` is bound to a buffer and was also fed", "give it once")
        check_array(where, name, inputs[name], array)
    for name in inputs:
        if name not in feeds and name not in bound:
            raise MoiieError(f"{where}: input `{name}` ({inputs[name]}) was not given")
    return named_sizes(where, inputs, feeds, sizes)


def named_sizes(
    where: str, inputs: Mapping[str, TensorSpec], arrays: Mapping[str, Array], known: Mapping[str, tuple[int, str]]
) -> Sizes:
    """The size of each named dimension and the input it was seen in.

    Args:
        where: what is run, for the message.
        inputs: the graph's inputs.
        arrays: checked arrays for some of them.
        known: sizes found before.

    Raises:
        MoiieError: two inputs disagree about a dimension of the same name.
    """
    sizes = dict(known)
    for name, array in arrays.items():
        for label, size in zip(inputs[name].shape, array.shape, strict=True):
            if isinstance(label, str):
                expected, owner = sizes.setdefault(label, (size, name))
                if expected != size:
                    raise MoiieError(
                        f"{where}: inputs `{owner}` and `{name}` disagree about dimension `{label}`: "
                        f"{expected} and {size}"
                    )
    return sizes


def check_array(where: str, name: str, spec: TensorSpec, array: Array) -> None:
    """Refuse an array whose element type, rank or fixed sizes differ from `spec`."""
    if not isinstance(array, np.ndarray):
        raise MoiieError(f"{where}: `{name}` must be a numpy array of {spec}, got {type(array).__name__}")
    if array.dtype.name != spec.dtype or not spec.admits(array.shape):
        got = TensorSpec(array.dtype.name, array.shape)
        raise MoiieError(f"{where}: `{name}` must be {spec}, got {got}")
