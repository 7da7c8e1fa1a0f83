"""A real byte-level BPE tokenizer of a wanted length, with the special tokens of the golden cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_SPECIAL = {
    "phi3": ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
}
_IDS: dict[str, dict[str, int | None]] = {
    "phi3": {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3},
    "llama": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
}
_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: What is shown in the picture? Describe the red circle beside the blue square. ASSISTANT: "
)
_MOST_MERGES = 200  # what the text gives; longer vocabularies are filled with pieces that no text reaches


def special_ids(backbone: str) -> dict[str, int | None]:
    """bos_token_id, eos_token_id, pad_token_id of a backbone's tokenizer."""
    return dict(_IDS[backbone])


def write_tokenizer(directory: Path, backbone: str, entries: int) -> None:
    """Write tokenizer.json and tokenizer_config.json of exactly `entries` entries, at least 263."""
    special = _SPECIAL[backbone]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(entries, 256 + len(special) + _MOST_MERGES),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    bos = _IDS[backbone]["bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[bos or 0]} $A", special_tokens=[(special[bos or 0], bos or 0)]
    )
    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    for index in range(len(vocabulary), entries):
        vocabulary[f"\u0120\u0120filler{index}"] = index
    if len(vocabulary) != entries:
        raise ValueError(f"expected {entries} entries, the tokenizer has {len(vocabulary)}; ask for at least 263")
    (directory / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    text = json.dumps(_tokenizer_config(backbone, special), indent=1)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer_config(backbone: str, special: tuple[str, ...]) -> dict[str, Any]:
    """As transformers writes it for a bare tokenizer.json."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(index): {"content": token, **plain} for index, token in enumerate(special)},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for key, index in _IDS[backbone].items():
        if index is not None:
            config[key.removesuffix("_id")] = special[index]
    return config
