"""The graph in the target's precision: TensorRT networks are strongly typed, so every type is decided here.

A value that follows from activations or weights has the target's precision. One that follows from whole numbers and
constants alone (positions, angles) stays float32 until it meets the others, and so does what is marked or named below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import insert
from moiie_export.graph.trt_context import EXACT, TrtContext, is_exact
from moiie_export.graph.trt_prepare import is_weight
from moiie_export.graph.trt_types import Types, value_types
from moiie_export.ops import DOMAIN

FLOAT = ir.DataType.FLOAT
_DTYPES = {"float32": FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_NUMPY = {FLOAT: np.float32, ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}

KEPT_INPUTS = frozenset({"grid_size", "flattened_patches"})
"""Graph inputs that hold whole numbers beside values; half precision has not enough digits for them."""

_FLOAT32_OUTPUTS = ("logits", "router_logits.", "expert_weights.", "move_weights")
"""What the host reads."""

_FLOAT32_OPS = frozenset(
    {"LayerNormalization", "Softmax", "ReduceL2", "ModalityRouter", "TopKRoute", "DeformableSample"}
)

_FLOAT32_INPUTS: Mapping[tuple[str, str], tuple[int, ...]] = {
    (DOMAIN, "ExpertDispatch"): (2,),
    (DOMAIN, "QuantizedExpertDispatch"): (2,),
    (DOMAIN, "Fp8ExpertDispatch"): (2, 5, 6),
    ("", "Resize"): (1, 2),
}
"""Inputs that are float32 whatever the precision."""

_FLOAT16_INPUTS: Mapping[tuple[str, str], tuple[int, ...]] = {(DOMAIN, "QuantizedExpertDispatch"): (5, 6)}
_EXPERTS = frozenset({"ExpertDispatch", "QuantizedExpertDispatch", "Fp8ExpertDispatch"})
"""Computed in the target's precision, also on rows that an island left in float32."""
_PRODUCTS = frozenset({"Gemm", "MatMul", "Conv", "LayerNormalization", "RMSNormalization"})
"""Where float32 that one place needs may begin."""


def _kept_inputs(node: ir.Node) -> tuple[int, ...]:
    return _FLOAT32_INPUTS.get((node.domain, node.op_type), ())


def precision_dtype(precision: str) -> ir.DataType:
    """The ONNX type of a target's precision."""
    return _DTYPES[precision]


def convert_precision(model: ir.Model, context: TrtContext) -> None:
    """Give every float value its type and put casts where types meet; weights are converted when they are written."""
    _mark_islands(model, context)
    _mark_coordinates(model)
    converter = _Converter(model, precision_dtype(context.target.precision), value_types(model))
    converter.inputs()
    for node in list(model.graph):
        converter.node(node)
    converter.outputs()


def _mark_islands(model: ir.Model, context: TrtContext) -> None:
    """Linear layers whose weights the bundle names as islands, with what leads to them and the sums they flow into."""
    for node in model.graph:
        if any(value is not None and value.name in context.islands for value in node.inputs):
            node.metadata_props[EXACT] = "1"
            _mark_back(list(node.inputs))
            _mark_sums(node)


def _mark_coordinates(model: ir.Model) -> None:
    """What leads from a product to the points of a DeformableSample: a pixel's place needs float32."""
    for node in model.graph:
        if node.op_type == "DeformableSample":
            _mark_back([node.inputs[1]])


def _mark_back(wanted: list[ir.Value | None]) -> None:
    """Mark what these values are made of, as far as the next products and norms."""
    while wanted:
        value = wanted.pop()
        made = None if value is None else value.producer()
        if made is None or made.op_type in _PRODUCTS or made.domain == DOMAIN or is_exact(made):
            continue
        made.metadata_props[EXACT] = "1"
        wanted += made.inputs


def _mark_sums(node: ir.Node) -> None:
    """Mark the residual stream behind a node, and the norms that read it."""
    nodes = [node]
    while nodes:
        for output in nodes.pop().outputs:
            for use in output.uses():
                if use.node.op_type in ("Add", "Reshape", "RMSNormalization") and not is_exact(use.node):
                    use.node.metadata_props[EXACT] = "1"
                    nodes += [] if use.node.op_type == "RMSNormalization" else [use.node]


@dataclass
class _Converter:
    """Walks the graph once, in order."""

    model: ir.Model
    wanted: ir.DataType
    types: Types
    now: Types = field(default_factory=dict)
    """Types of values as they are after the pass."""
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def inputs(self) -> None:
        """Activations that the host gives, and experts."""
        for value in self.model.graph.inputs:
            kept = value.name in KEPT_INPUTS or EXACT in value.metadata_props
            if self.types[value] == FLOAT and not kept:
                value.dtype = self.wanted
            self.now[value] = self.types[value] if value.dtype is None else value.dtype

    def node(self, node: ir.Node) -> None:
        """Decide one node's type and cast what it reads."""
        if self._is_vain_cast(node):
            source = node.inputs[0]
            assert source is not None
            self.now[node.outputs[0]] = self.now[source]
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(source)
                self.model.graph.remove(node, safe=True)
            return
        kind = self._compute_type(node)
        half = _FLOAT16_INPUTS.get((node.domain, node.op_type), ())
        for index, value in enumerate(node.inputs):
            if value is None or not self._is_float(value):
                continue
            own = FLOAT if index in _kept_inputs(node) else kind
            own = ir.DataType.FLOAT16 if index in half else own
            node.replace_input_with(index, self._as(value, own, node))
        for output in node.outputs:
            original = self.types[output]
            self.now[output] = kind if original == FLOAT and node.op_type != "Cast" else original
            output.dtype = self.now[output]

    def outputs(self) -> None:
        """What the host reads is float32, what goes into other engines and buffers has the target's precision."""
        for index, value in enumerate(list(self.model.graph.outputs)):
            if self.types[value] != FLOAT:
                continue
            kind = FLOAT if str(value.name).startswith(_FLOAT32_OUTPUTS) else self.wanted
            if self.now[value] == kind:
                value.dtype = kind
                continue
            name = str(value.name)
            value.name = f"{name}.{self.now[value].name.lower()}"
            node = ir.node("Cast", [value], attributes={"to": kind.value}, name=f"{name}/cast")
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, value.shape, kind
            self.model.graph.append(node)
            self.model.graph.outputs[index] = node.outputs[0]

    def _is_float(self, value: ir.Value) -> bool:
        kinds = (FLOAT, ir.DataType.FLOAT16) if is_weight(value) else (FLOAT,)
        return self.types.get(value) in kinds

    def _is_vain_cast(self, node: ir.Node) -> bool:
        """float32 to float32, left over from storage types."""
        return (
            node.op_type == "Cast"
            and node.inputs[0] is not None
            and self.types[node.outputs[0]] == FLOAT == self.types[node.inputs[0]]
            and node.inputs[0].const_value is None
        )

    def _compute_type(self, node: ir.Node) -> ir.DataType:
        if is_exact(node) or node.op_type in _FLOAT32_OPS or node.op_type == "Cast":
            return FLOAT
        if node.domain == DOMAIN and node.op_type in _EXPERTS:
            return self.wanted
        for value in node.inputs:
            if value is None or not self._is_float(value):
                continue
            if is_weight(value) or (value.const_value is None and self.now[value] == self.wanted):
                return self.wanted
        return FLOAT

    def _as(self, value: ir.Value, kind: ir.DataType, before: ir.Node) -> ir.Value:
        """The value in a type: a converted constant, or a cast that is made once."""
        if value.const_value is None and self.now[value] == kind:
            return value
        known = self.casts.get((value, kind))
        if known is None:
            if value.const_value is not None:
                known = self._constant(value, kind)
            else:
                cast = insert(before, "Cast", [value], name=f"{value.name}/{kind.name.lower()}", to=kind.value)
                known = cast.outputs[0]
                known.dtype = kind
            self.types[known], self.now[known] = FLOAT, kind
            self.casts[(value, kind)] = known
        return known

    def _constant(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == kind:
            return value
        name = f"{value.name}.{kind.name.lower()}"
        if is_weight(value):
            # The data is read when it is written, and let go.
            converted: ir.TensorProtocol = ir.LazyTensor(
                lambda: ir.Tensor(tensor.numpy().astype(_NUMPY[kind]), dtype=kind),
                dtype=kind,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
        else:
            converted = ir.Tensor(tensor.numpy().astype(_NUMPY[kind]), dtype=kind, name=name)
        made = ir.Value(
            name=name, shape=ir.Shape(converted.shape.numpy()), type=ir.TensorType(kind), const_value=converted
        )
        self.model.graph.register_initializer(made)
        return made
