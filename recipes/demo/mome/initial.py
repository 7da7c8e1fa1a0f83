"""A MoME with fresh weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from moiie_export.model.mome.adt import Adt, DeformableAttention
from moiie_export.model.mome.model import MomeModel
from moiie_export.model.mome.pix2struct import Pix2StructTower
from moiie_export.mome_config import MomeConfig

_RESIDUAL = ("o_proj.weight", "decoder_down", "attention.output.weight", "mlp.fc2.weight", "mlp.wo.weight")
_ZERO = ("adt.layers.0.self_attn.out_proj.weight", "encoder_attn.output_proj.weight", "adt.layers.0.fc2.weight")
"""As the authors begin: each layer of an ADT is then nothing but its norms (spec mome.md, 1.1)."""


def new_model(config: MomeConfig, seed: int) -> MomeModel:
    """A model whose matrices are normal with a deviation of fan_in ** -0.5, smaller where they end a residual branch."""
    torch.manual_seed(seed)
    model = MomeModel(config)
    depth = (2 * config.text.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[1]
        if "bias" in leaf:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif "embed" in name and "patch" not in name.rsplit(".", 2)[1]:
            nn.init.normal_(parameter, std=0.1 if name.startswith("embed_tokens") else 0.3)
        else:
            residual = name.endswith(_RESIDUAL)
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 * (depth if residual else 1.0))
        if name.endswith(_ZERO):
            nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, Adt):
            _init_adt(module, config.query_grid)
        elif isinstance(module, Pix2StructTower):
            for layer in module.layers:  # its scores are not divided by the root of the head's width
                layer.attention.qkv.weight.data[: 2 * module.layernorm.weight.numel()] *= 0.5
    _init_routers(model)
    for expert in config.experts:
        projector = model.get_submodule(f"{expert.component}.projector")
        nn.init.normal_(projector.weight, std=0.15 * expert.tower.hidden_size**-0.5)
    return model


def _init_adt(adt: Adt, grid: tuple[int, int]) -> None:
    """Queries look at the middle of their own cell, and around it in the star of Deformable DETR."""
    rows, columns = grid
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    adt.reference_points.data.copy_(torch.stack((x, y), dim=-1).view(1, -1, 2))
    nn.init.zeros_(adt.position_embeddings)
    for module in adt.modules():
        if isinstance(module, DeformableAttention):
            angles = torch.arange(module.heads) * (2 * math.pi / module.heads)
            star = torch.stack((angles.cos(), angles.sin()), dim=-1)
            star = star / star.abs().max(dim=-1, keepdim=True).values
            reach = torch.arange(1, module.points + 1).view(1, -1, 1)
            nn.init.zeros_(module.sampling_offsets.weight)
            module.sampling_offsets.bias.data.copy_((star.unsqueeze(1) * reach).flatten())
            nn.init.zeros_(module.attention_weights.weight)


def _init_routers(model: MomeModel) -> None:
    """Wide inside, since a sentence embedding has length 1; nearly even outside. Adapters begin by adding nothing."""
    move, mole = model.router.move, model.router.mole
    nn.init.normal_(move.fc1.weight, std=1.0)
    nn.init.normal_(move.fc2.weight, std=0.01)
    nn.init.normal_(mole.fc1.weight, std=1.0)
    nn.init.normal_(mole.fc2.weight, std=0.2)
    for bank in model.mole.values():
        nn.init.zeros_(bank.up_proj.weight)


def replicate_adapters(model: MomeModel) -> None:
    """Stage 2 begins with the one adapter of stage 1 in every place (spec mome.md, 1.3)."""
    for bank in model.mole.values():
        for parameter in bank.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
