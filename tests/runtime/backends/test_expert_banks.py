"""Experts on the device: the bytes of the file, E4M3 numbers among them, and what a loaded engine computes with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

import moiie_runtime as mr
from moiie_runtime.backends.expert_banks import ExpertBanks
from moiie_runtime.tensors import TensorWriter
from tests.host_device import HostDevice
from tests.moiie_export.builders.test_rtx_eight_bits import eight_bits
from tests.runtime.backends.emulated_tensorrt import EmulatedTensorRt
from tests.runtime.backends.engine_bundle import build
from tests.shared_library import write_shared_library

QUESTION = [{"role": "user", "content": "What is this?"}]


def test_every_type_arrives_as_it_is_stored(tmp_path: Path) -> None:
    bits = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) + 0x70
    stored = {
        "vision": ("F8_E4M3", bits, "float8_e4m3fn"),
        "vision_scales": ("F32", np.linspace(0.5, 1, 6, dtype=np.float32).reshape(2, 3), "float32"),
        "language": ("BF16", (bits.astype(np.uint16) << 7), "bfloat16"),
        "language_scales": ("F16", np.ones((2, 3), np.float16), "float16"),
    }
    path = tmp_path / "banks.safetensors"
    with TensorWriter(path, {name: (kind, array.shape) for name, (kind, array, _) in stored.items()}) as writer:
        for name, (_, array, _) in stored.items():
            writer.write_elements(array, name)
    device = HostDevice()
    components = {"vision": ["decoder_prefill"], "language": ["decoder_prefill", "decoder_decode"]}
    document = [{"inputs": [name, f"{name}_scales"], "components": each} for name, each in components.items()]
    banks = ExpertBanks(path, document, device)
    found = banks.buffers("decoder_prefill")
    for name, (_, array, dtype) in stored.items():
        assert (found[name].dtype, found[name].shape) == (dtype, array.shape)
        wanted = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array
        np.testing.assert_array_equal(found[name].numpy(), wanted)
    assert banks.nbytes == sum(array.nbytes for _, array, _ in stored.values())
    banks.release_prefill()
    assert (
        sum(device.held.values()) == banks.nbytes == stored["language"][1].nbytes + stored["language_scales"][1].nbytes
    )
    banks.close()
    assert not device.held


def test_an_engine_computes_with_experts_in_float8(trt: EmulatedTensorRt, tmp_path: Path) -> None:
    """The engine's own graph, computed on the memory that was bound: the bundle's answer, but for half precision."""
    copied = Path(shutil.copytree(eight_bits().bundle, tmp_path / "bundle"))
    library = write_shared_library(tmp_path / "libmoiie_plugins.so")
    settings = {"sms": (89,), "prefill": (64,), "plugins": "required"}
    build(copied, "rtx", settings, library, dialect=True)
    with mr.load(copied, threads=1) as vlm:
        wanted = vlm.generate(QUESTION, max_new_tokens=3, record=mr.Record(step_logits=True))
    with mr.load(copied, target="rtx", threads=1) as vlm:
        found = vlm.generate(QUESTION, max_new_tokens=3, record=mr.Record(step_logits=True))
    assert found.token_ids == wanted.token_ids
    np.testing.assert_allclose(found.step_logits, wanted.step_logits, atol=0.02 * np.abs(wanted.step_logits).max())
    assert not any(trt.cuda.left.values())
