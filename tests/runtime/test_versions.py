from __future__ import annotations

import pytest

from moiie_runtime.versions import version_numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("580.65.06", (580, 65, 6)), ("v1.7.1rc2", (1, 7, 1, 2)), ("", ()), ("none", ()), ("8²", (8,))],
)
def test_numbers_in_order(text: str, numbers: tuple[int, ...]) -> None:
    assert version_numbers(text) == numbers


def test_more_digits_than_python_reads_are_no_error() -> None:
    assert version_numbers("9" * 5000)
