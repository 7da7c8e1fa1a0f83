"""Help, version and usage errors; and that none of them imports anything heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moiie_export.cli import VERBS
from tests.cli.conftest import Moiie

HEAVY = (
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "numpy", "yaml", "PIL", "tokenizers", "jinja2"
)  # fmt: skip
COMMANDS = [[], *([verb] for verb in VERBS), *(["recipe", each] for each in ("ls", "show", "cp", "validate"))]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_goes_to_stdout_with_an_example(moiie: Moiie, command: list[str], flag: str) -> None:
    result = moiie(*command, flag)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: {' '.join(['moiie', *command])} ")
    assert "Example" in result.out
    assert "  moiie " in result.out.split("Example")[1]
    assert max(len(line) for line in result.out.splitlines()) <= 110


def test_help_lists_every_verb_with_one_line(moiie: Moiie) -> None:
    lines = moiie("--help").out.splitlines()
    for verb in VERBS:
        [line] = [each for each in lines if each.strip().startswith(f"{verb} ") and "moiie" not in each]
        assert line.endswith(".")
        assert not line.endswith("...")


def test_help_imports_nothing_heavy() -> None:
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in HEAVY)
    runs = "".join(f"assert run_guarded(cli, {[*command, '--help']!r}) == 0\n" for command in COMMANDS)
    code = f"{block}from moiie_export.cli import cli\nfrom moiie_export.cli.common import run_guarded\n{runs}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(moiie: Moiie) -> None:
    from importlib.metadata import version

    result = moiie("--version")
    assert (result.code, result.out, result.err) == (0, f"moiie {version('moiie-export')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["exprt"], "there is no verb 'exprt'; did you mean `moiie export`?", "`moiie --help`"),
        (["zzz"], "there is no verb 'zzz'; the verbs are demo, export, run", "`moiie --help`"),
        ([], "say what to do: a verb is missing", "`moiie --help`"),
        (["recipe"], "say what to do: a verb is missing", "`moiie recipe --help`"),
        (["export", "x"], "missing option '-o' / '--output'", "`moiie export --help`"),
        (["export", "x", "-o", "y", "--dtype", "int4"], "invalid value for '--dtype'", "`moiie export --help`"),
        (["run", "x"], "missing option '-p' / '--prompt'", "`moiie run --help`"),
        (
            ["run", "x", "-p", "y", "--max-new-tokens", "0"],
            "invalid value for '--max-new-tokens'",
            "`moiie run --help`",
        ),
        (["run", "x", "-p", "y", "--top-p", "1.5"], "invalid value for '--top-p'", "`moiie run --help`"),
        (
            ["run", "x", "-p", "y", "--memory-limit", "lots"],
            "invalid value for '--memory-limit': 'lots' is no size",
            "run",
        ),
        (["run", "x", "-p", "y", "--all-logits"], "--all-logits goes with --save-outputs", "`moiie run --help`"),
        (["run", "x", "-p", "y", "--instruction", "z"], "--instruction goes with --raw", "`moiie run --help`"),
        (["run", "x", "--promt", "y"], "no such option", "`moiie run --help`"),
        (["parity", "x"], "missing option '--checkpoint'", "`moiie parity --help`"),
        (["inspect"], "missing argument 'BUNDLE'", "`moiie inspect --help`"),
        (["recipe", "show"], "say which recipe", "`moiie recipe show --help`"),
        (["recipe", "show", "default", "--schema"], "--schema takes no recipe", "`moiie recipe show --help`"),
    ],
)
def test_usage_errors_exit_2(moiie: Moiie, arguments: list[str], error: str, hint: str) -> None:
    result = moiie(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.error.startswith(error)
    assert hint in result.hint


def test_a_closed_standard_output_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moiie_export.cli", "recipe", "show", "--schema"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == "error: standard output was closed before everything was written\n"
