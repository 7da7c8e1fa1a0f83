"""Experts for TensorRT: one node a bank of experts, bound as inputs or stored as constants, by plugin or dense.

A bank holds experts that leave memory together and are stored alike: those a decode step can reach (`language`) and the
others (`vision`), as one tensor [n, 2I, H] and one [n, H, I], each with its scales when it is quantised. Their results are
added. A bank that is bound has the same inputs whether a plugin computes it or the dense body (trt_dense_experts.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moiie_export.graph.rewriting import insert, replace
from moiie_export.graph.trt_attention import PLUGIN
from moiie_export.graph.trt_context import EXACT, Bank, TrtContext
from moiie_export.graph.trt_dense_experts import Multiplier
from moiie_export.graph.trt_prepare import is_weight, late_weight
from moiie_export.ops import DOMAIN

PLAIN = 32
"""Bits of experts that are not quantised."""

_NAME = re.compile(r"decoder\.layers\.(\d+)\..*\.experts\.(\d+)\.")
_KINDS = ("gate_up", "down")


@dataclass(frozen=True)
class _Expert:
    """One expert's weights, and its scales when it has some: gate_up, down, gate_up_scales, down_scales."""

    id: int
    weights: tuple[ir.Value, ...]
    bits: int
    group_size: int

    @property
    def op(self) -> tuple[str, dict[str, int]]:
        """The node that computes it, and that node's attributes beside `experts`."""
        if self.bits == PLAIN:
            return "ExpertDispatch", {}
        if self.group_size == 0:
            return "Fp8ExpertDispatch", {}
        return "QuantizedExpertDispatch", {"bits": self.bits, "group_size": self.group_size}


def lower_experts(model: ir.Model, context: TrtContext) -> None:
    """Replace each ExpertDispatch and QuantizedExpertDispatch by one node a bank."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type not in ("ExpertDispatch", "QuantizedExpertDispatch"):
            continue
        island = next((v.name for v in node.inputs if v is not None and v.name in context.islands), None)
        if island is not None:
            raise context.error(
                node,
                f"expert weight {island} is an island, and experts compute in {context.target.precision}",
                "build for a target with precision: bfloat16, whose range is that of float32, and export without the island",
            )
        layer = _layer(node, context)
        reachable = context.decode_experts.get(layer, ())
        banks: dict[tuple[str, int, int], list[_Expert]] = {}
        for expert in _experts(node, context):
            name = "language" if expert.id in reachable or context.target.banks == "constants" else "vision"
            banks.setdefault((name, expert.bits, expert.group_size), []).append(expert)
        total: ir.Value | None = None
        for (name, *form), experts in sorted(banks.items()):
            # By their place among the forms of this name: other phases have other names, and must agree on this one's.
            forms = sorted(others for other, *others in banks if other == name)
            suffix = f".{forms.index(form)}" if len(forms) > 1 else ""
            bank = _Bank(model, node, context, f"experts.{layer}.{name}{suffix}")
            part = bank.dispatch(layer, name, experts)
            total = part if total is None else insert(node, "Add", [total, part], name=f"{node.name}/sum").outputs[0]
        assert total is not None
        replace(node.outputs[0], total)


def _layer(node: ir.Node, context: TrtContext) -> int:
    names = [str(value.name) for value in node.inputs if value is not None]
    found = next((match for name in names if (match := _NAME.match(name))), None)
    if found is None:
        raise context.error(node, f"its experts' names tell no layer: {names[3:4]}", "export the bundle again")
    return int(found[1])


def _experts(node: ir.Node, context: TrtContext) -> list[_Expert]:
    """The experts of a node with what belongs to each."""
    ids = list(node.attributes["experts"].as_ints())
    count, values = len(ids), [value for value in node.inputs[3:] if value is not None]
    if any(not is_weight(value) for value in values):
        raise context.error(node, "an expert is no weight of the bundle", "export the bundle again")
    if node.op_type == "ExpertDispatch":
        return [_Expert(expert, (values[i], values[count + i]), PLAIN, 0) for i, expert in enumerate(ids)]
    bits = {kind: list(node.attributes[f"{kind}_bits"].as_ints()) for kind in _KINDS}
    groups = {kind: list(node.attributes[f"{kind}_group_sizes"].as_ints()) for kind in _KINDS}
    scales = iter(values[2 * count :])
    owned = {kind: [next(scales) if size < PLAIN else None for size in bits[kind]] for kind in _KINDS}
    experts = []
    for i, expert in enumerate(ids):
        if bits["gate_up"][i] != bits["down"][i] or groups["gate_up"][i] != groups["down"][i]:
            raise context.error(
                node,
                f"expert {expert}: gate_up is stored with {bits['gate_up'][i]} bits in groups of {groups['gate_up'][i]},"
                f" down with {bits['down'][i]} in groups of {groups['down'][i]} (0: a scale per row, or none)",
                "one rule for both, and a group size that divides both the hidden and the intermediate size",
            )
        own = [scale for scale in (owned["gate_up"][i], owned["down"][i]) if scale is not None]
        weights = (values[i], values[count + i], *own)
        experts.append(_Expert(expert, weights, bits["gate_up"][i], groups["gate_up"][i]))
    return experts


@dataclass
class _Bank:
    """Makes the node of one bank."""

    model: ir.Model
    node: ir.Node
    context: TrtContext
    prefix: str

    def dispatch(self, layer: int, name: str, experts: Sequence[_Expert]) -> ir.Value:
        """hidden -> what this bank's experts add [T, H]."""
        op, attributes = experts[0].op
        kinds = ("gate_up", "down", "gate_up_scales", "down_scales")[: len(experts[0].weights)]
        tensors = {f"{self.prefix}.{kind}": [each.weights[i] for each in experts] for i, kind in enumerate(kinds)}
        ids = tuple(each.id for each in experts)
        stored = {key: _stored(parts) for key, parts in tensors.items()}
        bound = self.context.target.banks == "inputs"
        dense = op != "ExpertDispatch" and self.context.target.plugins != "required"
        form = experts[0]
        multiplier = Multiplier(self.model, self.node, self.prefix, ids, form.bits, form.group_size)
        given: list[ir.Value] = []
        if bound:
            given = [self._input(key, parts) for key, parts in stored.items()]
            self.context.banks.append(Bank(layer, name, ids, stored))
        elif not dense:
            given = [self._constant(key, parts) for key, parts in stored.items()]
        if dense:
            op, attributes = "ExpertDispatch", {}
            weights, scales = list(stored.values())[:2], list(stored.values())[2:]
            given = [
                multiplier.from_inputs(kind, given[i], given[i + 2])
                if bound
                else multiplier.from_constants(kind, weights[i], scales[i])
                for i, kind in enumerate(_KINDS)
            ]
        plugin = {} if self.context.target.plugins == "off" else PLUGIN
        made = insert(
            self.node,
            op,
            [*self.node.inputs[:3], *given],
            name=f"{self.prefix}",
            domain=DOMAIN,
            experts=list(ids),
            **attributes,
            **plugin,
        )
        return made.outputs[0]

    def _input(self, name: str, tensors: Sequence[ir.TensorProtocol]) -> ir.Value:
        """The stacked weights as an input of the engine."""
        dtype, shape = _stacked(name, tensors)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        if "scales" in name:
            value.metadata_props[EXACT] = "1"
        self.model.graph.inputs.append(value)
        return value

    def _constant(self, name: str, tensors: Sequence[ir.TensorProtocol]) -> ir.Value:
        """The stacked weights in the engine."""
        return late_weight(
            self.model, name, *_stacked(name, tensors), lambda: np.stack([stored_numbers(each) for each in tensors])
        )


def _stored(parts: Sequence[ir.Value]) -> tuple[ir.TensorProtocol, ...]:
    return tuple(part.const_value for part in parts if part.const_value is not None)


def _stacked(name: str, tensors: Sequence[ir.TensorProtocol]) -> tuple[ir.DataType, list[int]]:
    """Type and shape of a bank's tensor: int4 two a byte; floats that are no scales get the target's precision later."""
    first = tensors[0]
    shape = [len(tensors), *first.shape.numpy()]
    if first.dtype == ir.DataType.INT4:
        return ir.DataType.INT8, [*shape[:-1], -(-shape[-1] // 2)]
    plain = first.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and "scales" not in name
    return ir.DataType.FLOAT if plain else first.dtype, shape


def stored_numbers(tensor: ir.TensorProtocol | None) -> np.ndarray:
    """A weight as the plugin reads it: floats, float8, int8, or two int4 a byte."""
    assert tensor is not None
    if tensor.dtype == ir.DataType.INT4:
        shape = list(tensor.shape.numpy())
        return np.frombuffer(tensor.tobytes(), np.int8).reshape([*shape[:-1], -1])
    return tensor.numpy()
