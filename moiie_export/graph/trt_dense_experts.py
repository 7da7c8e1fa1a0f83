"""Experts without the plugin library: every expert of a bank for every token, from the bytes that the plugins read too.

Quantised banks are multiplied out in the graph. TensorRT for RTX multiplies int4 constants inside its products; of all other
forms it makes copies in the target's precision, at once for all layers unless something keeps it from that. So the copies
wait for the routes of their layer: experts that nothing is routed to become zeros. One layer's copies are then held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from moiie_export.graph.rewriting import constant, fixed_sizes, insert
from moiie_export.graph.trt_context import TrtContext
from moiie_export.graph.trt_precision import precision_dtype
from moiie_export.graph.trt_prepare import late_weight
from moiie_export.ops import DOMAIN
from moiie_export.ops.op import function_text, vector


def attach_dense_body(model: ir.Model, context: TrtContext) -> None:
    """Give ExpertDispatch nodes their dense body where the plugin need not be there."""
    needed = any((node.domain, node.op_type) == (DOMAIN, "ExpertDispatch") for node in model.graph)
    if needed and context.target.plugins != "required":
        body = onnx.parser.parse_function(dense_body(precision_dtype(context.target.precision)))
        function = ir.serde.deserialize_function(body)
        model.functions[(DOMAIN, "ExpertDispatch", "")] = function


def dense_body(dtype: ir.DataType) -> str:
    """The dense ONNX function of ExpertDispatch on a bank: every expert for every token, times its share.

    Shares are float32 and results are added in it, whatever the type of hidden states and experts, `dtype`. What an expert
    makes of a token that is not routed to it may overflow, and is not added at all.
    hidden [T, H], expert_ids [T, k] int32, expert_weights [T, k] float32, gate_up [n, 2I, H], down [n, H, I] -> [T, H]
    """
    lines = vector("last", [-1]) + vector("first", [0]) + vector("second", [1])
    lines += """
    columns = Constant <value_ints: ints = @experts> ()
    nothing = Constant <value = float {0}> ()
    ids = Cast <to = 7> (expert_ids)
    id_column = Unsqueeze (ids, last)
    hits = Equal (id_column, columns)
    weight_column = Unsqueeze (expert_weights, last)
    spread = Where (hits, weight_column, nothing)
    shares = ReduceSum <keepdims = 0> (spread, second)
    turned = Transpose <perm = [1, 0]> (shares)
    share_column = Unsqueeze (turned, last)
    rows = Unsqueeze (hidden, first)
    gate_up_columns = Transpose <perm = [0, 2, 1]> (gate_up)
    both = MatMul (rows, gate_up_columns)
    gate, up = Split <axis = 2, num_outputs = 2> (both)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    act = Mul (silu, up)
    down_columns = Transpose <perm = [0, 2, 1]> (down)
    each = MatMul (act, down_columns)
    wide = Cast <to = 1> (each)
    weighted = Mul (wide, share_column)
    routed = Cast <to = 9> (share_column)
    added = Where (routed, weighted, nothing)
    total = ReduceSum <keepdims = 0> (added, first)"""
    lines += f"\n    out = Cast <to = {dtype.value}> (total)"
    inputs = ["hidden", "expert_ids", "expert_weights", "gate_up", "down"]
    return function_text("ExpertDispatch", (inputs, ["out"]), {"experts": ()}, lines)


@dataclass
class Multiplier:
    """Makes plain experts [n, N, K] of the quantised ones of a bank, in front of the node that they are for.

    Attributes:
        model: the graph.
        node: computes the experts of a layer; its second input holds the routes [T, k].
        prefix: of the names of what is made.
        experts: global ids of the bank's experts.
        bits: of a stored number.
        group_size: columns that share a scale; 0: E4M3 with a scale a row.
    """

    model: ir.Model
    node: ir.Node
    prefix: str
    experts: Sequence[int]
    bits: int
    group_size: int

    def from_inputs(self, kind: str, stored: ir.Value, scales: ir.Value) -> ir.Value:
        """Of a bank that is bound as the plugins read it: int4 two a byte in int8 [n, N, K/2], int8 or E4M3 [n, N, K].

        Products are of float32, where they are exact.
        """
        if self.group_size == 0:
            one = constant(self.model, "one.float32", np.array(1, np.float32))  # no other op may read E4M3
            numbers = self._add(f"{kind}/numbers", "DequantizeLinear", stored, one)
            steps = self._add(f"{kind}/steps", "Unsqueeze", scales, self._axes(-1))
            return self._when_routed(kind, self._add(f"{kind}/product", "Mul", numbers, steps))
        *rows, groups = fixed_sizes(scales.shape)
        numbers = self._add(f"{kind}/numbers", "Cast", stored, to=ir.DataType.FLOAT.value)
        if self.bits == 4:
            numbers = self._halves(kind, numbers)
        grouped = self._shaped(f"{kind}/groups", numbers, (*rows, groups, self.group_size))
        wide = self._add(f"{kind}/scales", "Cast", scales, to=ir.DataType.FLOAT.value)
        steps = self._add(f"{kind}/steps", "Unsqueeze", wide, self._axes(-1))
        product = self._add(f"{kind}/product", "Mul", grouped, steps)
        weights = self._shaped(f"{kind}/weights", product, (*rows, groups * self.group_size))
        return self._when_routed(kind, weights)

    def from_constants(
        self, kind: str, stored: Sequence[ir.TensorProtocol], scales: Sequence[ir.TensorProtocol]
    ) -> ir.Value:
        """Of an expert's tensors each, as constants, which stay in 4 or 8 bits in the engine.

        TensorRT 10 has blocks of int4 alone, so groups of int8 become rows, with a scale each.
        """
        rows, columns = stored[0].shape.numpy()
        blocks = {"axis": 1, "block_size": self.group_size} if self.bits == 4 else {"axis": 0}
        width = self.group_size if self.bits == 8 and self.group_size else columns
        shape = (len(stored) * rows * columns // width, width)
        steps = (shape[0], columns // self.group_size) if self.bits == 4 else (shape[0],)
        numbers = [
            late_weight(self.model, f"{self.prefix}.{name}", each[0].dtype, sizes, _joined(each))
            for name, each, sizes in ((kind, stored, shape), (f"{kind}_scales", scales, steps))
        ]
        product = self._add(f"{kind}/product", "DequantizeLinear", *numbers, **blocks)
        weights = self._shaped(f"{kind}/weights", product, (len(stored), rows, columns))
        return weights if self.bits == 4 else self._when_routed(kind, weights)

    def _halves(self, kind: str, pairs: ir.Value) -> ir.Value:
        """Bytes as floats [..., K/2] -> their signed halves, the low one first [..., K/2, 2].

        Without shifts: the high half is a byte's sixteenth rounded down, the low one what is left to the nearest sixteen,
        where 8 to 15 stand for -8 to -1.
        """
        sixteen = constant(self.model, "sixteen.float32", np.array(16, np.float32))
        eight = constant(self.model, "eight.float32", np.array(8, np.float32))
        high = self._add(f"{kind}/high", "Floor", self._add(f"{kind}/sixteenths", "Div", pairs, sixteen))
        raised = self._add(f"{kind}/raised", "Div", self._add(f"{kind}/sum", "Add", pairs, eight), sixteen)
        nearest = self._add(f"{kind}/nearest", "Mul", self._add(f"{kind}/floor", "Floor", raised), sixteen)
        low = self._add(f"{kind}/low", "Sub", pairs, nearest)
        columns = [
            self._add(f"{kind}/{name}.column", "Unsqueeze", half, self._axes(-1))
            for name, half in (("low", low), ("high", high))
        ]
        return self._add(f"{kind}/halves", "Concat", *columns, axis=-1)

    def _when_routed(self, kind: str, weights: ir.Value) -> ir.Value:
        """The weights of experts that a token is routed to, zeros for the others."""
        nothing = constant(self.model, "zero.float32", np.array(0, np.float32))
        return self._add(f"{kind}/routed", "Where", self._routed, weights, nothing)

    @cached_property
    def _routed(self) -> ir.Value:
        """Which experts of the bank a token is routed to [n, 1, 1]."""
        columns = constant(self.model, f"experts.{'.'.join(map(str, self.experts))}", np.array(self.experts, np.int32))
        column = self._add("routes/column", "Unsqueeze", self.node.inputs[1], self._axes(-1))
        hits = self._add("routes/hits", "Equal", column, columns)
        counted = self._add("routes/counted", "Cast", hits, to=ir.DataType.FLOAT.value)
        most = self._add("routes/most", "ReduceMax", counted, self._axes(0, 1), keepdims=0)
        routed = self._add("routes/routed", "Cast", most, to=ir.DataType.BOOL.value)
        return self._add("routes/experts", "Unsqueeze", routed, self._axes(1, 2))

    def _add(self, name: str, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return insert(self.node, op_type, inputs, name=f"{self.prefix}/{name}", **attributes).outputs[0]

    def _shaped(self, name: str, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        sizes = constant(self.model, f"shape.{'.'.join(map(str, shape))}", np.array(shape, np.int64))
        return self._add(name, "Reshape", value, sizes)

    def _axes(self, *axes: int) -> ir.Value:
        return constant(self.model, f"axes.{'.'.join(map(str, axes))}", np.array(axes, np.int64))


def _joined(tensors: Sequence[ir.TensorProtocol]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([each.numpy() for each in tensors])
