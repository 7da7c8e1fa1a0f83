"""`moiie check`: an answer before any export, in words and as JSON, with exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "moiie_phi3" / "checkpoint"


@pytest.mark.parametrize("target", ["cpu", "ort-cuda", "rtx", "orin-nano", "orin", "thor", "server"])
def test_a_small_model_is_supported_everywhere(moiie: Any, target: str) -> None:
    result = moiie("check", CHECKPOINT, "--target", target, "--json")
    assert result.code == 0, result.err
    document = result.document
    assert document["supported"]
    assert all(row["supported"] and row["lowering"] and row["reason"] for row in document["ops"])
    assert document["memory"]["peak"] >= document["memory"]["answering"] > document["memory"]["system"]


def test_a_gpu_that_the_library_does_not_know_exits_3(moiie: Any) -> None:
    result = moiie("check", CHECKPOINT, "-t", "rtx", "--sm", "87,89")
    assert result.code == 3
    assert "not on SM 87: tensorrt_rtx builds for 80, 86, 89, 120, 121" in result.error
    assert "NO  " in result.out


def test_a_device_that_is_too_small_exits_3(moiie: Any) -> None:
    result = moiie("check", CHECKPOINT, "-t", "orin-nano", "--memory", "1GB")
    assert result.code == 3
    assert "predicted memory" in result.error
    assert (
        moiie("check", CHECKPOINT, "-t", "orin-nano", "--memory", "1GB", "--json").document["memory"]["fits"] is False
    )


def test_context_decides_about_the_mask(moiie: Any) -> None:
    def attention(*options: str) -> str:
        rows = moiie("check", CHECKPOINT, "-t", "rtx", "--json", *options).document["ops"]
        (lowering,) = [row["lowering"] for row in rows if row["op"] == "decode_attention"]
        return str(lowering)

    assert attention("--max-context", "2048") == "TRT_Attention, lower_right"
    assert attention("--max-context", "2049") == "TRT_Attention, mask"


def test_rules_and_targets_of_a_recipe_count(moiie: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text(
        "schema: 1\nextends: default\nquantization:\n  rules:\n    - match: [attention, experts]\n      format: fp8\n"
        "targets:\n  - name: ada\n    like: rtx\n    sms: [89]\n    plugins: required\n"
    )
    found = moiie("check", recipe, "--checkpoint", CHECKPOINT, "-t", "ada", "--json")
    assert found.code == 0
    experts = [row for row in found.document["ops"] if row["op"] == "experts"]
    assert {(row["dtype"], row["lowering"]) for row in experts} == {("fp8", "plugin Fp8ExpertDispatch")}
    refused = moiie("check", recipe, "--checkpoint", CHECKPOINT, "-t", "rtx")
    assert refused.code == 3
    assert "not on SM 86: needs SM 89 or above" in refused.error
    assert moiie("check", recipe, "--checkpoint", CHECKPOINT, "-t", "cpu").code == 0  # by portable bodies
    assert "no kernels for fp8" in moiie("check", recipe, "--checkpoint", CHECKPOINT, "-t", "ort-cuda").error


def test_neither_torch_nor_tensorrt_is_loaded() -> None:
    script = (
        "import sys; from moiie_export.cli import cli; from moiie_export.cli.common import run_guarded\n"
        f"code = run_guarded(cli, ['check', {str(CHECKPOINT)!r}, '-t', 'rtx', '--json'])\n"
        "heavy = {'torch', 'tensorrt_rtx', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
