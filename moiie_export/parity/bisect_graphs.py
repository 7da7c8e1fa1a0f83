"""What bisection asks of a graph: values inside it as outputs, which ones can be compared, what lies between two."""

from __future__ import annotations

from pathlib import Path

import onnx

from moiie_runtime.errors import Unsound


def load_graph(path: Path, hint: str) -> onnx.ModelProto:
    """A graph without its weights.

    Raises:
        Unsound: with this hint, when the file is missing or damaged.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise Unsound(f"{path}: is missing", hint) from error
    except Exception as error:  # protobuf's own exception is not public
        raise Unsound(f"{path}: is not an ONNX model: {error}", hint) from error


def marked(model: onnx.ModelProto, names: list[str], *, caches: bool) -> bytes:
    """The graph with these outputs alone; weights stay references into their file.

    Args:
        model: the graph, without its weights.
        names: values of it.
        caches: keep those outputs, too, that hold a cache, for sessions that update caches in place.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {value.name: value for value in copy.graph.output}
    held = [name for name in kept if caches and name.startswith("present.")]
    del copy.graph.output[:]
    for name in dict.fromkeys([*held, *names]):
        copy.graph.output.append(kept.get(name) or onnx.ValueInfoProto(name=name))
    return bytes(copy.SerializeToString())


def readable(model: onnx.ModelProto) -> set[str]:
    """The values inside a graph whose type numpy has."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    made = {name for node in model.graph.node for name in node.output}
    return {name for name in made if kinds.get(name) != onnx.TensorProto.BFLOAT16}


def between(graph: onnx.GraphProto, node: onnx.NodeProto, right: set[str]) -> list[onnx.NodeProto]:
    """The nodes whose results lead to a node, and to no value that is known to be right."""
    cleared = set(right)
    for each in reversed(graph.node):
        if cleared.intersection(each.output):
            cleared.update(each.input)
    wanted, found = set(node.input), []
    for each in reversed(graph.node):
        if wanted.intersection(each.output) - cleared:
            found.append(each)
            wanted.update(each.input)
    return found[::-1]
