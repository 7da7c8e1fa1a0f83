"""Graphs for TensorRT 10 and 11 by the parser that is nearest to theirs here, that of TensorRT for RTX: it takes every node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moiie_runtime.bundle import Bundle
from tests.exports import SMALLEST, exported
from tests.plugins.cpp.shell import released
from tests.rtx import need_rtx
from tests.trt_graphs import lowered, target

Parsed = dict[tuple[str, str, str], dict[str, int]]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    """(target, plugins, component) -> layers by type."""
    need_rtx()
    bundle = exported(SMALLEST).bundle
    files = {}
    for name, plugins in (("orin", "off"), ("orin", "required"), ("server", "off"), ("server", "required")):
        for component in Bundle.open(bundle).components:
            folder = tmp_path_factory.mktemp(component)
            path = lowered(bundle, component, target(name, plugins=plugins)).save(folder)
            files[str(path)] = (name, plugins, component)
    script = Path(__file__).parent / "parse_process.py"
    command = [sys.executable, script, released().library, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert not [each for each in lines if not each["parsed"]]
    assert len(lines) == len(files)
    return {files[each["file"]]: each["layers"] for each in lines}


def test_what_carries_the_cache_and_the_experts(parsed: Parsed) -> None:
    """One layer of the model: two updates and one attention, by plugins or TensorRT's own layers; its experts' plugin."""
    wanted = {
        ("orin", "off", "decoder_decode"): {},
        ("orin", "required", "decoder_decode"): {"PLUGIN_V3": 4},
        ("orin", "required", "decoder_prefill"): {"PLUGIN_V3": 4},
        ("server", "off", "decoder_decode"): {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1},
        ("server", "required", "decoder_decode"): {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1, "PLUGIN_V3": 1},
        ("server", "required", "decoder_prefill"): {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1, "PLUGIN_V3": 2},
    }
    kinds = ("PLUGIN_V3", "KV_CACHE_UPDATE", "ATTENTION_INPUT")
    found = {each: {kind: parsed[each][kind] for kind in kinds if kind in parsed[each]} for each in wanted}
    assert found == wanted
