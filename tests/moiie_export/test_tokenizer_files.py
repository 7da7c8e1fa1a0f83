"""The checkpoint's tokenizer against transformers, the golden ids, and the begin-of-text rule of LLaMA's class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from moiie_export.tokenizer_files import load_tokenizer, read_tokenizer_config
from moiie_runtime.errors import MoiieError

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[..., Any]
TEXTS = ["A chat between", "\nWhat is it?", "", " two  spaces ", "naïve 日本 🙂", "<|endoftext|> inside", "<s>x</s>"]


def join(chunks: list[list[int]], bos: int | None) -> list[int]:
    """Spec 5.3: one BOS in front when the first chunk begins with it, none elsewhere, -200 between chunks."""
    has_bos = bool(chunks[0]) and chunks[0][0] == bos
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, -200, *(chunk[1:] if has_bos else chunk)]
    return ids


def test_prompts_give_the_golden_ids_chunk_by_chunk(golden: Any) -> None:
    tokenizer = load_tokenizer(golden.checkpoint)
    prompt = (golden.path / "inputs" / "prompt.txt").read_bytes().decode()
    chunks = [tokenizer.encode(chunk).ids for chunk in prompt.split("<image>")]
    assert join(chunks, golden.about["special_ids"]["bos"]) == golden.expected["input_ids"].tolist()
    assert (tokenizer.encode("").ids != []) is golden.about["tokenizer_adds_bos"]


# AutoTokenizer reads config.json as well, whose keys are those of the transformers of its day.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_ids_are_those_of_transformers(golden: Any) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(golden.checkpoint), local_files_only=True)
    ours = load_tokenizer(golden.checkpoint)
    prompt = (golden.path / "inputs" / "prompt.txt").read_bytes().decode()
    for text in (*prompt.split("<image>"), *TEXTS):
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.get_vocab_size(with_added_tokens=True) == len(theirs)


def write_settings(directory: Path, **settings: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("case", ["moiie_phi3", "moiie_phi3_s2"])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
def test_llamas_class_takes_its_bos_rule_from_its_settings(
    golden_copy: Copy, case: str, kind: str, add: bool, bos: Any
) -> None:
    """Whatever tokenizer.json says: one of these two cases adds the token by itself, the other does not."""
    directory = golden_copy(case).checkpoint
    plain = Tokenizer.from_file(str(directory / "tokenizer.json")).encode("hello", add_special_tokens=False).ids
    write_settings(directory, tokenizer_class=kind, add_bos_token=add, bos_token=bos)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("hello").ids == ([1, *plain] if add else plain)
    assert tokenizer.encode("").ids == ([1] if add else [])
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.encode("hello").ids == tokenizer.encode("hello").ids


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": None},
    ],
)
def test_otherwise_tokenizer_json_decides(golden_copy: Copy, settings: dict[str, Any]) -> None:
    for case, adds in (("moiie_phi3", True), ("moiie_phi3_s2", False)):
        directory = golden_copy(case, case).checkpoint
        write_settings(directory, **settings)
        assert (load_tokenizer(directory).encode("").ids == [1]) is adds


def test_a_bos_token_that_is_not_in_the_vocabulary_is_refused(golden_copy: Copy) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    write_settings(directory, tokenizer_class="LlamaTokenizer", add_bos_token=True, bos_token="<bos>")
    with pytest.raises(MoiieError, match="bos_token '<bos>' is not in the vocabulary"):
        load_tokenizer(directory)


def test_padding_and_truncation_of_the_file_are_switched_off(golden_copy: Copy) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = tokenizer.encode("A chat between a curious user").ids
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).encode("A chat between a curious user").ids == expected


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 5}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_tokenizer_is_refused(golden_copy: Copy, content: bytes) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(MoiieError, match=r"tokenizer.json: not a tokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_refused(golden_copy: Copy, content: bytes) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    (directory / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(MoiieError, match=r"tokenizer_config.json"):
        load_tokenizer(directory)


def test_settings_may_be_missing(golden_copy: Copy) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    (directory / "tokenizer_config.json").unlink()
    assert read_tokenizer_config(directory) == {}
    assert load_tokenizer(directory).get_vocab_size() == 352


def test_no_tokenizer_at_all_is_refused(golden_copy: Copy) -> None:
    directory = golden_copy("moiie_phi3").checkpoint
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    with pytest.raises(MoiieError, match="no tokenizer.json"):
        load_tokenizer(directory)
