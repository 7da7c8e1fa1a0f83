"""A recipe's section `targets`: variants of targets there are already, under names of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from moiie_export.recipe_schema import Limits, key
from moiie_export.targets import (
    BUILT_IN,
    DIALECT_SMS,
    Banks,
    KvDtype,
    Plugins,
    Precision,
    Residency,
    Target,
    find_target,
)
from moiie_runtime.errors import MoiieError

_COUNT = Limits(minimum=1, maximum=2**31 - 1)
_CPU_ONLY = ("threads", "kv_cache", "prefill_chunk")

Wrong: TypeAlias = "tuple[str, str, str | None]"
"""A key, what is wrong with it, and a hint."""
Problem: TypeAlias = "tuple[int, str, str, str | None]"
"""The same after the section's place in the list."""


@dataclass(frozen=True)
class TargetSection:
    """A target: what is left out (null) is as in the target it is like."""

    name: str = key("Name for `moiie build --target`, and of the folder below engines/.")
    like: str = key("A built-in target, or one that stands before this one.")
    about: str | None = key("One line for people.", None)
    sms: tuple[int, ...] | None = key("Compute capabilities of the GPUs times ten, for example [87].", None)
    memory: str | None = key("Memory of the device that a run may take, for example 16GB.", None)
    precision: Precision | None = key("Arithmetic of what is not quantised.", None)
    prefill: tuple[int, ...] | None = key("Rows of each prefill profile, ascending; longer prompts take several.", None)
    batch: int | None = key("Rows of prefill and decode.", None, limits=_COUNT)
    images: int | None = key("Most pictures that the vision encoder takes at once.", None, limits=_COUNT)
    residency: Residency | None = key("after_prefill: vision encoder and experts are released before the answer.", None)
    plugins: Plugins | None = key("required: our plugin library; optional: only if given; off: standard layers.", None)
    banks: Banks | None = key("Expert weights as inputs of the engine, or as constants in it.", None)
    embed_plugins: bool | None = key("true: the plugin library is stored in the engine, false: beside it.", None)
    threads: int | None = key("Threads on a CPU.", None, limits=_COUNT)
    kv_cache: KvDtype | None = key("Storage of keys and values on a CPU.", None)
    prefill_chunk: int | None = key("Tokens of a prompt that a CPU takes at once.", None, limits=_COUNT)


def recipe_targets(sections: Sequence[TargetSection]) -> dict[str, Target]:
    """The targets of a recipe by name.

    Raises:
        MoiieError: the first of `target_problems`.
    """
    found, problems = _resolved(sections)
    for index, name, text, hint in problems:
        where = f"targets: {sections[index].name}"
        raise MoiieError(f"{where}: {text}" if name == "name" else f"{where}.{name}: {text}", hint)
    return found


def target_problems(sections: Sequence[TargetSection]) -> list[Problem]:
    """What is wrong with a recipe's targets: a name that is taken or unusable, an unknown `like`, values that make no sense."""
    return _resolved(sections)[1]


def _resolved(sections: Sequence[TargetSection]) -> tuple[dict[str, Target], list[Problem]]:
    """The targets that can be made, and what is wrong with the others."""
    found: dict[str, Target] = {}
    problems: list[Problem] = []
    for index, section in enumerate(sections):
        wrong = list(_wrong_names(section, found))
        target = None if wrong else _made(section, find_target(section.like, found))
        if target is not None:
            wrong = list(_wrong_values(section, target))
            found[section.name] = target
        problems += [(index, *each) for each in wrong]
    return found, problems


def _wrong_names(section: TargetSection, found: Mapping[str, Target]) -> Iterator[Wrong]:
    """Keys without which there is no target to judge."""
    if not section.name.replace("-", "").replace("_", "").isalnum() or not section.name.isascii():
        yield (
            "name",
            f"a name is made of letters, digits, - and _; found {section.name!r}",
            "it becomes a folder's name",
        )
    elif section.name in found or section.name in BUILT_IN:
        yield "name", f"there is a target of this name already: {section.name}", "choose another name"
    try:
        find_target(section.like, found)
    except MoiieError as error:
        yield "like", error.message, error.hint
    try:
        _memory(section)
    except MoiieError as error:
        yield "memory", error.message, error.hint


def manifest_targets(raw: Mapping[str, Any]) -> dict[str, Target]:
    """The targets of the recipe that a bundle was exported with; none when its manifest has none.

    Raises:
        MoiieError: the manifest was edited.
    """
    recipe = raw.get("recipe")
    entries = recipe.get("targets") if isinstance(recipe, Mapping) else None
    try:
        sections = [TargetSection(**{name: _frozen(value) for name, value in each.items()}) for each in entries or ()]
    except (TypeError, AttributeError) as error:
        raise MoiieError(f"bundle.json: recipe.targets: {error}", "give the recipe itself with --recipe") from error
    return recipe_targets(sections)


def _wrong_values(section: TargetSection, target: Target) -> Iterator[Wrong]:
    """Values that the target's backend cannot have."""
    for name, values in (("sms", target.sms), ("prefill", target.prefill)):
        if list(values) != sorted(set(values)) or any(value < 1 for value in values):
            yield name, f"expected ascending numbers above 0, found {list(values)}", None
    if not target.prefill:
        yield "prefill", "at least one profile is needed", "for example prefill: [1024]"
    on_gpu = target.backend.startswith("tensorrt")
    yield from _wrong_sms(target, on_gpu)
    if on_gpu and target.precision == "float32":
        yield "precision", "TensorRT's attention has no float32 kernels", "precision: float16 or bfloat16"
    if target.dialect == "trt10" and target.plugins == "required" and target.precision == "bfloat16":
        yield "precision", "our KV plugins for TensorRT 10 compute in float16", "precision: float16, or plugins: off"
    for name in _CPU_ONLY if on_gpu else ():
        if getattr(section, name) is not None:
            yield name, f"means nothing for {target.backend}; it is a setting of CPU targets", "leave it out"
    if target.backend == "onnxruntime_cuda" and section.kv_cache not in (None, target.precision):
        reason = f"ONNX Runtime on CUDA keeps keys and values in the target's precision, {target.precision}"
        yield "kv_cache", reason, "leave it out, or set precision"


def _wrong_sms(target: Target, on_gpu: bool) -> Iterator[Wrong]:
    if not on_gpu:
        if target.sms:
            yield "sms", f"a target like {target.backend} is built for no compute capability", "leave it out"
        return
    known = DIALECT_SMS[target.dialect]
    unknown = [sm for sm in target.sms if sm not in known]
    if not target.sms:
        yield "sms", "a GPU target names at least one compute capability", "for example sms: [87]"
    elif unknown:
        listed = ", ".join(map(str, sorted(known)))
        verb = "is not expected to build" if target.expected else "does not build"
        yield "sms", f"{target.backend} {verb} for SM {unknown[0]}", f"known: {listed}; 87 means 8.7, an Orin"


def _made(section: TargetSection, base: Target) -> Target:
    changes: dict[str, Any] = {
        each.name: getattr(section, each.name)
        for each in fields(section)
        if each.name not in ("like", "memory") and getattr(section, each.name) is not None
    }
    memory = _memory(section)
    return replace(base, **changes, memory=base.memory if memory is None else memory)


def _memory(section: TargetSection) -> int | None:
    """Bytes.

    Raises:
        MoiieError: it is no size.
    """
    if section.memory is None:
        return None
    from moiie_runtime.sizes import parse_size

    return parse_size(section.memory)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
