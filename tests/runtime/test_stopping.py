from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiie_runtime.stopping import StopFilter

TEXT = st.text(alphabet="ab< ", max_size=20)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), max_size=3)


def run(pieces, stops=(), trailing=""):
    stream = StopFilter(stops, trailing)
    shown = [stream.push(piece) for piece in pieces]
    return [*shown, stream.finish()], stream.stopped


@pytest.mark.parametrize(
    ("pieces", "shown", "stopped"),
    [
        (["Hel", "lo"], ["Hel", "lo", ""], False),
        (["one ST", "OP two"], ["one ", "", ""], True),
        (["one S", "T", "x"], ["one ", "", "STx", ""], False),
        (["a ST"], ["a ", "ST"], False),
        (["STOP"], ["", ""], True),
        (["x STOP", "more"], ["x ", "", ""], True),
    ],
)
def test_stop_strings_across_pieces(pieces, shown, stopped):
    assert run(pieces, ["STOP"]) == (shown, stopped)


def test_the_trailing_string_goes_only_at_the_end():
    assert run(["A<e", "nd>"], trailing="<end>") == (["A", "", ""], False)
    assert "".join(run(["A<end>", " B"], trailing="<end>")[0]) == "A<end> B"
    assert "".join(run(["A<en"], trailing="<end>")[0]) == "A<en"


def test_leading_space_is_dropped_and_inner_space_is_not():
    assert run([" ", "\n a", " b "])[0] == ["", "a", " b ", ""]


@given(text=TEXT, stops=STOPS, trailing=st.sampled_from(["", "<b", "ab"]), data=st.data())
def test_the_result_does_not_depend_on_how_the_text_is_cut(text, stops, trailing, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, stopped = run(list(text), stops, trailing)
    assert ("".join(run(pieces, stops, trailing)[0]), run(pieces, stops, trailing)[1]) == ("".join(whole), stopped)
    assert stopped == any(stop in text for stop in stops)
    ends = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if ends is None:
        assert "".join(whole) == text.removesuffix(trailing).lstrip()
    else:
        assert text[:ends].lstrip().startswith("".join(whole))
        assert not any(stop in "".join(whole) for stop in stops)
