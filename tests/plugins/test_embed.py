"""The launch table as lines of words."""

from __future__ import annotations

from typing import Any

import pytest

from moiie_plugins.embed import table_text

TABLE: dict[str, Any] = {
    "source": "abc",
    "plans": [
        {
            "op": "Op",
            "dtype": "float16",
            "weights": "",
            "aligned": None,
            "min_routes": 0,
            "max_routes": -1,
            "symbols": [{"name": "blocks", "terms": ["routes", ""], "factors": [1, 127], "divisor": 128}],
            "workspace": [{"name": "act", "dims": ["blocks", "I"], "bytes": 4}],
            "launches": [{"kernel": "first.float16", "grid": [["blocks", 1], ["I", "BLOCK_N"], ["", 1]]}],
        }
    ],
    "kernels": {
        "first.float16": {
            "entry": "first",
            "oldest_sm": 0,
            "parameters": [["hidden", "pointer"], ["T", "int32"], ["", "null"]],
            "images": [
                {
                    "sm": 86,
                    "kind": "cubin",
                    "offset": 0,
                    "size": 9,
                    "num_warps": 4,
                    "shared": 5,
                    "blocks": {"BLOCK_N": 8},
                },
                {"sm": 86, "kind": "ptx", "offset": 64, "size": 7, "num_warps": 4, "shared": 5, "blocks": {}},
            ],
        }
    },
}

TEXT = """source abc
plan Op float16 - either 0 -1
symbol blocks 128 routes 1 - 127
buffer act 4 blocks I
launch first.float16 blocks 1 I BLOCK_N - 1
kernel first.float16 first 0
parameter hidden pointer
parameter T int32
parameter - null
image 86 cubin 0 9 4 5 BLOCK_N 8
image 86 ptx 64 7 4 5
"""


def test_lines() -> None:
    assert table_text(TABLE) == TEXT


@pytest.mark.parametrize("name", ["two words", "line\nbreak", "-"])
def test_a_name_that_is_no_word(name: str) -> None:
    with pytest.raises(ValueError, match="is no word of a launch table"):
        table_text({**TABLE, "source": name})
