"""One component: PyTorch module on the meta device -> onnx-ir model with bare `moiie` nodes and no weights."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn

from moiie_export.graph.components import Component, Tensor
from moiie_export.graph.deepen import cut, deepen, find_stack
from moiie_export.graph.translation import translation_table
from moiie_export.ops.op import OPSET

_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64}


def trace(component: Component, model: nn.Module) -> ir.Model:
    """Trace one component.

    Args:
        component: what to trace.
        model: the model on the meta device; no weight is ever allocated.

    Returns:
        A model whose inputs, outputs and dynamic dimensions carry the component's names, probes included as outputs.
        Initialisers are named like the model's parameters and have no data yet.
    """
    module = component.module(model).eval()
    stack = find_stack(module, component)
    if stack is not None:
        with cut(module, stack):
            short = component.of_depth(stack.traced) if component.of_depth else component
            traced = _trace(short, module)
        if deepen(traced, stack, component):
            _set_types(traced, component)
            return traced
    return _trace(component, module)


def _trace(component: Component, module: nn.Module) -> ir.Model:
    """Trace all of a module."""
    arguments = component.arrange([component.example(tensor) for tensor in component.inputs])
    dimensions = {
        dim: torch.export.Dim(dim, min=1) for tensor in component.inputs for dim in tensor.dims if isinstance(dim, str)
    }
    shapes = component.arrange(
        [{i: dimensions[d] for i, d in enumerate(t.dims) if isinstance(d, str)} for t in component.inputs]
    )
    results = (*component.outputs, *component.probes)
    with _quiet_exporter(), _no_collection(), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            input_names=[tensor.name for tensor in component.inputs],
            output_names=[tensor.name for tensor in results],
        )
    if onnx_program is None:  # pragma: no cover - the signature allows it, dynamo=True never does it
        raise RuntimeError("torch.onnx.export returned nothing")
    ir_model = onnx_program.model
    _set_types(ir_model, component)
    return ir_model


def _set_types(model: ir.Model, component: Component) -> None:
    """Write our dtypes and dimension names on inputs and outputs; the exporter's are s0, s1, ..."""
    wanted: dict[str, Tensor] = {t.name: t for t in (*component.inputs, *component.outputs, *component.probes)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        tensor = wanted[str(value.name)]
        value.shape = ir.Shape(tensor.dims)
        value.dtype = _DTYPES[tensor.dtype]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tracing makes millions of small objects that live to its end; looking for garbage among them takes a sixth of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs missing torchvision ops and warns of its own deprecations; neither concerns the caller."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
