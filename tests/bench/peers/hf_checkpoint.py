"""The same weights under the names of transformers' Llama and Mixtral, which PyTorch and GenAI's builder read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_GATE = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")
_LEAVES = {"gate": "w1", "down": "w2", "up": "w3"}
_OTHER = ("model.vision_tower.", "model.mm_projector.")
_SHARED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
)


def hf_name(name: str) -> str | None:
    """A tensor's name in transformers' checkpoints; None for what a language model has not."""
    if name.startswith(_OTHER):
        return None
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.block_sparse_moe.experts.{match[2]}.{_LEAVES[match[3]]}.weight"
    match = _GATE.fullmatch(name)
    return f"{match[1]}.block_sparse_moe.gate.weight" if match else name


def hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the same model for transformers."""
    experts = config.get("num_experts", 0)
    made = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    made |= {"tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32", "sliding_window": None}
    if not experts:
        return made | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    made |= {"num_local_experts": experts, "num_experts_per_tok": config["num_experts_per_tok"]}
    return made | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def write_hf(checkpoint: Path, folder: Path) -> Path:
    """`folder`/hf, unless it is there already."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    target = folder / "hf"
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(checkpoint / "model.safetensors", framework="np") as file:
        names = {new: name for name in file.keys() if (new := hf_name(name))}  # noqa: SIM118 - no mapping
        tensors = {new: file.get_tensor(name) for new, name in names.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, target / name)
    config = hf_config(json.loads((checkpoint / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return target
