"""ONNX schemas and exporter translations, generated from the `Op` records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from onnx import defs
from onnxscript import values

from moiie_export.ops import DOMAIN, OPS, Op
from moiie_export.ops.op import VERSION, Port

_ATTRIBUTE_TYPES = {
    "int": defs.OpSchema.AttrType.INT,
    "ints": defs.OpSchema.AttrType.INTS,
    "float": defs.OpSchema.AttrType.FLOAT,
}


@cache
def register_schemas() -> None:
    """Tell onnx the schemas of domain `moiie`, once a process; the exporter refuses ops without one."""
    for op in OPS.values():
        defs.register_schema(_schema(op))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch op -> function that emits the bare `moiie` node, for `torch.onnx.export(custom_translation_table=...)`."""
    register_schemas()
    return {_torch_op(op): _translation(op) for op in OPS.values()}


def _schema(op: Op) -> defs.OpSchema:
    return defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        inputs=[_parameter(port) for port in op.inputs],
        outputs=[_parameter(port) for port in op.outputs],
        type_constraints=[(_type(port), port.type.split("|"), "") for port in op.inputs if "|" in port.type],
        attributes=[
            defs.OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind], required=True) for name, kind in op.attributes.items()
        ],
    )


def _parameter(port: Port) -> defs.OpSchema.FormalParameter:
    option = defs.OpSchema.FormalParameterOption
    how = option.Variadic if port.variadic else option.Optional if port.optional else option.Single
    mixed = port.variadic and "|" in port.type
    return defs.OpSchema.FormalParameter(port.name, _type(port), param_option=how, is_homogeneous=not mixed)


def _type(port: Port) -> str:
    """A type, or the name of the constraint that lists several."""
    return f"T_{port.name}" if "|" in port.type else port.type


def _torch_op(op: Op) -> Callable[..., Any]:
    namespace, name = op.torch_name.split("::")
    packet: Callable[..., Any] = getattr(getattr(torch.ops, namespace), name).default
    return packet


def _translation(op: Op) -> Callable[..., Any]:
    emit = getattr(values.Opset(DOMAIN, VERSION), op.name)
    singles = {port.name for port in op.inputs if not port.variadic}
    variadic = next((port.name for port in op.inputs if port.variadic), None)

    def translate(*args: Any, **kwargs: Any) -> Any:
        """Everything goes by keyword: given positions, the exporter's variadic port swallows the inputs before it."""
        named: Mapping[str, Any] = {**dict(zip(op.torch_arguments, args, strict=False)), **kwargs}
        arguments = {name: value for name, value in named.items() if name in op.attributes or name in singles}
        if variadic is not None:
            lists = [value for name, value in named.items() if name not in arguments]
            arguments[variadic] = tuple(item for values_ in lists for item in values_)
        return emit(**arguments)

    return translate
