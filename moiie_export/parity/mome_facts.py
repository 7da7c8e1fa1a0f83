"""What a MoME bundle's manifest must say: how each encoder's input is made, the router, the adapters (spec mome.md, 2, 3)."""

from __future__ import annotations

from typing import Any

from moiie_export.mome_config import MomeConfig, Pix2StructConfig, VisionExpert

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def mome_facts(config: MomeConfig) -> dict[str, dict[str, Any]]:
    """Section -> dotted key in bundle.json -> value."""
    facts = {
        f"{expert.name} preprocessing": _expert(config, expert, f"vision_experts.{index}.")
        for index, expert in enumerate(config.experts)
    }
    facts["instance router"] = {
        "instance_router.component": "router",
        "instance_router.max_length": config.sentence.max_length,
    }
    facts["adapters"] = {
        "adapters.layers": list(config.mole.layers),
        "adapters.num_experts": config.mole.num_experts,
    }
    facts["prompt pieces"] = {"prompt.separator": config.prompt.separator}
    facts["penalty"] = {"generation.penalty_prompt": "bos"}
    return facts


def _expert(config: MomeConfig, expert: VisionExpert, prefix: str) -> dict[str, Any]:
    tower = expert.tower
    rows, columns = config.query_grid
    leads = expert.adt is None  # the one without an ADT brings its class token
    facts: dict[str, Any] = {"name": expert.name, "tokens": rows * columns + leads, "cls": leads}
    if isinstance(tower, Pix2StructConfig):
        own = {"kind": "patches", "patch_size": tower.patch_size, "max_patches": tower.max_patches}
        own |= {"query_grid": [rows, columns], "positions": tower.seq_len}
    else:
        own = {"kind": "squash", "image_size": tower.image_size, "mean": CLIP_MEAN, "std": CLIP_STD}
        own |= {"rescale_factor": 1 / 255, "resample": "bicubic"}
    facts |= {f"processor.{key}": value for key, value in own.items()}
    return {f"{prefix}{key}": value for key, value in facts.items()}
