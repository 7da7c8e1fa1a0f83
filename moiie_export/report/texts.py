"""The answers of both sides, and the first token where they part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

from moiie_export.report.document import Document
from moiie_export.report.html import join, tag
from moiie_export.report.numbers import counted, short
from moiie_export.report.section import Section
from moiie_export.report.table import folded, status_badge, table

_NOTHING = "(nothing)"


def section(document: Document) -> Section | None:
    """Each case's answers; None where nothing was answered."""
    cards = [_card(case, case["text"]) for case in document.cases if "text" in case]
    if not cards:
        return None
    lead = tag(
        "p",
        "The bundle’s runtime answers alone: its own prompt, pixels, cache and tokens, always taking the most likely one. "
        "From the first other token on, the two texts are marked.",
        class_="lead",
    )
    return Section("answers", "Answers", join([lead, tag("div", cards, class_="answers")]))


def _card(case: Mapping[str, Any], text: Mapping[str, Any]) -> Markup:
    pictures = f"{counted(case['images'], 'picture')}, " if case.get("images") else ""
    return tag(
        "article",
        tag("h3", case["name"], " ", _verdict(text)),
        tag(
            "p",
            tag("span", "asked", class_="key"),
            " ",
            tag("q", case["question"], dir="auto"),
            f" ({pictures}{counted(case['positions'], 'position')})",
        ),
        _parting(text),
        tag(
            "div",
            _answer("PyTorch", text["reference_text"], text),
            _answer("bundle", text["bundle_text"], text),
            class_="pair",
        ),
        folded("The tokens", _tokens(case["name"], text)),
    )


def _verdict(text: Mapping[str, Any]) -> Markup:
    if text["diverges"] is None:
        return status_badge("ok", f"same {counted(len(text['reference_ids']), 'token')}")
    if text["near"]:
        return status_badge("near", f"near tie at token {text['diverges']}")
    return status_badge("FAIL", f"differs at token {text['diverges']}")


def _parting(text: Mapping[str, Any]) -> Markup | None:
    """Where the two part, token by token; None where they do not."""
    at = text["diverges"]
    if at is None:
        return None
    sides = [(text["reference_token"], text["reference_ids"]), (text["bundle_token"], text["bundle_ids"])]
    ours, theirs = (_token(token, ids[at] if at < len(ids) else None) for token, ids in sides)
    gap = text["gap"]
    preferred = None if gap is None else f" PyTorch prefers its own by {short(gap)} in the logits."
    return tag("p", f"First other token, number {at}: PyTorch ", ours, ", bundle ", theirs, ".", preferred)


def _token(token: str | None, number: int | None) -> Markup:
    if token is None:
        return tag("em", "has ended")
    shown = tag("code", token) if token else tag("em", "a token without text")
    return join([shown, f" (id {number})"])


def _answer(side: str, text: str, answers: Mapping[str, Any]) -> Markup:
    """One side's text with everything from the first other token on marked."""
    shared = answers["shared_text"]
    if answers["diverges"] is None:
        shared = text
    elif not text.startswith(shared):  # the decoder joins the tokens behind differently
        shared = ""
    other = text[len(shared) :]
    parts = [shared, tag("mark", other, class_="near" if answers["near"] else None) if other else None]
    shown = tag("blockquote", parts, dir="auto") if text else tag("blockquote", tag("em", _NOTHING))
    return tag("div", tag("span", side, class_="key"), shown)


def _tokens(case: str, text: Mapping[str, Any]) -> Markup:
    pairs = zip_longest(text["reference_ids"], text["bundle_ids"])
    rows = [
        [index, ours, theirs, "same" if ours == theirs else "another"] for index, (ours, theirs) in enumerate(pairs)
    ]
    return table(f"{case}: token ids", ["token", "PyTorch", "bundle", ""], rows)
