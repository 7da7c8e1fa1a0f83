"""What all tests of the plugins share."""

from __future__ import annotations

import pytest

from tests.plugins.interpreter import HAS_TRITON, patch_language_once


@pytest.fixture(autouse=HAS_TRITON)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_language_once(monkeypatch)
