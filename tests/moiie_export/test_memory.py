"""Memory of its own (RssAnon) that a process takes: export streams weights, and the runtime leaves them in their file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moiie_export.source import BLOCK_BYTES
from moiie_runtime.tensors import read_header
from tests.conftest import ROOT
from tests.exports import SMALLEST
from tests.synthetic import write_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")

MIB = 2**20
LARGE = {**SMALLEST, "hidden": 2048, "intermediate": 4096, "heads": 16, "kv_heads": 16}
"""240 MiB of bfloat16, 490 MiB as float32, 400 MiB of that in four experts of one layer."""

WEIGHTS_STAGE = """
import sys
from pathlib import Path
from moiie_export.source import ModelSource
from moiie_export.weights_stage import WeightsJob, write_weights
checkpoint, dtype, target = sys.argv[1:]
with ModelSource.open(Path(checkpoint)) as source:
    input("ready\\n")
    write_weights(WeightsJob.plain(source, dtype), Path(target), lambda *_: None)
"""
EXPORT = """
import sys
from pathlib import Path
import moiie_export.graph.passes, moiie_export.graph.trace, torch.onnx._internal.exporter._core
from moiie_export.pipeline import ExportRequest, export_bundle
from tests.exports import small_recipe
checkpoint, target = map(Path, sys.argv[1:])
input("ready\\n")
export_bundle(ExportRequest(checkpoint, target, small_recipe()))
"""
RUN = """
import json, sys
from pathlib import Path
from PIL import Image
import moiie_runtime as mr
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession

def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}

bundle, found = Path(sys.argv[1]), {"before": memory()}
graphs = ("vision_encoder", "decoder_prefill", "decoder_decode")
sessions = [OnnxRuntimeSession(bundle / "onnx" / f"{graph}.onnx", component=graph) for graph in graphs]
found["loaded"] = memory()
for session in sessions:
    session.close()
with mr.load(bundle) as vlm:
    for _ in range(2):
        vlm.generate_prompt("USER: <image> What? ASSISTANT:", [Image.new("RGB", (30, 30), "red")], max_new_tokens=6)
        vlm.generate_prompt("USER: What? ASSISTANT:", max_new_tokens=6)
    found["run"] = memory()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny and a large checkpoint; removed afterwards, since pytest would keep it for three runs."""
    folder = tmp_path_factory.mktemp("memory")
    write_checkpoint(folder / "tiny", **SMALLEST)
    write_checkpoint(folder / "large", **LARGE)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("dtype", "blocks"), [("float32", 3), ("float16", 4)])
def test_the_weights_stage_takes_a_few_blocks(folder: Path, dtype: str, blocks: int) -> None:
    """Whatever the checkpoint's size: the block as read, as converted, and what the conversion works with."""
    tiny, large = (_peak(WEIGHTS_STAGE, folder / name, dtype, folder / "weights") for name in ("tiny", "large"))
    (folder / "weights").unlink()
    assert large - tiny < blocks * BLOCK_BYTES, (
        f"{tiny / MIB:.0f} MiB more for tiny weights, {large / MIB:.0f} MiB for large"
    )


@pytest.fixture(scope="module")
def large_bundle(folder: Path) -> tuple[Path, int]:
    """The large checkpoint's bundle, and the growth of the process that exported it."""
    return folder / "bundle", _peak(EXPORT, folder / "large", folder / "bundle")


@pytest.mark.slow
def test_an_export_never_holds_the_weights(large_bundle: tuple[Path, int]) -> None:
    """Graphs are traced without weights: what an export takes beyond its libraries does not grow with them."""
    bundle, growth = large_bundle
    assert growth < 200 * MIB < _weight_bytes(bundle) / 2, f"{growth / MIB:.0f} MiB"


@pytest.mark.slow
def test_a_loaded_bundle_leaves_its_weights_in_the_file(large_bundle: tuple[Path, int]) -> None:
    bundle, _ = large_bundle
    found = json.loads(_python(RUN, bundle).stdout)
    growth = {when: found[when]["RssAnon"] - found["before"]["RssAnon"] for when in ("loaded", "run")}
    weights = _weight_bytes(bundle)
    assert weights > 450 * MIB
    assert growth["loaded"] < weights / 30, f"{growth['loaded'] / MIB:.0f} MiB"
    assert growth["run"] < weights / 10, f"{growth['run'] / MIB:.0f} MiB"
    mapped = found["run"]["RssFile"] - found["before"]["RssFile"]
    assert mapped > weights / 2, "the weights were not used at all"


def _weight_bytes(bundle: Path) -> int:
    return sum(info.nbytes for info in read_header(bundle / "onnx" / "weights.safetensors").values())


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def _peak(code: str, *arguments: object) -> int:
    """How many bytes RssAnon rises above its value at `ready`, at most."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = peak = _rss_anon(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, _rss_anon(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    return peak - start


def _rss_anon(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
