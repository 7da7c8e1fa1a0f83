"""The model's two tokenizers: of the decoder, and of the sentence encoder that the router reads."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moiie_recipes.demo.mome.letters import LETTERS
from moiie_recipes.demo.questions import NUMBERS
from moiie_recipes.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES

BOS, EOS = "<s>", "</s>"
PREFIX, SUFFIX, ASSISTANT = "USER: <Img>", "</Img>", " ASSISTANT: "
"""What stands before the picture, behind it, and behind the question; each piece is tokenised apart (spec mome.md, 3)."""

_PLURALS = tuple("crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES)
_FRAMES = "What colour shape Where Which letter How many is are the thing things in on there"


def decoder_tokenizer() -> Tokenizer:
    """Byte-level BPE, so that any text has tokens, whose merges make every word of the questions one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [*SHAPES, *_PLURALS, *COLOURS, *ROWS, *COLUMNS, *NUMBERS, *LETTERS]
    frames = _FRAMES.split()
    corpus = [PREFIX, SUFFIX, f"?{ASSISTANT}", *words, *frames, *(f" {word}" for word in [*words, *frames])]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


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
