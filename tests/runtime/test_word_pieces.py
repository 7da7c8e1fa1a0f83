from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from moiie_runtime.errors import MoiieError
from moiie_runtime.word_pieces import WordPieces

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this", "##s", "?"]
CLS, SEP = 2, 3


@pytest.fixture
def path(tmp_path):
    """A sentence encoder's tokenizer as it is published: with a truncation and a padding of its own."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_token="[PAD]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_become_word_pieces_between_special_ones(path):
    ids, mask = WordPieces(path, 256)(["  What is\nthis?"])
    assert ids.dtype == mask.dtype == np.int64
    assert ids.tolist() == [[CLS, 4, 5, 6, 8, SEP]]
    assert mask.tolist() == [[1] * 6]


def test_a_batch_is_padded_to_its_longest(path):
    ids, mask = WordPieces(path, 256)(["What?", "", "is this what"])
    assert ids.tolist() == [[CLS, 4, 8, SEP, 0], [CLS, SEP, 0, 0, 0], [CLS, 5, 6, 4, SEP]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1] * 5]


@pytest.mark.parametrize("words", [254, 255, 1000])
def test_long_texts_are_cut_with_their_special_pieces_kept(path, words):
    ids, mask = WordPieces(path, 256)(["what " * words])
    assert ids.shape == (1, 256)
    assert mask.all()
    assert ids[0, 0] == CLS
    assert ids[0, -1] == SEP
    np.testing.assert_array_equal(ids, WordPieces(path, 256)(["what " * 254])[0])


def test_a_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(MoiieError, match=r"missing\.json: cannot be read as a tokenizer"):
        WordPieces(tmp_path / "missing.json", 256)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(MoiieError, match=r"broken\.json: cannot be read as a tokenizer"):
        WordPieces(broken, 256)
