from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.adapters import Adapters
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from tests.runtime import instance_bundle as made

PARTS = {"down": "down_proj.weight", "down_bias": "down_proj.bias", "up": "up_proj.weight", "up_bias": "up_proj.bias"}


def adapters(root, tensors=None) -> Adapters:
    bundle = Bundle.open(made.write(root, tensors=tensors))
    return Adapters(bundle, bundle.adapters)


def expected(tensors, choices):
    """Each input as the rows of its bank."""
    return {
        f"adapter.{layer}.{part}": np.stack([tensors[f"mole.{layer}.{leaf}"][row[layer]] for row in choices])
        for layer in range(made.LAYERS)
        for part, leaf in {**PARTS, "scale": "scale"}.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("choices", [[(2, 0)], [(2, 0), (1, 1)], [(0, 0), (0, 1), (0, 0)]])
def test_inputs_are_the_chosen_rows_of_the_banks(tmp_path, dtype, choices):
    tensors = made.weights(dtype)
    found = adapters(tmp_path, tensors).inputs([np.array(row, np.int32) for row in choices])
    wanted = expected(tensors, choices)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, wanted[name])


def test_rows_that_agree_share_one_adapter(tmp_path):
    found = adapters(tmp_path).inputs([np.array([1, 2], np.int32)] * 4)
    assert {len(array) for array in found.values()} == {1}
    np.testing.assert_array_equal(found["adapter.1.scale"], made.weights()["mole.1.scale"][2:3])


def test_a_single_float32_choice_is_a_view_of_the_mapped_file(tmp_path):
    bank = adapters(tmp_path)
    for name, array in bank.inputs([np.array([1, 2], np.int32)]).items():
        assert np.shares_memory(array, bank._banks[name])
        assert not array.flags.writeable  # the mapping is read-only


def test_banks_that_do_not_fit_the_manifest_are_named(tmp_path):
    tensors = made.weights()
    tensors["mole.1.up_proj.bias"] = tensors["mole.1.up_proj.bias"][:2]
    with pytest.raises(MoiieError, match=r"'mole\.1\.up_proj\.bias' must be .* \[3, \.\.\.\], got float32 \[2, 8\]"):
        adapters(tmp_path / "a", tensors)
    del tensors["mole.0.scale"]
    with pytest.raises(MoiieError, match=r"no tensor `?'?mole\.0\.scale"):
        adapters(tmp_path / "b", tensors)
    with pytest.raises(MoiieError, match="must be float32 or float16"):
        adapters(
            tmp_path / "c", made.weights("float64") | {"embed_tokens.weight": made.weights()["embed_tokens.weight"]}
        )
