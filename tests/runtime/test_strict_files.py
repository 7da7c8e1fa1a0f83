"""Files from outside: refused with the file's name and the reason, never read without a limit."""

import contextlib
import hashlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import open_regular, parse_json_object, quote, read_json_object, sha256_file, show


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'"text"', "found a string"),
        (b"null", "found null"),
        (b"true", "found a boolean"),
        (b"3", "found a number"),
        (b'{"a": 1, "a": 1}', "key 'a' appears twice"),
        (b'{"o": {"a": 1, "a": 2}}', "key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 101 + b"}", "a number of 101 digits"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        ("{}".encode("utf-16"), "can't decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1} x', "Extra data"),
    ],
)
def test_json_that_is_not_one_plain_object_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(MoiieError) as caught:
        parse_json_object(raw, "dir/config.json", "fetch it again")
    assert caught.value.message.startswith("dir/config.json: ")
    assert reason in caught.value.message
    assert caught.value.hint == "fetch it again"


def test_json_keeps_ordinary_values() -> None:
    big = 1000000000000000019884624838656  # what tokenizers write for "no limit"
    assert parse_json_object(f'{{"a": [1.5, {big}, null, "é"]}}'.encode(), "x") == {"a": [1.5, big, None, "é"]}


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(raw: bytes) -> None:
    with contextlib.suppress(MoiieError):
        assert isinstance(parse_json_object(raw, "x"), dict)


def test_a_json_file_over_its_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json_object(path, 8) == {"a": 1}
    with pytest.raises(MoiieError, match="expected at most 7 bytes"):
        read_json_object(path, 7)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="found a directory"):
        open_regular(tmp_path)
    with pytest.raises(MoiieError, match="no such file"):
        open_regular(tmp_path / "none")
    (tmp_path / "dangling").symlink_to("none")
    with pytest.raises(MoiieError, match="a link to a file that does not exist"):
        open_regular(tmp_path / "dangling")
    with pytest.raises(MoiieError, match="cannot be opened"):
        open_regular(tmp_path / "nul\0")


def test_a_pipe_or_socket_is_refused_instead_of_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is limited to about 100 bytes
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(MoiieError, match="neither a file nor a link to one"):
                open_regular(Path(name))


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_files_around_the_block_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "f"
    path.write_bytes(data[:size])
    assert sha256_file(path) == hashlib.sha256(data[:size]).hexdigest()


def test_names_are_quoted_and_shortened_for_messages() -> None:
    assert quote("a\nb\ud800") == r"'a\nb\ud800'"
    assert len(quote("x" * 10_000)) < 130
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert show(nested) == "a deeply nested value"
    while nested:  # freed from the outside in: no deep recursion at the end of the test
        nested = nested[0]  # type: ignore[assignment]
