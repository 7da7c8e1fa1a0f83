"""The first passes of every TensorRT dialect: constants as initialisers, storage casts gone, fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from moiie_export.graph.rewriting import clean, insert, replace
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_types import value_types

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def prepare(model: ir.Model, context: TrtContext) -> None:
    """What `flatten` does, and batch and kept become numbers."""
    for node in model.graph:
        if node.op_identifier() in model.functions:
            context.bodies[str(node.name)] = model.functions[node.op_identifier()]
    flatten(model)
    _fix_dimensions(model, context)
    clean(model)


def flatten(model: ir.Model) -> None:
    """Drop bodies, make Constant nodes initialisers, let casts of stored weights vanish."""
    model.functions.clear()  # a parser would take a portable body where the plugin is missing
    for node in model.graph:
        node.overload = ""
    lift_constants(model)
    _drop_storage_casts(model)
    _resolve_cast_like(model)
    _fold(model)


def lift_constants(model: ir.Model) -> None:
    """Constant nodes become initialisers."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a parameter of the bundle, not a small constant of the graph."""
    return value is not None and isinstance(value.const_value, (ir.ExternalTensor, ir.LazyTensor))


def late_weight(
    model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], np.ndarray]
) -> ir.Value:
    """A parameter whose numbers are read when it is written, and let go."""

    def made() -> ir.TensorProtocol:
        return ir.Tensor(read().reshape(tuple(shape)).astype(dtype.numpy(), copy=False), dtype=dtype)

    tensor = ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _drop_storage_casts(model: ir.Model) -> None:
    """float16 weights are cast to float32 where they are used; here every weight takes the type that its user wants."""
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and is_weight(source) and source.dtype in _FLOATS:
            node.outputs[0].replace_all_uses_with(source)


def _resolve_cast_like(model: ir.Model) -> None:
    """CastLike becomes Cast, which every release reads."""
    types = value_types(model)
    for node in list(model.graph):
        if node.op_type == "CastLike" and node.domain == "":
            like = node.inputs[1]
            assert like is not None  # the op has two inputs
            wanted = types[like]
            cast = insert(node, "Cast", [node.inputs[0]], name=f"{node.name}/cast", to=wanted.value)
            replace(node.outputs[0], cast.outputs[0])


def _fold(model: ir.Model) -> None:
    """Casts, reshapes and joins of small constants become constants: some parsers want axes as such."""
    for node in list(model.graph):
        values = [value.const_value if value is not None else None for value in node.inputs]
        if node.op_type not in _FOLDED or node.outputs[0].is_graph_output():
            continue
        if not all(isinstance(value, ir.TensorProtocol) and value.nbytes <= _SMALL for value in values):
            continue
        if any(is_weight(value) for value in node.inputs):
            continue
        arrays = [value.numpy() for value in values if value is not None]
        if node.op_type == "Reshape" and 0 in arrays[1]:
            continue
        folded = ir.tensor(_FOLDED[node.op_type](node, arrays), name=f"{node.outputs[0].name}.folded")
        made = ir.Value(
            name=folded.name, shape=ir.Shape(folded.shape.numpy()), type=ir.TensorType(folded.dtype), const_value=folded
        )
        model.graph.register_initializer(made)
        node.outputs[0].replace_all_uses_with(made)


def _cast(node: ir.Node, arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy())


_SMALL = 1024
_FOLDED: dict[str, Callable[[ir.Node, list[np.ndarray]], np.ndarray]] = {
    "Cast": _cast,
    "Reshape": lambda _, arrays: arrays[0].reshape(arrays[1]),
    "Concat": lambda node, arrays: np.concatenate(arrays, axis=node.attributes["axis"].as_int()),
}


def _fix_dimensions(model: ir.Model, context: TrtContext) -> None:
    """What a target decides is a number in its graphs; sequence, images and patches stay open for profiles."""
    batch = context.target.batch
    sizes = {"batch": batch, "kept": 1, "adapters": batch, "texts": 1}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_size(dim, sizes, batch) for dim in value.shape])


def _size(dim: int | ir.SymbolicDim, sizes: dict[str, int], batch: int) -> int | str:
    if isinstance(dim, int):
        return dim
    name = str(dim.value)
    if name in sizes:
        return sizes[name]
    return "sequence" if name == "batch*sequence" and batch == 1 else name
