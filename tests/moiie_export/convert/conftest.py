"""The authors' files, copied for one test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mome_layout import OfficialLayout, write_layout


@pytest.fixture
def layout(tmp_path: Path) -> OfficialLayout:
    """Files that the test may change; they convert as they are."""
    return write_layout(tmp_path)
