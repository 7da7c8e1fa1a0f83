"""Values inside TensorRT engines: the graph that went into an engine is built again with them as outputs, and run once.

Needs the GPU of the target, and the graphs that `moiie build --keep-graphs` leaves beside the engines. An engine with more
outputs is not quite the engine: TensorRT fuses less. Not run on a GPU so far.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.engine_process import run_job
from moiie_export.builders.engine_specs import Profile
from moiie_export.parity.metrics import Array
from moiie_runtime.backends.device import BFLOAT16, Device, DeviceBuffer
from moiie_runtime.backends.session import EngineOptions
from moiie_runtime.backends.tensorrt_shared import TensorRtShared
from moiie_runtime.engines import Engine
from moiie_runtime.errors import MoiieError

_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": BFLOAT16, "INT32": "int32", "INT64": "int64", "INT8": "int8"}
_TYPES |= {"BOOL": "bool", "UINT8": "uint8"}


class TensorRtValues:
    """Runs marked graphs of a TensorRT engine. See `Values` in bisect.py.

    Args:
        engine: the built form.
        options: of its backend, which found TensorRT and a GPU.
    """

    def __init__(self, engine: Engine, options: EngineOptions) -> None:
        assert isinstance(options.shared, TensorRtShared)
        assert options.device is not None
        self._engine, self._shared = engine, options.shared
        self._device: Device = options.device
        self._graphs = engine.bundle.path(f"{engine.folder}/graphs")

    def graph(self, component: str) -> onnx.ModelProto:
        """The graph that went into the engine, without its weights.

        Raises:
            MoiieError: it was not kept.
        """
        path = self._graphs / f"{component}.onnx"
        if not path.is_file():
            raise MoiieError(
                f"{path}: the graphs of this engine were not kept, and values inside are not seen without them",
                f"{self._engine.build} --keep-graphs --force",
            )
        return onnx.load(str(path), load_external_data=False)

    def run(
        self, component: str, model: onnx.ModelProto, names: list[str], feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Build with these values as outputs, and run."""
        marked = onnx.ModelProto()
        marked.CopyFrom(model)
        known = {value.name for value in marked.graph.output}
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        with tempfile.TemporaryDirectory(dir=self._graphs) as folder:
            graph = Path(folder) / f"{component}.onnx"
            for data in self._graphs.glob("*.data"):  # weights are named relative to the graph
                (Path(folder) / data.name).hardlink_to(data)
            onnx.save(marked, str(graph))
            plan = graph.with_suffix(".engine")
            run_job(self._engine.backend, self._job(component, graph, plan), lambda *_: None)
            return self._execute(component, plan.read_bytes(), names, feeds)

    def _job(self, component: str, graph: Path, plan: Path) -> EngineJob:
        document = self._engine.document
        profiles = [
            Profile(each["name"], {name: (low, best, high) for name, (low, best, high) in each["sizes"].items()})
            for each in document["components"][component]["profiles"]
        ]
        plugins = (document.get("plugins") or {}).get("file")
        library = None if plugins is None else self._engine.bundle.path(f"{self._engine.folder}/{plugins}")
        return EngineJob(component, graph, plan, profiles, tuple(document["sms"]), library, embed_plugins=False)

    def _execute(self, component: str, plan: bytes, names: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        trt, aliases = self._shared.trt, self._engine.document["components"][component].get("aliases") or {}
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._shared.refusal(f"{component}: TensorRT cannot load the marked engine")
        context, held = engine.create_execution_context(), dict(self._shared.banks.buffers(component))
        tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in tensors if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        own: list[DeviceBuffer] = []
        try:
            for name in inputs:
                if name not in held:
                    array = _fitted(feeds[name], tuple(engine.get_tensor_shape(name)))
                    context.set_input_shape(name, array.shape)
                    held[name] = self._device.upload(array, f"input {name}", _TYPES[engine.get_tensor_dtype(name).name])
                    own.append(held[name])
            for name in tensors:
                if name not in held and name in aliases:
                    held[name] = held[aliases[name]]
                elif name not in held:
                    shape, kind = tuple(context.get_tensor_shape(name)), _TYPES[engine.get_tensor_dtype(name).name]
                    held[name] = self._device.empty(shape, kind, f"output {name}")
                    own.append(held[name])
                context.set_tensor_address(name, held[name].address)
            if not context.execute_async_v3(self._device.stream):
                raise MoiieError(f"{component}: TensorRT cannot run the marked engine", None)
            self._device.synchronize()
            return {name: held[name].numpy() for name in names}
        finally:
            for buffer in own:
                buffer.free()


def _fitted(array: Array, shape: tuple[Any, ...]) -> Array:
    """The array with as many rows as a graph of fixed size has."""
    rows = shape[0] if shape else -1
    return array if rows in (-1, len(array)) else np.repeat(array, rows, axis=0)
