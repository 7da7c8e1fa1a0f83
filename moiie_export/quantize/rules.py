"""Recipe rules against a model's weights: what becomes of each one, and every mistake at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from moiie_export.model_config import ModelConfig
from moiie_export.quantize.banks import BANKS, EXPERTS, NEVER, PLAIN_ONLY, bank_of
from moiie_export.quantize.methods import CALIBRATED
from moiie_export.quantize.scheme import GROUP_SIZES, GROUPED, WEIGHT_ONLY, Scheme
from moiie_export.recipe_quantization import (
    DEFAULT_GROUP,
    DEFAULT_METHOD,
    EXPERTS_ADVICE,
    QuantizationSection,
    QuantRule,
)
from moiie_export.weights import Shape, Weight, WeightMap
from moiie_runtime.errors import Unsound

_NEAREST = 3


@dataclass(frozen=True)
class Form:
    """How a tensor is stored: `format` is float32 or float16, or that of `scheme`, made by `method`."""

    format: str
    scheme: Scheme | None = None
    method: str | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it takes statistics of the inputs."""
        return self.method in CALIBRATED or self.format == "w8a8"


@dataclass(frozen=True)
class Resolved:
    """The outcome of rules.

    Attributes:
        weight_map: the model's, stacks taken apart whose experts are stored differently.
        forms: weight -> how it is stored.
    """

    weight_map: WeightMap
    forms: Mapping[str, Form]

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Weight -> scheme, of the quantised ones."""
        return {name: each.scheme for name, each in self.forms.items() if each.scheme is not None}

    @cached_property
    def calibrated(self) -> dict[str, str]:
        """Model parameter -> method, of what takes statistics of its inputs."""
        return {
            name: form.method or ""
            for weight in self.weight_map.weights
            for name in weight.parameters()
            if (form := self.forms[weight.name]).calibrated
        }


@dataclass(frozen=True)
class _Candidate:
    """A parameter that a rule may match."""

    name: str
    weight: Weight
    shape: Shape
    bank: str

    @property
    def matrix(self) -> bool:
        """Whether a linear layer or an expert multiplies with it; only that is quantised."""
        kept = self.weight.keep_float32 or self.bank in (*NEVER, *PLAIN_ONLY)
        return not kept and len(self.shape) == 2

    def usable(self, rule: QuantRule) -> bool:
        return not self.weight.keep_float32 if rule.plain else self.matrix


def resolve(section: QuantizationSection, dtype: str, weight_map: WeightMap, config: ModelConfig) -> Resolved:
    """What becomes of every weight.

    Args:
        section: the rules.
        dtype: float32 or float16, of weights that no rule matches.
        weight_map: the model's weights.
        config: tells which expert is in which bank.

    Raises:
        Unsound: listing every rule that matches nothing, only what is never quantised, only what earlier rules took,
            rows that its group does not divide, or experts for a format that has no kernel for them.
    """
    groups = None if config.moe is None else {str(name): ids for name, ids in config.moe.expert_groups.items()}
    candidates = [
        _Candidate(name, weight, shape, bank_of(name, groups))
        for weight in weight_map.weights
        for name, (_, shape) in weight.parameters().items()
    ]
    chosen: dict[str, Form] = {}
    problems: list[str] = []
    for index, rule in enumerate(section.rules):
        problems += [f"quantization.rules[{index}]: {each}" for each in _apply(rule, candidates, chosen)]
    if problems:
        hint = "`moiie recipe show default` explains the rules; --dry-run checks them and writes nothing"
        raise Unsound("\n".join(problems), hint)
    weights: list[Weight] = []
    forms: dict[str, Form] = {}
    for weight in weight_map.weights:
        kept = Form("float32" if weight.keep_float32 else dtype)
        stored = {name: chosen.get(name, kept) for name in weight.parameters()}
        alike = len(set(stored.values())) == 1
        for each in [weight] if alike else experts_apart(weight):
            weights.append(each)
            forms[each.name] = next(iter(stored.values())) if alike else stored[each.name]
    return Resolved(replace(weight_map, weights=tuple(weights)), forms)


def _apply(rule: QuantRule, candidates: list[_Candidate], chosen: dict[str, Form]) -> Iterator[str]:
    """Give what the rule matches its form; yields what is wrong with the rule."""
    scheme = None
    if not rule.plain:
        scheme = Scheme(rule.format, (rule.group_size or DEFAULT_GROUP) if rule.format in GROUPED else 0)
    form = Form(rule.format, scheme, None if scheme is None else rule.method or DEFAULT_METHOD)
    matched: dict[str, _Candidate] = {}
    for pattern in rule.match:
        hits = [each for each in candidates if _matches(pattern, each)]
        matched |= {each.name: each for each in hits}
        if not hits:
            yield f"match {pattern!r}: no weight; {_nearest(pattern, candidates)}"
    usable = [each for each in matched.values() if each.usable(rule)]
    fresh = [each for each in usable if each.name not in chosen]
    if matched and not usable:
        banks = ", ".join(sorted({each.bank for each in matched.values()}))
        reason = "always float32" if rule.plain else "never quantised"
        yield f"match {_words(rule.match)}: only what is {reason} ({len(matched)} weights: {banks})"
    elif matched and not fresh:
        yield f"match {_words(rule.match)}: earlier rules decide about all of it; put the special rule first"
    if scheme is not None:
        yield from _indivisible(rule, scheme, fresh)
        experts = [each.name for each in fresh if each.bank in EXPERTS]
        if experts and rule.format not in WEIGHT_ONLY:
            yield f"match {_words(rule.match)}: {experts[0]}: experts have no {rule.format} form; {EXPERTS_ADVICE}"
    chosen |= {each.name: form for each in fresh}


def _matches(pattern: str, candidate: _Candidate) -> bool:
    if pattern in BANKS:
        return candidate.bank == pattern or (pattern == "experts" and candidate.bank in EXPERTS)
    return fnmatchcase(candidate.name, pattern) or fnmatchcase(candidate.weight.name, pattern)


def _nearest(pattern: str, candidates: list[_Candidate]) -> str:
    present = {each.bank for each in candidates}
    banks = [bank for bank in BANKS if bank in present]
    names = difflib.get_close_matches(pattern, [each.name for each in candidates], n=_NEAREST, cutoff=0.0)
    return f"nearest names: {', '.join(names)}; banks of this model: {', '.join(banks)}"


def _indivisible(rule: QuantRule, scheme: Scheme, candidates: Iterable[_Candidate]) -> Iterator[str]:
    """One line for each row length that the group does not divide."""
    lengths: dict[int, list[str]] = {}
    for each in candidates:
        if scheme.grouped and each.shape[-1] % scheme.group_size:
            lengths.setdefault(each.shape[-1], []).append(each.name)
    for columns, names in lengths.items():
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        advice = (
            f"groups that do: {', '.join(fitting)}" if fitting else "no group does: keep these in float16 by a rule"
        )
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"group_size {scheme.group_size} does not divide the rows of {columns} of {names[0]}{more}; {advice}"


def experts_apart(stack: Weight) -> list[Weight]:
    """The experts of a stack as weights of their own, in its order."""
    count, size = len(stack.views), prod(stack.shape[1:])
    parts, filled = iter(stack.parts), 0
    own: list[list[int]] = [[] for _ in range(count)]
    for position, part in enumerate(parts):
        own[filled // size].append(position)
        filled += prod(part.used_shape)
    return [
        Weight(name, stack.shape[1:], tuple(stack.parts[position] for position in own[index]), stack.keep_float32)
        for name, index in sorted(stack.views.items(), key=lambda item: item[1])
    ]


def _words(patterns: Iterable[str]) -> str:
    return ", ".join(repr(pattern) for pattern in patterns)
