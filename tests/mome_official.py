"""The authors' names for MoME's weights -> parameters of the PyTorch reference, module by module (spec mome.md, 7).

Small and separate from `moiie convert` on purpose: golden numbers must not depend on the code that converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from moiie_export.dino_positions import resize_positions

State = dict[str, torch.Tensor]


def read(path: Path) -> State:
    """A safetensors file in float32; bfloat16 holds these values without loss."""
    return {name: value.float() for name, value in load_file(path).items()}


def under(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fill(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Every parameter of a module, and nothing else."""
    module.load_state_dict(dict(state), strict=True, assign=True)
    module.eval().requires_grad_(False)


def _renamed(state: State, names: Mapping[str, str]) -> State:
    renamed = {}
    for name, value in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


_VIT = {"blocks.": "layers.", ".attn.proj.": ".attention.output.", ".attn.": ".attention.", "patch_embed.proj": "PATCH"}


def eva(state: State) -> State:
    """EvaTower."""
    state = dict(state)
    for name in [name for name in state if name.endswith(".q_bias")]:
        query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    fixed = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    return _renamed(state, {**_VIT, **fixed, "PATCH": "embeddings.patch_embedding"})


def dino(state: State, grid: int) -> State:
    """DinoTower with positions for `grid`."""
    state = {name: value for name, value in state.items() if name != "mask_token"}
    state["pos_embed"] = torch.from_numpy(resize_positions(state["pos_embed"].numpy(), grid))
    state = {("layernorm" + name[4:] if name.startswith("norm.") else name): value for name, value in state.items()}
    fixed = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    scales = {".ls1.gamma": ".layer_scale1", ".ls2.gamma": ".layer_scale2"}
    return _renamed(state, {**_VIT, **fixed, **scales, "PATCH": "embeddings.patch_projection"})


def _fuse(state: State, parts: tuple[str, ...], fused: str) -> State:
    """Concatenate tensors that differ in one piece of their name along the first axis."""
    out = {name: value for name, value in state.items() if not any(part in name for part in parts)}
    for name in state:
        if parts[0] in name:
            out[name.replace(parts[0], fused)] = torch.cat([state[name.replace(parts[0], part)] for part in parts])
    return out


def pix2struct(state: State) -> State:
    """Pix2StructTower."""
    state = _fuse(state, (".query.", ".key.", ".value."), ".qkv.")
    return _renamed(_fuse(state, (".wi_0.", ".wi_1."), ".wi."), {"encoder.layer.": "layers."})


def adt(state: State) -> State:
    """Adt."""
    return _fuse(state, (".q_proj.", ".k_proj."), ".qk_proj.")


def sentence(state: State) -> State:
    """SentenceEncoder from BertModel's names."""
    kept = {name: v for name, v in state.items() if not name.startswith("pooler.") and "position_ids" not in name}
    kept = _fuse(kept, (".self.query.", ".self.key.", ".self.value."), ".qkv.")
    return _renamed(
        kept,
        {
            "encoder.layer.": "layers.",
            "embeddings.LayerNorm": "embeddings.norm",
            "attention.output.LayerNorm": "norm1",
            "output.LayerNorm": "norm2",
            "attention.output.dense": "attention.output",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
    )


def decoder(state: State) -> State:
    """Decoder, from LLaMA's names; adapters are not its parameters."""
    kept = {name.removeprefix("model."): value for name, value in state.items() if ".adapter." not in name}
    kept.pop("embed_tokens.weight")
    kept = _fuse(kept, (".q_proj.", ".k_proj.", ".v_proj."), ".qkv_proj.")
    return _fuse(kept, (".gate_proj.", ".up_proj."), ".gate_up_proj.")


def mole(state: State, layers: tuple[int, ...], experts: int) -> State:
    """Mole: the adapters of each layer stacked."""
    out = {}
    for layer in layers:
        banks = [under(state, f"model.layers.{layer}.mlp.adapter.adapters.{k}.") for k in range(experts)]
        for leaf in banks[0]:
            stacked = torch.stack([bank[leaf] for bank in banks])
            out[f"{layer}.{leaf}"] = stacked.reshape(-1) if leaf == "scale" else stacked
    return out


def mlp(state: State, prefix: str) -> State:
    """Mlp, from a sequence whose layers are numbered 0 and 2."""
    return _renamed(under(state, prefix), {"0.": "fc1.", "2.": "fc2."})


def mole_routers(state: State, layers: tuple[int, ...]) -> State:
    """MoleRouters: the routers of all layers stacked."""
    each = [mlp(state, f"model.layers.{layer}.mlp.adapter.router_mlp.") for layer in layers]
    return {leaf: torch.stack([router[leaf] for router in each]) for leaf in each[0]}
