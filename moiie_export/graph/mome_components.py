"""The graphs of a MoME bundle: the instance router, one graph for each vision expert, and the decoder."""

from __future__ import annotations

import torch
from torch import nn

from moiie_export.graph.components import Component, Dims, Tensor
from moiie_export.graph.decoder_components import AdapterLayers, decoder_components
from moiie_export.model.mome.model import MomeModel
from moiie_export.model.mome.router import Router
from moiie_export.mome_config import MomeConfig, Pix2StructConfig, VisionExpert


class _Router(nn.Module):
    def __init__(self, model: MomeModel) -> None:
        super().__init__()
        self.router: Router = model.router

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.router(input_ids, attention_mask)
        return (
            found.move_weights,
            found.mole_index,
            found.sentence_embedding,
            found.move_logits,
            found.mole_logits,
        )


class _Vision(nn.Module):
    """Holds an expert under its own name, so that parameters keep the model's names."""

    def __init__(self, model: MomeModel, name: str) -> None:
        super().__init__()
        self.add_module(name, model.get_submodule(name))
        self._name = name

    @property
    def expert(self) -> nn.Module:
        return self.get_submodule(self._name)


class _OfPixels(_Vision):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.expert(pixel_values)
        return found


class _OfPatches(_Vision):
    def forward(
        self, flattened_patches: torch.Tensor, pool_matrix: torch.Tensor, grid_size: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.expert(flattened_patches, pool_matrix, grid_size)
        return found


def components(config: MomeConfig, capacity: int) -> tuple[Component, ...]:
    """All graphs; `capacity`: tokens the key-value buffers hold, fixed in the graphs."""
    adapters = AdapterLayers(config.mole.layers, config.mole.bottleneck)
    experts = (_vision(config, expert) for expert in config.experts)
    return (_router(config), *experts, *decoder_components(config, capacity, adapters))


def _router(config: MomeConfig) -> Component:
    layers, experts = len(config.mole.layers), len(config.experts)
    dims: Dims = ("texts", "words")
    return Component(
        "router",
        _Router,
        (Tensor("input_ids", torch.int64, dims), Tensor("attention_mask", torch.int64, dims)),
        (
            Tensor("move_weights", torch.float32, ("texts", experts)),
            Tensor("mole_index", torch.int32, ("texts", layers)),
        ),
        (
            Tensor("sentence_embedding", torch.float32, ("texts", config.sentence.hidden_size)),
            Tensor("move_logits", torch.float32, ("texts", experts)),
            Tensor("mole_logits", torch.float32, ("texts", layers, config.mole.num_experts)),
        ),
        tuple,
        layers="router.sentence_encoder.layers",
    )


def _vision(config: MomeConfig, expert: VisionExpert) -> Component:
    tower, queries = expert.tower, config.queries
    width = tower.hidden_size
    inputs: tuple[Tensor, ...]
    patches: int | str
    module: type[_Vision]
    if isinstance(tower, Pix2StructConfig):
        module, patches, values = _OfPatches, "patches", 2 + 3 * tower.patch_size**2
        inputs = (
            Tensor("flattened_patches", torch.float32, ("images", patches, values)),
            Tensor("pool_matrix", torch.float32, ("images", queries, patches)),
            Tensor("grid_size", torch.float32, ("images", 2)),
        )
    else:
        module, patches, side = _OfPixels, tower.grid**2, tower.image_size
        inputs = (Tensor("pixel_values", torch.float32, ("images", 3, side, side)),)
    rows = queries if expert.adt is not None else queries + 1
    probes = [Tensor("vision_features", torch.float32, ("images", patches if expert.adt else rows, width))]
    if expert.adt is not None:
        probes += [Tensor(name, torch.float32, ("images", queries, width)) for name in ("pooled", "refined")]
    return Component(
        expert.component,
        lambda model: module(model, expert.component),
        inputs,
        (Tensor("image_features", torch.float32, ("images", rows, config.text.hidden_size)),),
        tuple(probes),
        tuple,
        layers=f"{expert.component}.tower.layers",
    )
