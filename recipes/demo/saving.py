"""Models to and from directories in the authors' checkpoint format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moiie_export.model.vlm import VlmModel
from moiie_export.weight_map import build_weight_map
from moiie_export.weights import CHECKPOINT, WeightMap
from moiie_recipes.demo.architecture import PREPROCESSOR, TOWER, TOWER_NAME, model_config
from moiie_recipes.demo.tokenizer import BOS, EOS, save_tokenizer
from moiie_runtime.tensor_writer import TensorWriter

_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def new_model(raw: dict[str, Any], seed: int) -> VlmModel:
    """A model with fresh weights: normal with a deviation of fan_in ** -0.5, residual outputs smaller."""
    torch.manual_seed(seed)
    model = VlmModel(model_config(raw))
    depth = (2 * len(model.decoder.layers)) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name and "patch" not in name:
            nn.init.normal_(parameter, std=0.3 if "position" in name else 0.1)
        else:
            residual = name.endswith(
                ("o_proj.weight", "down_proj.weight", "down_proj", "out_proj.weight", "fc2.weight")
            )
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 * (depth if residual else 1.0))
    init_projector(model)
    return model


def init_projector(model: VlmModel) -> None:
    """Fresh projector weights, such that image rows enter the decoder no larger than text and its layers can change them."""
    linears = [module for module in model.vision_encoder.projector if isinstance(module, nn.Linear)]
    for linear in linears:
        last = linear is linears[-1]
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5 * (0.05 if last else 1.0))
        nn.init.zeros_(linear.bias)


def save_checkpoint(model: VlmModel, raw: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write config.json, tokenizer and model.safetensors; the tower's config goes beside the directory.

    The last layer of the tower and its final norm, which no model of this kind ever reaches, are written as zeros:
    the authors' loader wants them there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    raw = {**raw, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", raw)
    save_tokenizer(directory)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    write_json(directory / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": raw["tokenizer_model_max_length"]}
    write_json(directory / "tokenizer_config.json", {**settings, **special, "padding_side": "right"})
    tower = directory.parent / TOWER_NAME
    tower.mkdir(exist_ok=True)
    write_json(tower / "config.json", TOWER)
    write_json(tower / "preprocessor_config.json", PREPROCESSOR)
    weight_map = build_weight_map(model.config, raw["vocab_size"], {CHECKPOINT: ()})
    write_tensors(directory / "model.safetensors", split_tensors(model, weight_map) | _unreached(raw), dtype)


def split_tensors(model: nn.Module, weight_map: WeightMap) -> dict[str, torch.Tensor]:
    """The model's parameters under a checkpoint's names: the weight map read backwards."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for weight in weight_map.weights:
        stacked = torch.cat([parameters[name].detach().reshape(-1) for name in weight.parameters()])
        start = 0
        for part in weight.parts:
            count = torch.Size(part.shape).numel()
            tensors[part.tensor] = stacked[start : start + count].view(part.shape)
            start += count
    return dict(sorted(tensors.items()))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file in float16 or float32, under another name until it is whole."""
    name = {torch.float16: "F16", torch.float32: "F32"}[dtype]
    specs = {key: (name, tuple(tensor.shape)) for key, tensor in tensors.items()}
    temporary = path.with_name(f"{path.name}.tmp")
    with TensorWriter(temporary, specs, {"format": "pt"}) as file:
        for key, tensor in tensors.items():
            file.write(tensor.detach().to(dtype).contiguous().numpy(), key)
    temporary.replace(path)


def _unreached(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    size, wide, last = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["num_hidden_layers"] - 1
    layer = f"encoder.layers.{last}."
    shapes = {f"{layer}layer_norm1": (size,), f"{layer}layer_norm2": (size,), "post_layernorm": (size,)}
    shapes |= {f"{layer}self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
    shapes |= {f"{layer}mlp.fc1": (wide, size), f"{layer}mlp.fc2": (size, wide)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{_TOWER_PREFIX}{name}.weight"] = torch.zeros(shape)
        tensors[f"{_TOWER_PREFIX}{name}.bias"] = torch.zeros(shape[0])
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small JSON file whose bytes depend on its content alone."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
