from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from moiie_runtime import backends
from moiie_runtime.errors import MoiieError


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(MoiieError, match="no backend is called 'tensorrtx'") as caught:
        backends.get_backend("tensorrtx")
    assert "onnxruntime" in caught.value.hint
    assert "for built forms onnxruntime_cuda, tensorrt, tensorrt_rtx" in caught.value.hint


def test_a_package_can_add_a_backend(monkeypatch):
    monkeypatch.setattr(backends, "entry_points", lambda group: [EntryPoint("mine", "builtins:dict", group)])
    assert backends.backend_names() == ["mine", "onnxruntime"]
    assert backends.get_backend("mine") is dict


def test_a_name_cannot_be_taken_twice(monkeypatch):
    monkeypatch.setattr(backends, "entry_points", lambda group: [EntryPoint("onnxruntime", "builtins:dict", group)])
    with pytest.raises(MoiieError, match="two installed packages register a backend called 'onnxruntime'"):
        backends.backend_names()


def test_an_entry_that_is_no_function_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "entry_points", lambda group: [EntryPoint("bad", "sys:maxsize", group)])
    with pytest.raises(MoiieError, match="'bad' is registered with something that cannot open a session"):
        backends.get_backend("bad")
