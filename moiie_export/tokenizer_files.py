"""The checkpoint's tokenizer as one tokenizer.json that behaves as the authors' loader does (spec moiie.md, 5.3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moiie_runtime.errors import MissingDependency, MoiieError

_HINT = (
    "copy tokenizer.json from the base model, or write it with transformers:"
    " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    A LLaMA-style tokenizer takes its begin-of-text rule from `add_bos_token` in tokenizer_config.json, whatever
    tokenizer.json says: that is what the library the authors use does, and snapshots of Phi-3 differ in it.

    Raises:
        MoiieError: no tokenizer, or one that cannot be read.
    """
    path = directory / "tokenizer.json"
    tokenizer = _read(path) if path.is_file() else _convert(directory)
    settings = read_tokenizer_config(directory)
    add_bos = settings.get("add_bos_token")
    if settings.get("add_eos_token"):
        raise MoiieError(
            f"{directory / 'tokenizer_config.json'}: add_eos_token: true is not implemented",
            "it would put an end token behind every piece of a prompt; the authors' tokenizers do not",
        )
    if str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer") and isinstance(add_bos, bool):
        _set_bos(tokenizer, _token(settings.get("bos_token", "<s>")), add_bos)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json as a dict; empty when there is none."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MoiieError(f"{path}: not readable as JSON: {error}", _HINT) from error
    if not isinstance(value, dict):
        raise MoiieError(f"{path}: expected a JSON object", _HINT)
    return value


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise MoiieError(f"{path}: not a tokenizer: {error}", _HINT) from error


def _convert(directory: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(
            f"{directory}: no tokenizer.json, and converting another format needs transformers",
            "pip install 'moiie-export[export]'",
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(str(directory), use_fast=True, local_files_only=True)
        return Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # every library underneath raises its own kind
        raise MoiieError(
            f"{directory}: no tokenizer.json, and no other tokenizer that converts to one", _HINT
        ) from error


def _token(value: Any) -> str:
    """A special token is written as a string or as an object with `content`."""
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _set_bos(tokenizer: Tokenizer, bos: str, add: bool) -> None:
    if not add:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        return
    bos_id = tokenizer.token_to_id(bos)
    if bos_id is None:
        raise MoiieError(f"tokenizer_config.json: bos_token {bos!r} is not in the vocabulary", _HINT)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
