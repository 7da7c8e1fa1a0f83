"""Checkpoints with random weights in the authors' format (spec moiie.md, section 4 and appendix B), of any size.

Written from the specification and not from the exporter's weight map, so that the two check each other. Values depend on
the seed and on the tensor's name alone, and are streamed in blocks: a checkpoint may be larger than memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moiie_runtime.tensors import TensorWriter
from tests.synthetic_tokenizer import special_ids, write_tokenizer

_BLOCK = 1 << 21  # numbers drawn at once
_TOWER_PREFIX = "model.vision_tower.vision_tower."

_ARCHITECTURES = {
    ("phi3", "dense"): ("bunny-phi3", "BunnyPhi3ForCausalLM"),
    ("phi3", "vanilla"): ("bunny-phi3-moe", "BunnyPhi3MoEForCausalLM"),
    ("phi3", "hard"): ("bunny-phi3-m", "BunnyPhi3MMForCausalLM"),
    ("phi3", "routed"): ("bunny-mm-phi3-moe", "BunnyMMPhi3MoEForCausalLM"),
    ("phi3", "moiie"): ("bunny-mm-phi3-moe-s", "BunnyMMSPhi3MoEForCausalLM"),
    ("llama", "dense"): ("bunny-llama", "BunnyLlamaForCausalLM"),
    ("llama", "vanilla"): ("bunny-llama3-moe", "BunnyLlamaMoEForCausalLM"),
    ("llama", "hard"): ("bunny-llama-m", "BunnyLlamaMMForCausalLM"),
    ("llama", "moiie"): ("bunny-mm-llama3-moe-s", "BunnyMMSLlamaMoEForCausalLM"),
}
"""(backbone, variant) -> model_type and class name (spec, section 3)."""


@dataclass(frozen=True)
class Synthetic:
    """What `write_checkpoint` writes. The defaults make a model that exports in seconds.

    Attributes:
        tower: SigLIP's hidden_size, intermediate_size, layers, heads, image_size, patch_size.
        vision_experts: experts of the vision group; only for the variant `routed`, where `experts` are the language's.
        unfreeze: the tower's weights in the checkpoint count; else those of a directory beside the checkpoint.
        moe_layers: "odd", "all" or a list of layers.
        shard_bytes: tensors are spread over several files when they take more than this.
    """

    hidden: int = 32
    intermediate: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 320
    experts: int = 4
    vision_experts: int = 3
    top_k: int = 2
    backbone: str = "phi3"
    variant: str = "moiie"
    tower: tuple[int, int, int, int, int, int] = (8, 16, 2, 2, 28, 14)
    s2: bool = False
    unfreeze: bool = False
    moe_layers: str | list[int] = "odd"
    sliding_window: int | None = 2047
    shard_bytes: int = 2 << 30
    dtype: str = "BF16"
    seed: int = 0


Tensors = dict[str, tuple[int, ...]]


def write_checkpoint(directory: Path, **settings: Any) -> Path:
    """Write a checkpoint, and its vision tower beside it in vision_tower/; `settings` are the fields of `Synthetic`.

    Returns:
        `directory`.
    """
    model = Synthetic(**settings)
    directory.mkdir(parents=True, exist_ok=True)
    tower = f"vision_tower/siglip-{directory.name}"
    _write_tower(directory.parent / tower, model)
    copies = {_TOWER_PREFIX + name: shape for name, shape in tower_tensors(model.tower).items()}
    _write_tensors(directory, {**decoder_tensors(model), **copies}, model)
    _write_json(directory / "config.json", {**_config(model), "mm_vision_tower": tower})
    write_tokenizer(directory, model.backbone, tokenizer_entries(model))
    _write_json(directory / "generation_config.json", _known_ids(model))
    return directory


def tokenizer_entries(model: Synthetic) -> int:
    """Length of the tokenizer: Phi-3's vocab_size is rounded up, and the loader cuts it again (spec 5.4)."""
    return model.vocab - 16 if model.backbone == "phi3" else model.vocab


def decoder_tensors(model: Synthetic) -> Tensors:
    """Names and shapes of embedding, decoder, head and projector (spec 4.1)."""
    hidden = model.hidden
    tensors: Tensors = {"model.embed_tokens.weight": (model.vocab, hidden)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        tensors |= _attention(model, prefix + "self_attn.")
        tensors |= dict(_feed_forward(model, layer, prefix + "mlp."))
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (model.vocab, hidden)}
    features = model.tower[0] * (3 if model.s2 else 1)
    tensors |= {"model.mm_projector.0.weight": (hidden, features), "model.mm_projector.0.bias": (hidden,)}
    return tensors | {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}


def tower_tensors(tower: tuple[int, int, int, int, int, int]) -> Tensors:
    """Names and shapes of a SigLIP tower with its unused head, as `SiglipVisionModel` saves them (spec 4.1)."""
    hidden, wide, layers, _, side, patch = tower
    tensors: Tensors = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": ((side // patch) ** 2, hidden),
        "post_layernorm.weight": (hidden,),
        "post_layernorm.bias": (hidden,),
        "head.probe": (1, 1, hidden),
        "head.attention.in_proj_weight": (3 * hidden, hidden),
        "head.attention.in_proj_bias": (3 * hidden,),
    }
    linears = {
        "head.attention.out_proj": (hidden, hidden),
        "head.mlp.fc1": (wide, hidden),
        "head.mlp.fc2": (hidden, wide),
    }
    norms = ["head.layernorm"]
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}."
        linears |= {f"{prefix}self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        linears |= {prefix + "mlp.fc1": (wide, hidden), prefix + "mlp.fc2": (hidden, wide)}
        norms += [prefix + "layer_norm1", prefix + "layer_norm2"]
    for name, shape in linears.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        tensors |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {f"vision_model.{name}": shape for name, shape in tensors.items()}


def _attention(model: Synthetic, prefix: str) -> Tensors:
    size = model.hidden // model.heads
    rows = {"q": model.heads * size, "k": model.kv_heads * size, "v": model.kv_heads * size}
    if model.backbone == "phi3":
        tensors: Tensors = {f"{prefix}qkv_proj.weight": (sum(rows.values()), model.hidden)}
    else:
        tensors = {f"{prefix}{name}_proj.weight": (count, model.hidden) for name, count in rows.items()}
    return {**tensors, f"{prefix}o_proj.weight": (model.hidden, model.heads * size)}


def _feed_forward(model: Synthetic, layer: int, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    every = {"odd": range(1, model.layers, 2), "all": range(model.layers)}
    sparse = every[model.moe_layers] if isinstance(model.moe_layers, str) else model.moe_layers
    if model.variant == "dense" or layer not in sparse:
        yield from _mlp(model, prefix)
        return
    reach = int(model.experts / 2 + model.experts / 4)
    gates, experts = {
        "vanilla": ({"gate": model.experts}, [f"experts.{i}" for i in range(model.experts)]),
        "hard": ({}, ["vision_expert", "language_expert"]),
        "routed": (
            {"gate": model.experts, "gate_vis": model.vision_experts},
            [f"vis_experts.{i}" for i in range(model.vision_experts)]
            + [f"lan_experts.{i}" for i in range(model.experts)],
        ),
        "moiie": ({"gate": reach, "gate_vis": reach}, [f"experts.{i}" for i in range(model.experts)]),
    }[model.variant]
    for gate, rows in gates.items():
        yield f"{prefix}{gate}.weight", (rows, model.hidden)
    for expert in experts:
        yield from _mlp(model, f"{prefix}{expert}.")


def _mlp(model: Synthetic, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = model.hidden, model.intermediate
    if model.backbone == "phi3":
        yield f"{prefix}gate_up_proj.weight", (2 * inner, hidden)
    else:
        yield f"{prefix}gate_proj.weight", (inner, hidden)
        yield f"{prefix}up_proj.weight", (inner, hidden)
    yield f"{prefix}down_proj.weight", (hidden, inner)


def _config(model: Synthetic) -> dict[str, Any]:
    """config.json as the authors' classes need it; the router flags stand as their converter writes them (spec, 8.13)."""
    model_type, architecture = _ARCHITECTURES[model.backbone, model.variant]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        **_known_ids(model),
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": 4096 if model.backbone == "phi3" else 8192,
        "mm_hidden_size": model.tower[0] * (3 if model.s2 else 1),
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "moe_enable": False,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0 if model.backbone == "phi3" else 500000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[model.dtype],
        "tune_mm_mlp_adapter": False,
        "unfreeze_vision_tower": model.unfreeze,
        "use_cache": True,
        "use_mm_proj": True,
        "use_s2": model.s2,
        "vocab_size": model.vocab,
    }
    if model.backbone == "phi3":
        config |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096}
        config["sliding_window"] = model.sliding_window
    else:
        config |= {"attention_bias": False, "pretraining_tp": 1}
    if model.s2:
        config["s2_scales"] = ",".join(str(scale * model.tower[4]) for scale in (1, 2, 3))
    if model.moe_layers != "odd":
        config["moe_layers"] = model.moe_layers
    return config | _expert_config(model)


def _known_ids(model: Synthetic) -> dict[str, Any]:
    return {key: value for key, value in special_ids(model.backbone).items() if value is not None}


def _expert_config(model: Synthetic) -> dict[str, Any]:
    if model.variant in ("dense", "hard"):
        return {}
    config: dict[str, Any] = {"num_experts_per_tok": model.top_k, "router_jitter_noise": 0.0}
    if model.variant == "vanilla":
        return config | {"num_experts": model.experts, "output_router_logits": True, "router_aux_loss_coef": 0.001}
    for modality in ("vis", "lan"):
        config |= {f"{modality}_router_aux_loss_coef": 0.001, f"output_{modality}_router_logits": True}
    if model.variant == "routed":
        return config | {"num_vis_experts": model.vision_experts, "num_lan_experts": model.experts}
    return config | {"num_experts": model.experts}


def _write_tower(directory: Path, model: Synthetic) -> None:
    """The separate SigLIP directory; its weights are left out where they do not count, as on a hub snapshot cut short."""
    hidden, wide, layers, heads, side, patch = model.tower
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "image_size": side,
        "intermediate_size": wide,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "patch_size": patch,
    }
    _write_json(directory / "config.json", config)
    half = [0.5, 0.5, 0.5]
    processor = {"image_mean": half, "image_std": half, "resample": 3, "rescale_factor": 1 / 255}
    _write_json(directory / "preprocessor_config.json", {**processor, "size": {"height": side, "width": side}})
    if not model.unfreeze:
        _write_tensors(directory, tower_tensors(model.tower), model)


def _write_tensors(directory: Path, tensors: Tensors, model: Synthetic) -> None:
    """One model.safetensors, or shards with an index when the tensors take more than `shard_bytes`."""
    size = 4 if model.dtype == "F32" else 2
    shards: list[Tensors] = [{}]
    filled = 0
    for name, shape in tensors.items():
        if filled and filled + size * prod(shape) > model.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size * prod(shape)
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", tensors, model)
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, model)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(size * prod(shape) for shape in tensors.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_shard(path: Path, tensors: Tensors, model: Synthetic) -> None:
    specs = {name: (model.dtype, shape) for name, shape in tensors.items()}
    with TensorWriter(path, specs, {"format": "pt"}) as writer:
        for name, shape in tensors.items():
            for block in _values(name, shape, model.seed):
                writer.write_elements(_stored(block, model.dtype), name)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Flat float32 blocks: matrices scaled by 1/sqrt(fan-in) so that activations keep their size, norms around 1."""
    mean, scale = 0.0, 1.3 / np.sqrt(max(1, prod(shape[1:])))
    if "gate." in name or "gate_vis." in name:
        scale *= 3  # decisive routers
    elif "embed_tokens" in name or "position_embedding" in name:
        scale = 0.8
    elif len(shape) == 1:
        mean, scale = (1.0 if "norm" in name and name.endswith("weight") else 0.0), 0.2
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    count = prod(shape)
    for start in range(0, count, _BLOCK):
        block = random.standard_normal(min(_BLOCK, count - start), np.float32)
        block *= np.float32(scale)
        block += np.float32(mean)
        yield block


def _stored(block: np.ndarray, dtype: str) -> np.ndarray:
    """float32 in the dtype of the file; bfloat16 as its bits, rounded to nearest even."""
    if dtype != "BF16":
        return block.astype({"F32": np.float32, "F16": np.float16}[dtype])
    bits = block.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
