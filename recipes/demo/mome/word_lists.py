"""The model's two tokenizers: of the decoder, and of the sentence encoder that the router reads."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moiie_recipes.demo.mome.letters import LETTERS
from moiie_recipes.demo.questions import NUMBERS
from moiie_recipes.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES
from moiie_recipes.demo.tokenizer import byte_level_bpe

BOS, EOS = "<s>", "</s>"
PREFIX, SUFFIX, ASSISTANT = "USER: <Img>", "</Img>", " ASSISTANT: "
"""What stands before the picture, behind it, and behind the question; each piece is tokenised apart (spec mome.md, 3)."""

_PLURALS = tuple("crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES)
_FRAMES = "What colour shape Where Which letter How many is are the thing things in on there"


def decoder_tokenizer() -> Tokenizer:
    """The decoder's, with every word of the questions as one token, at the beginning of a piece or within it."""
    words = [*SHAPES, *_PLURALS, *COLOURS, *ROWS, *COLUMNS, *NUMBERS, *LETTERS, *_FRAMES.split()]
    return byte_level_bpe([PREFIX, SUFFIX, f"?{ASSISTANT}", *words, *(f" {word}" for word in words)], BOS, EOS)


def sentence_tokenizer() -> Tokenizer:
    """WordPiece in BERT's manner: every word of the questions is one piece, any other is spelt."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*_FRAMES.split(), *SHAPES, *_PLURALS, *COLOURS, *ROWS, *COLUMNS, *NUMBERS]
    signs = [*string.ascii_lowercase, *string.digits]
    pieces = [*words, *signs, *(f"##{sign}" for sign in signs), *string.punctuation]
    unique = dict.fromkeys([*special, *(piece.lower() for piece in pieces)])
    vocabulary = {piece: index for index, piece in enumerate(unique)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 (no password)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer
