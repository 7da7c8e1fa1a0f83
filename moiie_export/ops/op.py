"""The record that describes a custom op once; schema, translation and body are generated from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DOMAIN = "moiie"
VERSION = 1
OPSET = 23
"""Standard ops of graphs and bodies. Not 24: no ONNX Runtime for Python 3.10 runs it."""

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Port:
    """One input or output: its name, its element types as ONNX spells them (a bar between), and how often it may occur.

    The tensors of a variadic port with several types need not agree in type.
    """

    name: str
    type: str
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True)
class Op:
    """One custom op.

    Attributes:
        name: ONNX op type in domain `moiie`.
        torch_name: qualified name of its torch reference, `moiie::snake_case`.
        inputs, outputs: ports in order.
        attributes: name -> "int", "ints" or "float"; a node with any other attribute is refused.
        body: (attributes, number of inputs) -> text of the portable ONNX function, standard ops only. Attribute
            values are written into the text, so one op may need several overloads in one graph.
        torch_arguments: arguments of the torch op in order, as names of inputs or attributes.
    """

    name: str
    torch_name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: Mapping[str, str]
    body: Callable[[Attributes, int], str]
    torch_arguments: tuple[str, ...] = field(default=())


def function_text(
    op_name: str, signature: tuple[Sequence[str], Sequence[str]], attributes: Attributes, lines: str
) -> str:
    """ONNX text of a function in domain `moiie` whose body uses standard ops of `OPSET` only.

    Args:
        op_name: the op's ONNX name.
        signature: names of inputs, names of outputs.
        attributes: names of the attributes the node carries; the body does not refer to them.
        lines: the statements.
    """
    inputs, outputs = signature
    declared = f" <{', '.join(attributes)}>" if attributes else ""
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{op_name}{declared} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{lines}\n}}"
    )


def vector(name: str, values: Sequence[int]) -> str:
    """Statement: a constant list of int64. Written as a tensor, because older shape inference reads no other form."""
    return f"\n    {name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def scalar(name: str, value: int, kind: str = "int64") -> str:
    """Statement: a constant without dimensions."""
    return f"\n    {name} = Constant <value = {kind} {{{value}}}> ()"
