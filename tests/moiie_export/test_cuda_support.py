"""What `moiie check --target ort-cuda` says is what the builder does."""

from __future__ import annotations

import pytest

from moiie_export.check.cuda_support import cuda_lowering
from moiie_export.check.memory import stored_bytes
from moiie_export.check.model_ops import OpUse, StoredWeight
from moiie_export.check.support import judge
from moiie_export.quantize.rules import Form
from moiie_export.targets import find_target


def attention(head_dim: int) -> OpUse:
    shape = (("heads", 4), ("kv_heads", 2), ("head_dim", head_dim), ("capacity", 64), ("window", 0))
    return OpUse("decode_attention", "decoder", shape)


def experts(hidden: int, intermediate: int, kind: str = "plain") -> OpUse:
    return OpUse("experts", "language experts", (("hidden", hidden), ("intermediate", intermediate)), kind)


@pytest.mark.parametrize(
    ("use", "precision", "name"),
    [
        (attention(96), "float16", "GroupQueryAttention"),
        (attention(96), "float32", "ScatterND, Attention"),
        (attention(8), "float16", "ScatterND, Attention"),
        (attention(320), "float16", "ScatterND, Attention"),
        (experts(3072, 8192), "float16", "MoE"),
        (experts(3072, 8192), "float32", "MoE"),
        (experts(3072, 8190), "float16", "loop over experts"),
        (experts(8, 64), "float16", "loop over experts"),
        (experts(3072, 8192, "int4"), "float16", "MatMulNBits"),
    ],
)
def test_every_op_has_the_form_that_is_built(use: OpUse, precision: str, name: str) -> None:
    assert cuda_lowering(use, precision)[0] == name


def test_formats_without_kernels_are_refused() -> None:
    target = find_target("ort-cuda")
    assert not judge(experts(64, 64, "fp8"), target).supported
    assert judge(experts(64, 64, "int8"), target).supported


def test_a_weight_takes_the_bytes_of_its_precision() -> None:
    weight = StoredWeight("w", (4, 8), Form("float32"), frozenset({"decoder_prefill"}), False, False)
    assert stored_bytes(weight, find_target("ort-cuda")) == 4 * 8 * 2
    assert stored_bytes(weight, find_target("cpu")) == 4 * 8 * 4
