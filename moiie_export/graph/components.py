"""What a graph of a bundle is: what is traced, with which names, shapes and example inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Dims = tuple[int | str, ...]
"""Strings are dynamic dimensions, integers are fixed in the graph."""

_EXAMPLE = {"images": 2, "patches": 12, "batch": 2, "sequence": 6, "kept": 3, "texts": 2, "words": 5, "adapters": 2}
"""Sizes used while tracing; all above 1, because torch specialises on 0 and 1."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: torch.dtype
    dims: Dims


@dataclass(frozen=True)
class Component:
    """One graph.

    Attributes:
        name: its name in the bundle; its file is onnx/<name>.onnx.
        module: makes the traced module from the family's model (on the meta device).
        inputs: in the order of the module's flattened arguments.
        outputs: names in the order of the module's flattened results.
        probes: outputs that exist only while tracing, so that parity can find their values by name.
        arrange: turns the flat list of inputs into the module's arguments.
        layers: path of the list of layers in the traced module, most of them alike; empty: there is none.
        of_depth: makes the same component for so many layers; None: its inputs and outputs do not depend on them.
    """

    name: str
    module: Callable[[Any], nn.Module]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    probes: tuple[Tensor, ...]
    arrange: Callable[[list[Any]], tuple[Any, ...]]
    layers: str = ""
    of_depth: Callable[[int], Component] | None = None

    @property
    def file(self) -> str:
        """Path inside the bundle."""
        return f"onnx/{self.name}.onnx"

    def example(self, tensor: Tensor) -> torch.Tensor:
        """A tensor without data, for tracing."""
        shape = [_EXAMPLE[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
