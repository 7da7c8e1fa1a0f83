"""The reference model run layer by layer: only one part of it holds weights at a time, so that any size fits.

All prompts go through a layer before the next one is loaded; between layers only their activations are kept.
Shapes: T tokens of a prompt, H hidden, K inputs and N outputs of a linear layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moiie_export.model.layers import Adapter, rotary_angles
from moiie_export.model.load import Reader, checkpoint_reader, empty_model, fill
from moiie_export.model.moe import MoeBlock, Routing
from moiie_export.source import ModelSource

Array = NDArray[Any]


class Watcher(Protocol):
    """Sees what goes through the model."""

    def linear(
        self, parameter: str, inputs: torch.Tensor, outputs: torch.Tensor, is_vision: torch.Tensor | None
    ) -> None:
        """A linear layer's inputs [n, K] and outputs [n, N]; is_vision [n], None outside the decoder."""

    def routed(self, layer: int, routing: Routing, is_vision: torch.Tensor) -> None:
        """Where a layer's tokens [T] went."""

    def hidden(self, layer: int, rows: torch.Tensor, is_vision: torch.Tensor) -> None:
        """The residual stream [T, H] behind a layer."""


@dataclass(frozen=True)
class Row:
    """One prompt as the decoder takes it.

    Attributes:
        embeds: [T, H] float32.
        modality: [T] int32, 1 = vision.
        kept: positions whose logits are wanted.
        adapters: [L] the adapter of each layer that has some; None in a family without.
    """

    embeds: Array
    modality: Array
    kept: Array
    adapters: Array | None = None


@dataclass
class RowResult:
    """What the decoder made of a prompt: logits [kept, V], and expert ids [T, k] by layer."""

    logits: Array
    expert_ids: dict[int, Array] = field(default_factory=dict)


class LayerByLayer:
    """A model whose parts are filled only while they are used.

    Args:
        source: the checkpoint.
        read: where weights come from; None for the checkpoint itself.

    Attributes:
        source: the checkpoint.
        model: the family's, on the meta device but for the part in use.
    """

    def __init__(self, source: ModelSource, read: Reader | None = None) -> None:
        self.source = source
        self.model: Any = empty_model(source)
        self._read = read or checkpoint_reader(source)

    @contextmanager
    def loaded(self, name: str, watcher: Watcher | None = None) -> Iterator[Any]:
        """The submodule of a name with its weights, which are given up again in the end.

        Args:
            name: as in `get_submodule`.
            watcher: sees its linear layers; not its experts, which `decode` shows.
        """
        module = self.model.get_submodule(name)
        prefix = f"{name}."
        weights = [
            weight
            for weight in self.source.weight_map.weights
            if all(each.startswith(prefix) for each in weight.parameters())
        ]
        fill(module, weights, self._read, prefix)
        hooks = [] if watcher is None else _hooks(module, prefix, _outside(watcher))
        try:
            yield module
        finally:
            for hook in hooks:
                hook.remove()
            module.to("meta")

    @torch.inference_mode()
    def embed(self, ids: Sequence[Array]) -> list[Array]:
        """Rows [n, H] of the embedding table for each list of token ids."""
        with self.loaded("embed_tokens") as table:
            return [table(torch.from_numpy(np.asarray(each, np.int64))).numpy().copy() for each in ids]

    @torch.inference_mode()
    def decode(
        self, rows: Sequence[Row], watcher: Watcher | None = None, advance: Callable[[int, int], None] | None = None
    ) -> list[RowResult]:
        """Every prompt through the whole decoder.

        Args:
            rows: the prompts; each starts with an empty cache.
            watcher: sees every layer; the head is shown the language tokens, the only ones that are answered.
            advance: called with steps done and steps in all.
        """
        layers = len(self.model.decoder.layers)
        streams = [torch.from_numpy(np.ascontiguousarray(row.embeds, np.float32)) for row in rows]
        results = [RowResult(np.empty((0, 0), np.float32)) for _ in rows]
        for index in range(layers):
            with self.loaded(f"decoder.layers.{index}") as layer, self._adapters(index) as bank:
                for number, row in enumerate(rows):
                    is_vision = torch.from_numpy(row.modality == 1)
                    with _watched(layer, index, watcher, is_vision):
                        streams[number], routing = self._layer(layer, streams[number], row, bank)
                    if routing is not None:
                        results[number].expert_ids[index] = routing.expert_ids.numpy()
                    if watcher is not None:
                        _tell(watcher, index, routing, streams[number], is_vision)
                    if advance is not None:
                        advance(index * len(rows) + number + 1, (layers + 1) * len(rows))
        self._head(rows, streams, results, watcher)
        if advance is not None:
            advance((layers + 1) * len(rows), (layers + 1) * len(rows))
        return results

    def _layer(
        self, layer: Any, stream: torch.Tensor, row: Row, bank: tuple[int, Any] | None
    ) -> tuple[torch.Tensor, Routing | None]:
        """One prompt through one layer."""
        decoder, text = self.model.decoder, self.source.config.text
        positions = torch.arange(len(stream)).unsqueeze(0)
        angles = rotary_angles(positions, decoder.head_dim, decoder.rope_theta, decoder.rotary_table)
        past = [torch.zeros(1, text.num_key_value_heads, len(stream), text.head_dim) for _ in range(2)]
        adapter: Adapter | None = None
        if bank is not None and row.adapters is not None:
            column, module = bank
            adapter = module.choose(torch.tensor([int(row.adapters[column])]))
        modality = torch.from_numpy(np.asarray(row.modality, np.int32))
        stream, _, routing, _ = layer(stream, modality, angles, (past[0], past[1]), positions, adapter)
        return stream, routing

    @contextmanager
    def _adapters(self, layer: int) -> Iterator[tuple[int, Any] | None]:
        """A layer's adapters and their number among the layers that have some; None where it has none."""
        banks = list(getattr(self.model, "mole", ()))
        if str(layer) not in banks:
            yield None
            return
        with self.loaded(f"mole.{layer}") as bank:
            yield banks.index(str(layer)), bank

    def _head(
        self,
        rows: Sequence[Row],
        streams: Sequence[torch.Tensor],
        results: Sequence[RowResult],
        watcher: Watcher | None,
    ) -> None:
        with self.loaded("decoder.norm") as norm, self.loaded("decoder.lm_head") as head:
            for row, stream, result in zip(rows, streams, results, strict=True):
                normed = norm(stream)
                result.logits = head(normed[torch.from_numpy(np.asarray(row.kept, np.int64))]).numpy()
                if watcher is not None:
                    inputs = normed[torch.from_numpy(row.modality != 1)]
                    nothing = torch.zeros(len(inputs), dtype=torch.bool)
                    watcher.linear("decoder.lm_head.weight", inputs, head(inputs), nothing)


Seen = Callable[[str, torch.Tensor, torch.Tensor], None]


def _hooks(module: nn.Module, prefix: str, seen: Seen) -> list[Any]:
    """Show the inputs and outputs of every linear layer as rows."""

    def hook(parameter: str) -> Callable[..., None]:
        def show(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen(parameter, inputs[0].reshape(-1, inputs[0].shape[-1]), output.reshape(-1, output.shape[-1]))

        return show

    linears = {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}
    return [
        each.register_forward_hook(hook(f"{prefix}{name}.weight" if name else f"{prefix}weight"))
        for name, each in linears.items()
    ]


def _outside(watcher: Watcher) -> Seen:
    return lambda parameter, inputs, outputs: watcher.linear(parameter, inputs, outputs, None)


@contextmanager
def _watched(layer: nn.Module, index: int, watcher: Watcher | None, is_vision: torch.Tensor) -> Iterator[None]:
    """While open, the watcher sees a decoder layer's linear layers and experts."""
    if watcher is None:
        yield
        return
    prefix, block = f"decoder.layers.{index}.", getattr(layer, "mlp", None)

    def seen(parameter: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        watcher.linear(parameter, inputs, outputs, is_vision)

    def expert(number: int, name: str, rows: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        watcher.linear(f"{prefix}mlp.experts.{number}.{name}", inputs, outputs, is_vision[rows])

    hooks = _hooks(layer, prefix, seen)
    try:
        if isinstance(block, MoeBlock):
            block.watch = expert
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(block, MoeBlock):
            block.watch = None


def _tell(watcher: Watcher, index: int, routing: Routing | None, stream: torch.Tensor, is_vision: torch.Tensor) -> None:
    if routing is not None:
        watcher.routed(index, routing, is_vision)
    watcher.hidden(index, stream, is_vision)
