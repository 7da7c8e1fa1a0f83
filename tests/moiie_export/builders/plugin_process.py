"""Builds a prefill engine with a plugin written in Python; prints what the builder asked of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))

from moiie_export.builders.compile_engine import EngineJob, compile_engine
from moiie_export.builders.engine_specs import Profile
from moiie_export.builders.library import load_library
from moiie_export.builders.plan_file import plan_text
from tests.trt_graphs import lowered, target

LIBRARY = load_library("tensorrt_rtx")
TRT = LIBRARY.trt
SEEN: dict[str, Any] = {"configured": 0, "experts": []}


class Dispatch(TRT.IPluginV3, TRT.IPluginV3OneCore, TRT.IPluginV3OneBuild, TRT.IPluginV3OneRuntime):  # type: ignore[misc]
    """Shapes and types of ExpertDispatch; it is never run."""

    def __init__(self, experts: list[int]) -> None:
        for base in (TRT.IPluginV3, TRT.IPluginV3OneCore, TRT.IPluginV3OneBuild, TRT.IPluginV3OneRuntime):
            base.__init__(self)
        self.experts, self.num_outputs = experts, 1
        self.plugin_name, self.plugin_version, self.plugin_namespace = "ExpertDispatch", "1", ""

    def get_capability_interface(self, _: Any) -> Any:
        return self

    def clone(self) -> Any:
        return Dispatch(self.experts)

    def get_output_data_types(self, types: list[Any]) -> list[Any]:
        return [types[0]]

    def get_output_shapes(self, inputs: list[Any], _: Any, __: Any) -> list[Any]:
        shape = TRT.DimsExprs(2)
        shape[0], shape[1] = inputs[0][0], inputs[0][1]
        return [shape]

    def supports_format_combination(self, position: int, in_out: list[Any], _: int) -> bool:
        wanted = [TRT.float16, TRT.int32, TRT.float32, TRT.float16, TRT.float16, TRT.float16]
        given = in_out[position].desc
        return bool(given.type == wanted[position] and given.format == TRT.TensorFormat.LINEAR)

    def configure_plugin(self, inputs: list[Any], _: Any) -> None:
        SEEN["configured"] += next(iter(inputs[3].desc.dims)) == len(self.experts)

    def get_fields_to_serialize(self) -> Any:
        field = TRT.PluginField("experts", np.array(self.experts, np.int32), TRT.PluginFieldType.INT32)
        return TRT.PluginFieldCollection([field])

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, _: int) -> None:
        pass

    def on_shape_change(self, _: Any, __: Any) -> None:
        pass

    def attach_to_context(self, _: Any) -> Any:
        return self

    def enqueue(self, *_: Any) -> None:
        raise AssertionError("there is no GPU")


class Creator(TRT.IPluginCreatorV3One):  # type: ignore[misc]
    """Makes them."""

    def __init__(self) -> None:
        TRT.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "ExpertDispatch", "1", ""
        field = TRT.PluginField("experts", np.array([]), TRT.PluginFieldType.INT32)
        self.field_names = TRT.PluginFieldCollection([field])

    def create_plugin(self, _: str, fields: Any, __: Any) -> Any:
        experts = [int(value) for each in fields for value in each.data]
        SEEN["experts"].append(experts)
        made = Dispatch(experts)
        KEPT.append(made)
        return made


KEPT: list[Any] = []
"""The library does not own what Python makes."""


def main(bundle: Path, folder: Path) -> None:
    creator = Creator()
    TRT.get_plugin_registry().register_creator(creator, "")
    graph = lowered(bundle, "decoder_prefill", target("rtx", plugins="required")).save(folder)
    output = folder / "decoder_prefill.engine"
    job = EngineJob("decoder_prefill", graph, output, (Profile("prefill_8", {"sequence": (1, 8, 8)}),), (89,))
    compile_engine(LIBRARY, job, lambda *_: None)
    layers = plan_text(output.read_bytes()).count("custom_layer={")
    configured = min(SEEN["configured"], 2)
    print(json.dumps({"configured": configured, "experts": SEEN["experts"], "layers": layers}))


main(Path(sys.argv[1]), Path(sys.argv[2]))
