from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moiie_runtime.errors import MoiieError
from moiie_runtime.manifest import Tokens
from moiie_runtime.tokenizer import Tokenizer

TOKENS = Tokens(bos=1, eos=(3,), pad=3, image_marker="<image>", image_placeholder=-200, image_tokens=729)


def golden_tokenizer(golden) -> Tokenizer:
    ids = golden.about["special_ids"]
    return Tokenizer(
        golden.checkpoint / "tokenizer.json", Tokens(ids["bos"], (ids["eos"],), ids["pad"], "<image>", -200, 729)
    )


def test_golden_prompts_give_the_authors_ids(golden):
    prompt = (golden.path / "inputs" / "prompt.txt").read_text(encoding="utf-8")
    found = golden_tokenizer(golden).encode(prompt)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, golden.expected["input_ids"])


def test_golden_answers_decode_to_the_authors_text(golden):
    tokenizer, text = golden_tokenizer(golden), golden.about["generation"]["text"]
    ids = golden.expected["generated_ids"].tolist()
    assert tokenizer.decode(ids) == text
    stream = tokenizer.detokenizer()
    assert "".join(stream.push(token) for token in ids) + stream.finish() == text


def test_bos_is_kept_once_and_chunks_are_encoded_apart(golden):
    tokenizer, about = golden_tokenizer(golden), golden.about
    bos = [about["special_ids"]["bos"]] if about["tokenizer_adds_bos"] else []
    a, b, empty = (tokenizer.encode(text).tolist() for text in ("Describe", "\nit", ""))
    assert empty == bos
    assert a[: len(bos)] == bos
    body = [a[len(bos) :], b[len(bos) :]]
    assert tokenizer.encode("Describe<image>\nit").tolist() == [*bos, *body[0], -200, *body[1]]
    assert tokenizer.encode("<image>").tolist() == [*bos, -200]
    assert tokenizer.encode("<image><image>Describe").tolist() == [*bos, -200, -200, *body[0]]


def test_a_separator_parts_the_text_and_leaves_no_token(golden):
    plain = golden_tokenizer(golden)
    tokenizer = Tokenizer(golden.checkpoint / "tokenizer.json", plain._tokens, separator="\x1e")
    parts = [plain.encode(text).tolist() for text in ("Describe", " it", "", "now")]
    bos = plain.encode("").tolist()
    bodies = [part[len(bos) :] for part in parts]
    assert tokenizer.encode("Describe\x1e it").tolist() == [*bos, *bodies[0], *bodies[1]]
    assert tokenizer.encode("\x1eDescribe\x1e\x1e<image>\x1enow").tolist() == [*bos, *bodies[0], -200, *bodies[3]]
    assert tokenizer.encode("\x1e").tolist() == bos
    np.testing.assert_array_equal(tokenizer.encode("Describe it"), plain.encode("Describe it"))


def test_truncation_and_padding_in_the_file_are_ignored(golden, tmp_path):
    raw = tokenizers.Tokenizer.from_file(str(golden.checkpoint / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "a prompt of more than four tokens"
    expected = golden_tokenizer(golden).encode(text)
    np.testing.assert_array_equal(Tokenizer(tmp_path / "tokenizer.json", TOKENS).encode(text), expected)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(MoiieError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", TOKENS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MoiieError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", TOKENS)


def byte_level() -> tokenizers.Tokenizer:
    """Every byte is a token (ids in an order of their own), as in GPT-2; id 256 is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def sentence_piece() -> tokenizers.Tokenizer:
    """LLaMA's decoder: byte tokens, pieces with a mark for the space, one leading space stripped; the last is special."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "ing", "é", "a", "▁▁"]
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def any_tokenizer(request, tmp_path_factory) -> tuple[Tokenizer, int]:
    raw = request.param()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return Tokenizer(path, TOKENS), raw.get_vocab_size()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_pieces_are_the_whole_text_and_never_cut_a_character(any_tokenizer, data):
    tokenizer, size = any_tokenizer
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=30))  # two ids are not in the vocabulary
    stream = tokenizer.detokenizer()
    pieces = [stream.push(token) for token in ids]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + stream.finish() == whole
    for end, _ in enumerate(pieces):
        assert whole.startswith("".join(pieces[: end + 1]))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12).filter(lambda text: "\N{REPLACEMENT CHARACTER}" not in text))
def test_text_given_byte_by_byte_comes_out_in_whole_characters(any_tokenizer, text):
    tokenizer, _ = any_tokenizer
    raw = tokenizer._tokenizer
    names = [f"<0x{byte:02X}>" for byte in text.encode()]
    if raw.token_to_id("<0x00>") is None:  # byte level: printable stand-ins for bytes
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        names = [character for piece, _ in split for character in piece]
    stream = tokenizer.detokenizer()
    pieces = [stream.push(raw.token_to_id(name)) for name in names] + [stream.finish()]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode([raw.token_to_id(name) for name in names])
