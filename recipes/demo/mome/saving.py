"""A trained model as a checkpoint directory that `moiie export` takes (spec mome.md, section 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moiie_export.families.mome import SENTENCE_TOKENIZER
from moiie_export.model.mome.model import MomeModel
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_export.weights import CHECKPOINT
from moiie_recipes.demo.mome.word_lists import BOS, EOS, decoder_tokenizer, sentence_tokenizer
from moiie_recipes.demo.saving import split_tensors, write_json, write_tensors


def save_checkpoint(model: MomeModel, raw: dict[str, Any], directory: Path) -> None:
    """Write config.json, both tokenizers and model.safetensors, the latter in float16."""
    sentence = directory / SENTENCE_TOKENIZER
    sentence.parent.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {**raw, "torch_dtype": "float16"})
    write_json(sentence.with_name("config.json"), raw["sentence_encoder_config"])
    decoder_tokenizer().save(str(directory / "tokenizer.json"), pretty=False)
    sentence_tokenizer().save(str(sentence), pretty=False)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    greedy = {"num_beams": 1, "do_sample": False, "repetition_penalty": 1.0}
    write_json(
        directory / "generation_config.json", {**greedy, **{key: raw[key] for key in raw if key.endswith("_token_id")}}
    )
    weight_map = build_mome_weight_map(model.config, raw["text_config"]["vocab_size"], {CHECKPOINT: ()})
    write_tensors(directory / "model.safetensors", split_tensors(model, weight_map), torch.float16)
