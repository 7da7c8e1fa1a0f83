from __future__ import annotations

import pytest

from moiie_runtime.errors import MoiieError
from moiie_runtime.sizes import parse_size, readable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5", 5),
        ("8GiB", 8 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5kib", 1536),
        (" 2 gb ", 2 * 10**9),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 GiBs", "8XB", "1e9", "0", 0, -1, True, 1.5, None, "9" * 30])
def test_what_is_no_size(text):
    with pytest.raises(MoiieError, match="a memory size must be"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (12.4, "12 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**40, "5120.0 GiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert readable(size) == text


@pytest.mark.parametrize("unit", ["KiB", "MiB", "GiB"])
def test_what_people_read_can_be_written_back(unit):
    assert readable(parse_size(f"2.5{unit}")) == f"2.5 {unit}"
