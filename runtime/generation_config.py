"""`GenerationConfig`: how tokens are chosen and when to stop. Field names and meanings are those of transformers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import show


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of one generation.

    Attributes:
        max_new_tokens: tokens to generate at most, the end token included.
        do_sample: draw at random; otherwise the most likely token is taken.
        temperature: divides the logits before drawing; 0 takes the most likely token.
        top_k: draw only from this many most likely tokens; 0 is off.
        top_p: draw only from the most likely tokens whose probabilities reach this sum; 1 is off.
        repetition_penalty: logits of tokens that were used already are divided by it (multiplied when negative); 1 is
            off. It also acts when nothing is drawn; with beams it acts on log-probabilities. The bundle says what
            counts as used at the start: the text of the prompt, the start token, or nothing.
        num_beams: beams of beam search; 1 is off. All beams of a request share its prefill.
        length_penalty: with beams, the sum of an answer's log-probabilities is divided by its number of tokens to this
            power: above 0 favours long answers, below 0 short ones.
        eos_token_id: ids that end the answer.
        stop_strings: texts that end the answer; they are not part of the text that is returned.
        seed: makes draws repeatable; every row of a batch starts from it, so that it equals the row alone.

    Raises:
        MoiieError: a value of the wrong type or out of range, by name.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_int("max_new_tokens", self.max_new_tokens, 1)
        _require_int("top_k", self.top_k, 0)
        _require_int("num_beams", self.num_beams, 1)
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
        if not isinstance(self.do_sample, bool):
            raise _bad("do_sample", "true or false", self.do_sample)
        # Beyond these bounds float32 logits overflow.
        if isinstance(self.temperature, bool) or self.temperature != 0:
            _require_number("temperature", self.temperature, 1e-3, 1e6, "0 or ")
        _require_number("top_p", self.top_p, 1e-6, 1)
        _require_number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _require_number("length_penalty", self.length_penalty, -10, 10)
        object.__setattr__(self, "eos_token_id", _as_tuple("eos_token_id", self.eos_token_id, int))
        object.__setattr__(self, "stop_strings", _as_tuple("stop_strings", self.stop_strings, str))
        if self.num_beams > 1 and not self.greedy:
            raise MoiieError(
                f"generation settings num_beams={self.num_beams} and do_sample=True exclude each other: "
                "beam search draws nothing",
                "to draw (temperature, top_k, top_p), set num_beams=1; to search, set do_sample=False",
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: the most likely token is taken at every step, or beams are searched."""
        return not self.do_sample or self.temperature == 0

    def updated(self, changes: Mapping[str, Any]) -> GenerationConfig:
        """These settings with some of them changed by the caller; None leaves one as it is.

        A temperature above 0, `top_k` or `top_p` only mean something when tokens are drawn: giving one without
        `do_sample` turns `do_sample` on, as the authors' scripts do (spec 5.5).

        Raises:
            MoiieError: an unknown name, a bad value, one of the three together with `do_sample=False`, drawing
                together with beams, or a `length_penalty` without beams.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
                raise MoiieError(f"unknown generation setting {name!r}", hint)
        given = {name: value for name, value in changes.items() if value is not None}
        result = replace(self, **given)
        drawing = [name for name, off in _DRAWING.items() if given.get(name, off) != off]
        if drawing and "do_sample" not in given:
            return replace(result, do_sample=True)
        if drawing and not result.do_sample:
            raise MoiieError(
                f"generation setting {drawing[0]}={given[drawing[0]]} has no effect with do_sample=False",
                "leave one of the two out",
            )
        if given.get("length_penalty", 1) != 1 and result.num_beams == 1:
            raise MoiieError(
                f"generation setting length_penalty={given['length_penalty']} has no effect with num_beams=1",
                "set num_beams to 2 or more, or leave length_penalty out",
            )
        return result


SETTINGS = tuple(f.name for f in fields(GenerationConfig) if f.name not in ("eos_token_id", "stop_strings"))
"""Names of the settings that are one plain value: what a bundle's defaults and a command line can hold."""

# Settings that only act on draws, with the value that asks for none.
_DRAWING = {"temperature": 0, "top_k": 0, "top_p": 1}


def _bad(name: str, expected: str, value: object) -> MoiieError:
    return MoiieError(f"generation setting {name} must be {expected}, got {show(value)}")


def _require_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _bad(name, f"an integer of at least {minimum}", value)


def _require_number(name: str, value: object, low: float, high: float, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _bad(name, f"{also}a number from {low:g} to {high:g}", value)


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """One value or a sequence of them; ids are not negative, strings not empty."""
    values = (value,) if isinstance(value, (int, str)) else value
    expected = "ids of at least 0" if kind is int else "strings that are not empty"
    if not isinstance(values, (list, tuple)):
        raise _bad(name, f"a list of {expected}", value)
    for item in values:
        sound = isinstance(item, kind) and not isinstance(item, bool)
        if not sound or (item < 0 if kind is int else not item):
            raise _bad(name, f"a list of {expected}", value)
    return tuple(values)
