"""The peers' files hold the checkpoint's weights under their own names; nothing here needs a peer to be installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moiie_runtime.tensors import TensorFile
from tests.bench.models import SHAPES, SMALL, Precision, Shape, decoder_banks, write_shape
from tests.bench.peers.gguf_file import gguf_tensors, interleaved
from tests.bench.peers.hf_checkpoint import hf_config, hf_name
from tests.bench.peers.serve import random_ids
from tests.bench.smollm2_checkpoint import halves, tensor_name

TINY = Shape(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, vocab=288)


@pytest.fixture(scope="module", params=[0, 3], ids=["dense", "moe"])
def checkpoint(request, tmp_path_factory) -> Path:
    shape = Shape(**{**vars(TINY), "experts": request.param})
    return write_shape(shape, tmp_path_factory.mktemp("shape") / "checkpoint")


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def test_shapes_have_the_size_they_are_named_for():
    assert round(SHAPES["dense"].parameters / 1e6) == 254
    assert round(SHAPES["moe"].parameters / 1e6) == 670


def test_a_shape_is_counted_as_it_is_written(checkpoint):
    file = TensorFile(checkpoint / "model.safetensors")
    matrices = [name for name in file if hf_name(name) and len(file[name].shape) == 2]
    experts = config_of(checkpoint).get("num_experts", 0)
    shape = Shape(**{**vars(TINY), "experts": experts})
    assert sum(file[name].size for name in matrices) == shape.parameters


def test_gguf_uses_every_decoder_tensor_once(checkpoint):
    file = TensorFile(checkpoint / "model.safetensors")
    tensors = list(gguf_tensors(config_of(checkpoint)))
    used = [source for tensor in tensors for source in tensor.sources]
    assert sorted(used) == sorted(name for name in file if hf_name(name))
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_gguf_shapes(checkpoint):
    file = TensorFile(checkpoint / "model.safetensors")
    config = config_of(checkpoint)
    shapes = {each.name: each.values(lambda name: np.array(file[name])).shape for each in gguf_tensors(config)}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (288, 32)
    assert shapes["blk.1.attn_k.weight"] == (16, 32)
    if config.get("num_experts"):
        assert shapes["blk.0.ffn_gate_exps.weight"] == (3, 48, 32)
        assert shapes["blk.0.ffn_down_exps.weight"] == (3, 32, 48)
        assert shapes["blk.0.ffn_gate_inp.weight"] == (3, 32)
    else:
        assert shapes["blk.0.ffn_down.weight"] == (32, 48)
    floats = {each.name for each in gguf_tensors(config) if not each.quantised}
    assert all("norm" in name or "gate_inp" in name for name in floats)


def test_rows_of_a_head_alternate_between_its_halves():
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_reading_undoes_what_writing_does():
    rows = np.random.default_rng(0).random((24, 5), np.float32)
    assert np.array_equal(halves(interleaved(rows, 3), 3), rows)


def test_gguf_names_and_checkpoint_names_agree_for_a_dense_model():
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for tensor in gguf_tensors(config):
        if tensor.name != "output.weight":  # SmolLM2 shares it with the embedding
            assert (tensor_name(tensor.name),) == tensor.sources
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        tensor_name("rope_freqs.weight")


def test_names_of_transformers():
    assert (
        hf_name("model.layers.3.mlp.experts.2.up_proj.weight") == "model.layers.3.block_sparse_moe.experts.2.w3.weight"
    )
    assert hf_name("model.layers.3.mlp.gate.weight") == "model.layers.3.block_sparse_moe.gate.weight"
    assert hf_name("model.layers.3.mlp.gate_proj.weight") == "model.layers.3.mlp.gate_proj.weight"
    assert hf_name("model.mm_projector.0.bias") is None


def test_config_of_transformers(checkpoint):
    config = config_of(checkpoint)
    made = hf_config(config)
    assert made["model_type"] == ("mixtral" if config.get("num_experts") else "llama")
    assert made["rope_theta"] == config["rope_theta"]
    assert made.get("num_local_experts") == config.get("num_experts")


def test_prompts_are_the_same_for_all_and_reach_many_tokens():
    assert random_ids(256, 32064, 3) == random_ids(256, 32064, 3) != random_ids(256, 32064, 4)
    assert len(set(random_ids(256, 32064, 3))) > 200


def test_recipes_are_valid(tmp_path):
    from moiie_export.recipe import load_recipe
    from tests.bench.models import write_recipe

    for shape in SMALL.values():
        made = Precision().recipe(decoder_banks(shape), 512)
        [rule] = load_recipe(str(write_recipe(tmp_path / "recipe.yaml", made))).quantization.rules
        assert (rule.format, rule.group_size, rule.match) == ("int4", 32, decoder_banks(shape))
