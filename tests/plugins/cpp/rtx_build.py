"""Parses and builds each example's graph with TensorRT for RTX; run by test_rtx.py in a process of its own.

    python -m tests.plugins.cpp.rtx_build LIBRARY OUT

prints a line of JSON a graph: what was said, and the layers that the plan's text names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from moiie_export.builders.library import Library, load_library, load_plugins
from moiie_plugins.refusals import take_refusals
from tests.plugins.cpp.nodes import EXAMPLES, Example

ROWS = ("hidden", "expert_ids", "expert_weights")
MOST, SMS = 700, (86, 89, 120)
TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}
GRAPHS = (
    "decode",
    "decode, int4 of 32",
    "prefill, int8 of 32",
    "decode, fp8",
    "cache",
    "attention, window",
    "samples, float32",
)


def graph(example: Example, wrong: bool) -> onnx.ModelProto:
    """One node; the tokens of experts are open. `wrong`: the last input has an axis that is too long."""
    inputs, names = [], list(example.inputs)
    for name, value in example.inputs.items():
        shape: list[Any] = ["T", *value.shape[1:]] if name in ROWS else list(value.shape)
        if wrong and name == names[-1]:
            shape[-1] += 1
        inputs.append(helper.make_tensor_value_info(name, TYPES[str(value.dtype).removeprefix("torch.")], shape))
    single = {"bits", "group_size", "window"}
    attributes = {
        name: value[0] if name in single and not isinstance(value, float) else value
        for name, value in example.attributes.items()
    }
    # Output and input of one name would be one tensor: the node's own names are not the library's.
    node = helper.make_node(
        example.op, names, ["result"], "node", domain="moiie", plugin_namespace="", plugin_version="1", **attributes
    )
    shape = ["T", *example.shape[1:]] if "hidden" in names else list(example.shape)
    result = helper.make_tensor_value_info("result", TYPES[str(example.dtype).removeprefix("torch.")], shape)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moiie", 1)]
    made = helper.make_graph([node], "graph", inputs, [result])
    return helper.make_model(made, opset_imports=opsets, ir_version=11)


def build(
    library: Library, model: onnx.ModelProto, sms: Sequence[int], embedded: Path | None
) -> tuple[bytes | None, list[str]]:
    """The plan for some SMs together with two profiles, or None, and TensorRT's errors."""
    trt = library.trt
    said: list[str] = []

    class Listener(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                said.append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.name = "net"
    parser = trt.OnnxParser(network, listener)
    if not parser.parse(model.SerializeToString()):
        return None, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        config.set_compute_capability(library.sms[sm], index)
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if embedded is not None:
        config.plugins_to_serialize = [str(embedded)]
    moving = [network.get_input(i) for i in range(network.num_inputs) if network.get_input(i).name in ROWS]
    for low, high in ((1, 1), (2, MOST)) if moving else ():
        profile = builder.create_optimization_profile()
        for tensor in moving:
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (low, *rest), (high, *rest), (high, *rest))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return (None if plan is None else bytes(plan)), said


def main(path: Path) -> None:
    """Build them all."""
    library = load_library("tensorrt_rtx")
    load_plugins(library, path)
    cases: list[tuple[str, bool, tuple[int, ...], Path | None]] = [
        *((name, False, (89, 120) if name.endswith("fp8") else SMS, None) for name in GRAPHS),
        ("decode", True, SMS, None),
        ("decode, fp8", False, (86,), None),
        ("decode", False, SMS, path),
    ]
    for name, wrong, sms, embedded in cases:
        example = EXAMPLES[name]()
        plan, said = build(library, graph(example, wrong), sms, embedded)
        layers = re.findall(rb"custom_layer=\{[^}]*?name=\"([^\"]*)\"", plan or b"")
        print(
            json.dumps(
                {
                    "name": name,
                    "wrong": wrong,
                    "sms": sms,
                    "bytes": None if plan is None else len(plan),
                    "layers": [layer.decode() for layer in layers],
                    "op": plan is not None and example.op.encode() in plan,
                    "workspace": plan is not None and b"workspace_bytes" in plan,
                    "embedded": plan is not None and b"expert_prefill_gate_up" in plan,
                    "said": said,
                    "refusals": take_refusals(path),
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
