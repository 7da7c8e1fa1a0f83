"""A recipe's section `targets`: variants of targets there are already, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from moiie_export.recipe_schema import Limits, key
from moiie_export.targets import (
    BUILT_IN,
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
    plugins: Plugins | None = key("required: our plugin library; optional or off: standard layers instead.", None)
    banks: Banks | None = key("Expert weights as inputs of the engine, or as constants in it.", None)
    embed_plugins: bool | None = key("true: the plugin library is stored in the engine, false: beside it.", None)
    threads: int | None = key("Threads on a CPU.", None, limits=_COUNT)
    kv_cache: KvDtype | None = key("Storage of keys and values on a CPU.", None)
    prefill_chunk: int | None = key("Tokens of a prompt that a CPU takes at once.", None, limits=_COUNT)


def recipe_targets(sections: Sequence[TargetSection]) -> dict[str, Target]:
    """The targets of a recipe by name.

    Raises:
        MoiieError: a name is taken or unusable, `like` is unknown, or a value makes no sense.
    """
    found: dict[str, Target] = {}
    for section in sections:
        where = f"targets: {section.name}"
        if not section.name.replace("-", "").replace("_", "").isalnum() or not section.name.isascii():
            raise MoiieError(f"{where}: a name is made of letters, digits, - and _", "it becomes the name of a folder")
        if section.name in found or section.name in BUILT_IN:
            raise MoiieError(f"{where}: there is a target of this name already", "choose another name")
        found[section.name] = checked(_made(section, find_target(section.like, found)), where)
    return found


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


def checked(target: Target, where: str) -> Target:
    """The target, when its lists ascend and it fits its backend.

    Raises:
        MoiieError: naming the key.
    """
    for name, values in (("sms", target.sms), ("prefill", target.prefill)):
        if list(values) != sorted(set(values)) or any(value < 1 for value in values):
            raise MoiieError(f"{where}.{name}: expected ascending numbers above 0, found {list(values)}", None)
    if not target.prefill:
        raise MoiieError(f"{where}.prefill: at least one profile is needed", "for example prefill: [1024]")
    if target.backend.startswith("tensorrt") and not target.sms:
        raise MoiieError(f"{where}.sms: a GPU target names at least one compute capability", "for example sms: [87]")
    return target


def _made(section: TargetSection, base: Target) -> Target:
    changes: dict[str, Any] = {
        each.name: getattr(section, each.name)
        for each in fields(section)
        if each.name != "like" and getattr(section, each.name) is not None
    }
    if section.memory is not None:
        from moiie_runtime.memory import parse_size

        changes["memory"] = parse_size(section.memory)
    return replace(base, **changes)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
