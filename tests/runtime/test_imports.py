from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import moiie_runtime

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "yaml", "click", "moiie_export")
MODULES = sorted(m.name for m in pkgutil.walk_packages(moiie_runtime.__path__, "moiie_runtime."))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_every_module_imports_without_the_packages_of_the_workstation():
    assert "moiie_runtime.backends.onnxruntime" in MODULES
    run(
        f"import sys\nfor name in {FORBIDDEN!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "import moiie_runtime\nfor name in moiie_runtime.__all__: getattr(moiie_runtime, name)"
    )


def test_the_errors_cost_nothing_to_import():
    heavy = ("numpy", "PIL", "jinja2", "tokenizers", "onnxruntime")
    code = f"import sys, moiie_runtime.errors\nprint([name for name in {heavy!r} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_opening_a_bundle_does_not_load_onnx_runtime():
    assert run("import sys, moiie_runtime.vlm\nprint('onnxruntime' in sys.modules)").strip() == "False"


def test_the_public_names():
    for name in moiie_runtime.__all__:
        assert getattr(moiie_runtime, name) is not None
        assert name in dir(moiie_runtime)
    assert moiie_runtime.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moiie_runtime.nothing  # noqa: B018


def test_every_public_name_is_where_it_says():
    for name, home in moiie_runtime._HOMES.items():
        assert getattr(importlib.import_module(f"moiie_runtime.{home}"), name).__module__ == f"moiie_runtime.{home}"
