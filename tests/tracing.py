"""Tracing takes most of the time of an export: here it takes less, and graphs of one structure are traced once."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest

EXPORTER = "torch.onnx._internal.exporter._registration"
_KNOWN: dict[str, Any] = {}


def trace_quickly() -> None:
    """Let PyTorch make its tables of functions once a process, not once a graph, and keep no diary.

    That is a third of what a small graph takes. Nothing happens before the exporter is imported, or where it has other names.
    """
    exporter, utils = sys.modules.get(EXPORTER), sys.modules.get("torch._export.utils")
    with suppress(AttributeError):
        registry = exporter.ONNXRegistry  # type: ignore[union-attr]
        if not hasattr(registry.from_torchlib, "__wrapped__"):
            registry.from_torchlib = staticmethod(_copying(registry.from_torchlib))
        if not hasattr(utils._materialize_cpp_cia_ops, "__wrapped__"):  # type: ignore[union-attr]
            utils._materialize_cpp_cia_ops = cache(utils._materialize_cpp_cia_ops)  # type: ignore[union-attr]
    diary = logging.getLogger("torch.__trace")  # written as soon as anybody listens, and pytest does
    diary.handlers.clear()
    diary.addHandler = lambda _: None  # type: ignore[method-assign]


def _copying(make: Any) -> Any:
    """`make` called once for an opset; each caller gets a registry of its own, to which it adds functions."""
    made = cache(make)

    def from_torchlib(*arguments: Any, **named: Any) -> Any:
        known = made(*arguments, **named)
        copy = type(known)()
        vars(copy).update(vars(known), functions={name: list(found) for name, found in known.functions.items()})
        return copy

    from_torchlib.__wrapped__ = make  # type: ignore[attr-defined]
    return from_torchlib


@contextmanager
def traced_once() -> Iterator[None]:
    """Graphs that are exported within are traced once a process for modules that are alike but for their weights.

    For bundles that tests work on; not for tests of exporting.
    """
    from moiie_export.graph import trace as module

    real = module.trace

    def trace(component: Any, model: Any) -> Any:
        key = _structure(component, model)
        if key not in _KNOWN:
            _KNOWN[key] = real(component, model)
        return _KNOWN[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", trace)
        yield


def _structure(component: Any, model: Any) -> str:
    """All that tracing can see of a component: its tensors, its modules, and what they were made with."""
    import numpy as np
    import torch

    def said(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = (value.shape, value.dtype) if value.is_meta else value.detach().numpy()
        return (value.shape, value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else value

    everywhere = {*vars(torch.nn.Module())}
    parts = [repr((component.name, component.inputs, component.outputs, component.probes))]
    for name, module in component.module(model).named_modules():
        own = {key: said(value) for key, value in vars(module).items() if key not in everywhere}
        tensors = [(key, said(each)) for key, each in (*module._parameters.items(), *module._buffers.items())]
        parts.append(repr((name, type(module).__qualname__, own, tensors)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
