"""The two tokenizers of a conversion: the language model's and the sentence encoder's, both needed as tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from moiie_export.mome_config import MomeConfig
from moiie_export.tokenizer_files import load_tokenizer
from moiie_runtime.errors import MoiieError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SLOW = "tokenizer.model"


def check_tokenizers(vicuna: Path, sentence: Path, config: MomeConfig) -> None:
    """Refuse directories whose tokenizer the export could not use.

    Raises:
        MoiieError: no tokenizer.json, a damaged one, or one with more entries than the embedding has rows.
    """
    for directory, rows, given in (
        (vicuna, config.text.vocab_size, "--vicuna"),
        (sentence, config.sentence.vocab_size, "--sentence"),
    ):
        _check_present(directory, given)
        entries = load_tokenizer(directory).get_vocab_size(with_added_tokens=True)
        if entries > rows:
            raise MoiieError(
                f"{directory}: the tokenizer has {entries} entries, the embedding only {rows} rows",
                "the tokenizer belongs to another model: copy the one the weights were trained with",
            )


def _check_present(directory: Path, given: str) -> None:
    if (directory / "tokenizer.json").is_file():
        return
    if (directory / _SLOW).is_file():
        raise MoiieError(
            f"{directory}: no tokenizer.json, only {_SLOW}, which needs a conversion",
            'write it once with transformers and sentencepiece installed: python -c "from transformers import'
            f" AutoTokenizer; AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')\"",
        )
    raise MoiieError(f"{directory}: no tokenizer.json", f"{given} is the model's directory with its tokenizer in it")
