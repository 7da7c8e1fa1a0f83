"""Engines are built on devices that have no PyTorch: graphs are lowered, and banks written, without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.exports import SMALLEST, exported

SCRIPT = """
import sys
for name in ("torch", "onnxscript", "transformers", "onnxruntime", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
import moiie_export.builders.tensorrt
from moiie_export.builders.bank_file import write_banks
from moiie_export.builders.tensorrt import plan_engines
from tests.trt_graphs import lowered, target
bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("orin",):
    for component in ("vision_encoder", "decoder_decode"):
        made = lowered(bundle, component, target(name, plugins="required"))
        made.save(folder)
inputs = {str(v.name): (v.dtype.name, tuple(v.shape)) for v in made.model.graph.inputs if ".experts" in f".{v.name}"}
parts = {name: tensors for bank in made.context.banks for name, tensors in bank.tensors.items()}
write_banks(folder / "banks.safetensors", inputs, parts)
print(sorted(inputs))
"""


def test_graphs_are_lowered_without_torch(tmp_path: Path) -> None:
    bundle = exported(SMALLEST).bundle
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, bundle, tmp_path], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['experts.0.language.down', 'experts.0.language.gate_up']"
