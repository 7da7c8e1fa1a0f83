"""Triton's interpreter for tests, quicker than it comes; tests/conftest.py chooses it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(
    not HAS_TRITON and os.environ.get("CI") != "true", reason="triton is not installed: pip install triton"
)
"""Where CI runs, a missing Triton is a failure."""


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a launch replace the language's functions once, not at each call of a device function (3 times as fast)."""
    import triton.runtime.interpreter as interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    run: Callable[..., None] = interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    def once(function: Any) -> Any:
        if function in patched:
            return None
        patched.add(function)
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
