"""Graphs on ONNX Runtime's CPU provider, with mapped weights and buffers bound by address."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moiie_runtime.backends.device import DeviceBuffer
from moiie_runtime.backends.session import (
    PORTABLE_OPTIONS,
    Array,
    EngineOptions,
    Sizes,
    TensorSpec,
    check_array,
    check_feeds,
    named_sizes,
)
from moiie_runtime.cores import available_cores
from moiie_runtime.errors import MissingDependency, MoiieError

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependency(
        f"the onnxruntime backend needs the package onnxruntime: {error}", 'pip install "moiie-export[cpu]"'
    ) from error

_log = logging.getLogger(__name__)
_FATAL = 4  # ONNX Runtime's own log goes to stderr; what matters comes back as an exception
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeSession:
    """One ONNX graph on the CPU. A `Session`; see there for the methods.

    Weights in external data stay mapped from their file: they cost no memory until used, and several sessions share
    them.

    Args:
        model: path of the graph, or its bytes.
        component: its name in messages, for example `decoder_prefill`.
        threads: how many compute; None for one for each available core.
        transient: give the memory of intermediate results back after each run, instead of keeping it for the next.
        folder: where external data lies when `model` is bytes.
        options: what a built form of the bundle asks for.

    Raises:
        MoiieError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        component: str = "graph",
        threads: int | None = None,
        transient: bool = False,
        folder: Path | None = None,
        options: EngineOptions = PORTABLE_OPTIONS,
    ) -> None:
        self._where = component if isinstance(model, bytes) else f"{component} ({model})"
        settings = _settings(available_cores() if threads is None else threads)
        if not options.prepack:
            # Packing would copy every weight into memory of its own, once a session; unpacked ones stay mapped.
            settings.add_session_config_entry("session.disable_prepacking", "1")
        if folder is not None:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        source = model if isinstance(model, bytes) else str(model)
        try:
            for library in options.libraries:
                settings.register_custom_ops_library(str(library))
            self._session: Any = self._opened(source, settings)
        except MoiieError:
            raise
        except Exception as error:  # its exception types share no base class of their own
            raise MoiieError(
                f"{self._where}: ONNX Runtime {ort.__version__} cannot load the graph: {_first_line(error)}",
                "check the files with `moiie inspect --verify BUNDLE`, and the installation with `moiie doctor`",
            ) from error
        self.inputs: Mapping[str, TensorSpec] = self._specs(self._session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = self._specs(self._session.get_outputs())
        self._run_options: Any = ort.RunOptions()
        if transient:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arenas)
        self._bound: dict[str, Any] = {}
        self._bound_sizes: Sizes | None = None
        self._bindings: dict[tuple[str, ...], Any] = {}
        _log.debug("loaded %s", self._where)

    def bind(self, name: str, array: Array | DeviceBuffer) -> None:
        """Tie an input or an output to this buffer, by address, for all later runs.

        One buffer bound to an input and to an output lets the graph update it in place.

        Raises:
            MoiieError: no such input or output; an array that is not contiguous, not writable (outputs), or of
                another type or shape.
        """
        self._open()
        spec = self.inputs.get(name) or self.outputs.get(name)
        if spec is None:
            raise MoiieError(
                f"{self._where}: no input or output is called `{name}`",
                f"its inputs are {', '.join(self.inputs)}; its outputs are {', '.join(self.outputs)}",
            )
        self._bound[name] = self._bindable(name, spec, array)
        self._bound_sizes = None
        self._bindings.clear()

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: an array for each input that is not bound.
            outputs: names to return; None for all that are not bound. Bound outputs are always written, and named
                ones among them are returned as the bound array itself.

        Returns:
            Arrays by name, owned by the caller.

        Raises:
            MoiieError: wrong feeds (see `check_feeds`), an unknown output, or a failure inside ONNX Runtime.
        """
        session = self._open()
        if self._bound_sizes is None:
            bound = {name: array for name, array in self._bound.items() if name in self.inputs}
            self._bound_sizes = named_sizes(self._where, self.inputs, bound, {})
        sizes = check_feeds(self._where, self.inputs, feeds, self._bound, self._bound_sizes)
        unbound = (name for name in self.outputs if name not in self._bound)
        wanted = tuple(unbound if outputs is None else outputs)
        for name in wanted:
            if name not in self.outputs:
                raise MoiieError(
                    f"{self._where}: no output is called `{name}`", f"its outputs are {', '.join(self.outputs)}"
                )
        free = tuple(name for name in wanted if name not in self._bound)
        binding = self._binding(free)
        # ONNX Runtime keeps only addresses: these arrays must live until the run is over.
        kept = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        results: dict[str, Any] = {name: self._allocated(name, sizes) for name in free}
        try:
            for name, array in kept.items():
                self._bind_input(binding, name, array)
            for name in free:  # again at each run: what was bound or allocated earlier would fix the shape
                self._bind_output(binding, name, results[name])
            session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # see __init__
            raise self._failed(error) from error
        if any(array is None for array in results.values()):
            made = dict(zip([*self._bound_outputs(), *free], binding.get_outputs(), strict=True))
            results = {name: made[name].numpy() if array is None else array for name, array in results.items()}
        return {name: self._bound[name] if name in self._bound else results[name] for name in wanted}

    def unbind(self) -> None:
        """Forget all buffers that were bound, so that their memory can go."""
        self._bindings.clear()
        self._bound.clear()
        self._bound_sizes = None

    def close(self) -> None:
        """Release the graph, its mapped weights and its bindings. Closing twice is allowed."""
        self.unbind()
        self._session = None

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        if self._session is None:
            raise MoiieError(f"{self._where}: the session is closed")
        return self._session

    def _bound_outputs(self) -> list[str]:
        return [name for name in self._bound if name in self.outputs]

    def _binding(self, free: tuple[str, ...]) -> Any:
        """The binding for a run that returns `free`, with the bound buffers already in it."""
        binding = self._bindings.get(free)
        if binding is None:
            binding = self._session.io_binding()
            for name, array in self._bound.items():
                if name in self.inputs:
                    self._bind_input(binding, name, array)
            for name in self._bound_outputs():
                self._bind_output(binding, name, self._bound[name])
            self._bindings[free] = binding
        return binding

    def _allocated(self, name: str, sizes: Sizes) -> Array | None:
        """A buffer for an output; None when its shape is not known before the run."""
        spec = self.outputs[name]
        shape = [size if isinstance(size, int) else sizes.get(size, (-1, ""))[0] for size in spec.shape]
        # No dimensions may also mean that ONNX Runtime does not know how many there are.
        return None if -1 in shape or not shape else np.empty(shape, spec.dtype)

    # What a session on a device does otherwise (onnxruntime_cuda.py).

    _arenas = "cpu:0"

    def _opened(self, source: str | bytes, settings: Any) -> Any:
        return ort.InferenceSession(source, settings, providers=["CPUExecutionProvider"])

    def _bindable(self, name: str, spec: TensorSpec, array: Any) -> Any:
        """The buffer that will be tied to a name, when it fits."""
        check_array(self._where, name, spec, array)
        if not array.flags.c_contiguous or (name in self.outputs and not array.flags.writeable):
            raise MoiieError(f"{self._where}: the buffer bound to `{name}` must be contiguous and writable")
        return array

    def _bind_input(self, binding: Any, name: str, array: Any) -> None:
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, binding: Any, name: str, array: Any) -> None:
        if array is None:
            binding.bind_output(name)
        else:
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _failed(self, error: Exception) -> MoiieError:
        return MoiieError(f"{self._where}: ONNX Runtime failed: {_first_line(error)}")

    def _specs(self, values: Sequence[Any]) -> dict[str, TensorSpec]:
        specs = {}
        for value in values:
            if value.type not in _DTYPES:
                raise MoiieError(f"{self._where}: `{value.name}` has type {value.type}, which the runtime cannot feed")
            sizes = enumerate(value.shape)
            shape = tuple(f"{value.name}.{axis}" if size is None else size for axis, size in sizes)
            specs[value.name] = TensorSpec(_DTYPES[value.type], shape)
        return specs


def _settings(threads: int) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL
    # A memory plan for each prompt length would be kept beside the memory of the runs before it.
    settings.enable_mem_pattern = False
    # Each session has threads of its own. One pool for the process would be leaner, but once it exists ONNX Runtime
    # refuses every session of the program that was not made for it.
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    # Threads that wait by spinning take the cores from the session that works (4 sessions: 1.5 times as long in the
    # median, 5 times at the 90th percentile) and from other programs (busy machine: twice as long). So: not at all
    # between runs, and between the operators of a run only for as long as the next one takes to come.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    return settings


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
