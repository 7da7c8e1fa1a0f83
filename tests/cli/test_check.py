"""`moiie check`: an answer before any export, in words and as JSON, with exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moiie_export.targets import BUILT_IN
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
    reason = "tensorrt_rtx does not build for SM 87 (it does for 80, 86, 89, 120, 121)"
    result = moiie("check", CHECKPOINT, "-t", "rtx", "--sm", "87,89")
    assert (result.code, result.error) == (3, f"target rtx: {reason}")
    assert "--sm" in result.hint
    assert result.out.count(reason) == result.out.count("NO  ") == 1
    document = moiie("check", CHECKPOINT, "-t", "rtx", "--sm", "87,89", "--json").document
    assert (document["supported"], document["refused"]) == (False, [{"sms": [87], "reason": reason}])
    assert all(row["supported"] and row["sms"] == [89] for row in document["ops"])
    alone = moiie("check", CHECKPOINT, "-t", "rtx", "--sm", "87", "--json")
    assert (alone.code, alone.document["ops"]) == (3, [])
    assert "is not expected to build for SM 999" in moiie("check", CHECKPOINT, "-t", "orin", "--sm", "999").error


def test_bfloat16_on_an_older_gpu_is_said_once(moiie: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "wide.yaml"
    recipe.write_text(
        "schema: 1\nextends: default\ntargets:\n  - {name: wide, like: server, precision: bfloat16, plugins: 'off'}\n"
    )
    result = moiie("check", recipe, "--checkpoint", CHECKPOINT, "-t", "wide", "--sm", "75,89")
    assert (result.code, result.error) == (3, "target wide: bfloat16 needs SM 80 or above, not 75")
    assert result.out.count("NO  ") == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("ort-cuda", "--sm belongs to targets of TensorRT; ort-cuda is ONNX Runtime, one form for all NVIDIA GPUs"),
        ("cpu", "--sm belongs to targets of TensorRT; cpu is ONNX Runtime, for a CPU"),
    ],
)
def test_sm_belongs_to_tensorrt(moiie: Any, target: str, says: str) -> None:
    result = moiie("check", CHECKPOINT, "-t", target, "--sm", "87")
    assert (result.code, result.error) == (2, says)


@pytest.mark.parametrize("text", ["abc", "0", "00", "8.", "", "87,,89", "8700", "-87"])
def test_nonsense_is_a_usage_error(moiie: Any, text: str) -> None:
    assert moiie("check", CHECKPOINT, "-t", "rtx", "--sm", text).code == 2


def test_every_target_is_named_in_the_help(moiie: Any) -> None:
    text = moiie("check", "--help").out
    assert all(f"{name}," in text or f"{name}." in text for name in BUILT_IN)


def test_a_recipe_without_a_checkpoint_hints_at_check(moiie: Any) -> None:
    result = moiie("check", "moiie-phi3", "-t", "rtx")
    assert (result.code, result.error) == (1, "recipe moiie-phi3 names no checkpoint")
    assert result.hint.startswith("say which: moiie check moiie-phi3 --checkpoint DIR --target NAME (of DIR only")
    assert "export" not in result.hint


def test_a_bundle_is_no_checkpoint(moiie: Any, golden_bundle: Callable[[str], Path]) -> None:
    result = moiie("check", golden_bundle("moiie_phi3"), "-t", "rtx")
    assert result.code == 1
    assert "a checkpoint is needed, this is a bundle" in result.error
    assert "moiie doctor" in result.hint


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
