"""The sections of engine.json that only backends for a GPU read: checked when an engine is opened, used as they are later."""

from __future__ import annotations

from collections.abc import Iterator

from moiie_runtime.backends.device import ITEM_BYTES
from moiie_runtime.fields import Fields

_LARGEST_SM = 999


def check_sections(top: Fields) -> None:
    """Refuse sections of the wrong form. Those of older versions may be missing.

    Raises:
        MoiieError: naming the key.
    """
    top.child("kv_cache").string("dtype", tuple(ITEM_BYTES))
    _optional_boolean(top.child("kv_cache"), "in_place")
    for key in ("sms", "library_sms"):
        if top.data.get(key) is not None:
            top.integers(key, 1, _LARGEST_SM)
    for settings in _optional(top, "settings"):
        _settings(settings)
    for options in _optional(top, "options"):
        _options(options)
    for strings in _optional(top, "floor"):
        _strings(strings)
    for plugins in _optional(top, "plugins"):
        _plugins(plugins)
    for bank in top.items("banks") if top.data.get("banks") is not None else ():
        bank.strings("inputs")
        bank.strings("components")
    for component in top.children("components").values():
        _component(component)


def _settings(settings: Fields) -> None:
    for key in ("dialect", "plugins", "residency"):
        if key in settings.data:
            settings.string(key)
    if "precision" in settings.data:
        settings.string("precision", tuple(ITEM_BYTES))
    if "images" in settings.data:
        settings.integer("images", 1)


def _options(options: Fields) -> None:
    if options.data.get("recipe") is not None:
        options.string("recipe")
    if options.data.get("sm") is not None:
        options.integers("sm", 1, _LARGEST_SM)


def _plugins(plugins: Fields) -> None:
    _optional_boolean(plugins, "embedded")
    for key in ("file", "sha256"):
        if plugins.data.get(key) is not None:
            plugins.string(key)
    for kernels in _optional(plugins, "kernels"):
        kernels.integers("sms", 1, _LARGEST_SM)
        kernels.integers("portable", 1, _LARGEST_SM)


def _component(component: Fields) -> None:
    for key in ("inputs", "outputs"):
        for tensor in component.items(key):
            tensor.string("dtype", tuple(ITEM_BYTES))
    for aliases in _optional(component, "aliases"):
        _strings(aliases)
    for profile in component.items("profiles") if component.data.get("profiles") is not None else ():
        profile.string("name")
        sizes = profile.child("sizes")
        for dimension in sizes.data:
            if len(sizes.integers(dimension, 0)) != 3:
                raise sizes.error(dimension, "a smallest, best and largest size")


def _optional(fields: Fields, key: str) -> Iterator[Fields]:
    """The object under `key`, if there is one."""
    child = fields.optional_child(key)
    if child is not None:
        yield child


def _strings(table: Fields) -> None:
    for key in table.data:
        table.string(key)


def _optional_boolean(fields: Fields, key: str) -> None:
    if fields.data.get(key) is not None:
        fields.boolean(key)
