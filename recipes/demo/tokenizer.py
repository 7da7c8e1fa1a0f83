"""The demo model's tokenizer: byte-level BPE whose merges make every word of the questions one token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moiie_export.prompts import LLAMA3
from moiie_recipes.demo.questions import NUMBERS
from moiie_recipes.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def build_tokenizer() -> Tokenizer:
    """A tokenizer in LLaMA-3's manner, with BOS in front."""
    return byte_level_bpe(_corpus(), BOS, EOS)


def byte_level_bpe(corpus: list[str], bos: str, eos: str) -> Tokenizer:
    """A byte-level BPE, so that any text has tokens, whose merges make every word of the corpus one token; bos in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[bos, eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def save_tokenizer(directory: Path) -> Tokenizer:
    """Write tokenizer.json into a directory; returns the tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    return tokenizer


def _corpus() -> list[str]:
    words = [*SHAPES, "crosses", *(f"{shape}s" for shape in SHAPES), *COLOURS, *ROWS, *COLUMNS, *NUMBERS]
    questions = (
        "\nWhat colour shape is the thing?\nWhere\nHow many things are there?\nIs left of the above?\nAre and same"
    )
    return [LLAMA3.system + "USER: ", f"{questions}?ASSISTANT: yes no", *(f" {word}" for word in words)]
