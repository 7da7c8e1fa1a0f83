"""Conversion: every value lands where the reference model wants it, in the dtype it came in, whatever held it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_writer import INDEX
from moiie_export.config_reader import ConfigReader
from moiie_export.convert import Originals, convert
from moiie_export.mome_config import MomeConfig
from moiie_export.mome_parser import parse_mome
from moiie_export.mome_weight_map import build_mome_weight_map
from moiie_export.weights import CHECKPOINT, check_tensors
from moiie_runtime.tensors import TensorFile
from tests.moiie_export.model.mome.conftest import MomeCase, golden_model
from tests.mome_golden import minilm
from tests.mome_layout import GOLDEN, SIZES, OfficialLayout, Tensors, first_stage

DINO_LAYER = "dino_tower.encoder.layer.0.attention.attention."


def read(directory: Path) -> tuple[MomeConfig, dict[str, np.ndarray]]:
    """A converted checkpoint: what its config says, and the bundle's weights in float32; every tensor is asked for."""
    with Checkpoint.open(directory) as checkpoint:
        config = parse_mome(ConfigReader(checkpoint.config, "config.json"))
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        weight_map = build_mome_weight_map(config, config.text.vocab_size, {CHECKPOINT: shapes})
        check_tensors(weight_map, {CHECKPOINT: shapes}, {CHECKPOINT: str(directory)})
        assert not weight_map.unreachable
        weights = {}
        for weight in weight_map.weights:
            rows = [checkpoint.rows(part.tensor, 0, part.used_shape[0]).ravel() for part in weight.parts]
            weights[weight.name] = np.concatenate(rows).reshape(weight.shape)
    return config, weights


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_the_golden_model_is_the_one_that_was_put_together_without_converting(tmp_path: Path) -> None:
    encoders, case = GOLDEN / "encoders", MomeCase("end_to_end")
    towers = (encoders / "eva_vit_g.safetensors", encoders / "dinov2.safetensors", encoders / "pix2struct")
    originals = Originals(GOLDEN / "MoME_ckpt.safetensors", GOLDEN / "llm", *towers, minilm())
    (tmp_path / "mome.json").write_text(json.dumps(SIZES))
    result = convert(originals, tmp_path / "out", tmp_path / "mome.json")
    model = golden_model(case)
    config, weights = read(result.path)
    assert_same(weights, {name: value.numpy() for name, value in model.named_parameters()})
    # compared field by field, because the prompt of the reference's tests is a stand-in
    expected = {**vars(model.config), "prompt": config.prompt}
    assert vars(config) == expected
    assert (result.stage, result.bytes) == (2, (result.path / "model.safetensors").stat().st_size - header(result.path))
    assert result.dropped["dino"] == 1  # mask_token
    assert result.dropped["sentence"] == 3  # the pooler and position_ids
    assert sum(result.dropped.values()) == 4
    for name in ("tokenizer.json", "config.json"):
        assert (result.path / "sentence_encoder" / name).read_bytes() == (minilm() / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (result.path / name).read_bytes() == (GOLDEN / "llm" / name).read_bytes()


def header(directory: Path) -> int:
    """Bytes in front of the first tensor."""
    return min(info.offset for info in TensorFile(directory / "model.safetensors").header.values())


def test_every_original_tensor_is_used_once_in_its_own_dtype(layout: OfficialLayout) -> None:
    layout.tensors("eva_vit_g", lambda held: {n: v.half() if v.ndim > 1 else v for n, v in held.items()})
    originals = {
        name: load_file(layout.path / name)
        for name in ("MoME_ckpt.safetensors", "llm/model.safetensors", "eva_vit_g.safetensors")
    }
    result = layout.convert()
    made = load_file(result.path / "model.safetensors")
    trained = originals["MoME_ckpt.safetensors"]
    # adapters, routers and selectors are renamed and nothing else: their values are all there, bit by bit
    pool = {
        value.numpy(force=True).tobytes() for value in (v.view(torch.int16) for v in made.values() if v.itemsize == 2)
    }
    assert all(value.view(torch.int16).numpy().tobytes() in pool for value in trained.values())
    assert result.trainable_values == sum(prod(value.shape) for value in trained.values())
    for name, value in originals["llm/model.safetensors"].items():
        assert torch.equal(made[f"language_model.{name}"], value)
        assert made[f"language_model.{name}"].dtype == torch.bfloat16
    assert made["clip_tower.encoder.layers.0.self_attn.qkv.weight"].dtype == torch.float16
    assert made["clip_tower.encoder.layers.0.self_attn.qkv.bias"].dtype == torch.float32
    assert made["move.dino.adt.reference_points"].dtype == torch.bfloat16
    assert torch.equal(made["move.dino.adt.reference_points"], trained["dino_selector.reference_points"])


def test_what_is_split_and_what_is_joined(layout: OfficialLayout) -> None:
    made = load_file(layout.convert().path / "model.safetensors")
    dino, eva = load_file(layout.path / "dinov2.safetensors"), load_file(layout.path / "eva_vit_g.safetensors")
    for leaf in ("weight", "bias"):
        parts = [made[f"{DINO_LAYER}{name}.{leaf}"] for name in ("query", "key", "value")]
        assert torch.equal(torch.cat(parts), dino[f"blocks.0.attn.qkv.{leaf}"])
    bias = made["clip_tower.encoder.layers.1.self_attn.qkv.bias"]
    expected = (eva["blocks.1.attn.q_bias"], torch.zeros(32), eva["blocks.1.attn.v_bias"])
    assert torch.equal(bias, torch.cat(expected))
    positions = made["dino_tower.embeddings.position_embeddings"]
    assert positions.shape == (1, 1 + 32 * 32, 24)
    assert torch.equal(positions[:, 0], dino["pos_embed"][:, 0])
    grid = dino["pos_embed"][:, 1:].reshape(1, 37, 37, 24).permute(0, 3, 1, 2)
    factor = (32 + 0.1) / 37
    resized = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    torch.testing.assert_close(positions[0, 1:], resized[0].permute(1, 2, 0).reshape(1024, 24), rtol=0, atol=1e-5)


def test_a_table_of_the_right_grid_stays_as_it_is(layout: OfficialLayout) -> None:
    def cut(held: Tensors) -> Tensors:
        return {**held, "pos_embed": held["pos_embed"][:, : 1 + 32 * 32]}

    layout.tensors("dinov2", cut)
    experts = [dict(expert) for expert in SIZES["vision_experts"]]
    experts[1]["pretrained_image_size"] = 448
    config = json.loads((layout.path / "mome.json").read_text())
    layout.sizes({**config, "vision_experts": experts})
    made = load_file(layout.convert().path / "model.safetensors")
    stored = load_file(layout.path / "dinov2.safetensors")["pos_embed"]
    assert torch.equal(made["dino_tower.embeddings.position_embeddings"], stored)


@pytest.mark.parametrize("inside", [None, "model", "state_dict", "module"])
def test_pickles_hold_the_same_model(layout: OfficialLayout, inside: str | None) -> None:
    _, expected = read(layout.convert("plain").path)
    trainer = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    layout.pickle("MoME_ckpt", lambda held: {inside: dict(held), **trainer} if inside else dict(held))
    for name in ("eva_vit_g", "dinov2"):
        layout.pickle(name)
    assert_same(read(layout.convert().path)[1], expected)


def test_directories_may_hold_shards_or_larger_models(layout: OfficialLayout) -> None:
    plain = layout.convert("plain")
    _, expected = read(plain.path)
    originals = layout.originals
    shard_like_transformers(originals.vicuna)
    layout.tensors("pix2struct/model", lambda held: {f"encoder.{n}": v for n, v in held.items()} | decoder())
    whole = {
        "model_type": "pix2struct",
        "vision_config": json.loads((layout.path / "pix2struct/config.json").read_text()),
    }
    del whole["vision_config"]["layer_norm_eps"]  # transformers leaves defaults out
    (layout.path / "pix2struct/config.json").write_text(json.dumps(whole))
    layout.tensors("sentence/model", lambda held: {f"bert.{n}": v for n, v in held.items()})
    assert_same(read(layout.convert().path)[1], expected)


def decoder() -> Tensors:
    return {"decoder.embed_tokens.weight": torch.zeros(4, 4), "decoder.layer.0.mlp.wo.weight": torch.zeros(4, 4)}


def shard_like_transformers(directory: Path) -> None:
    """One safetensors file -> two pickled shards and an index, with a buffer that old versions saved."""
    held = load_file(directory / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(held)
    weight_map = {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: held[name] for name in names[number - 1 :: 2]}, directory / file)
        weight_map |= dict.fromkeys(names[number - 1 :: 2], file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


def test_frozen_parts_beside_the_trained_ones_are_not_used(layout: OfficialLayout) -> None:
    _, expected = read(layout.convert("plain").path)
    frozen = {
        "visual_encoder.cls_token": torch.full((1, 1, 32), 7.0),
        "dino_encoder.norm.weight": torch.full((24,), 7.0),
        "pix2struct_encoder.layernorm.weight": torch.full((16,), 7.0),
        "llm_model.model.norm.weight": torch.full((32,), 7.0),
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "bert_model.0.auto_model.pooler.dense.bias": torch.ones(384),
        "dino_selector.level_start_index": torch.zeros(1, dtype=torch.int64),
    }
    layout.tensors("MoME_ckpt", lambda held: held | frozen)
    result = layout.convert()
    assert result.dropped["MoME checkpoint"] == len(frozen)
    assert_same(read(result.path)[1], expected)


def test_the_last_block_of_the_published_eva_is_left_out(layout: OfficialLayout) -> None:
    _, expected = read(layout.convert("plain").path)

    def published(held: Tensors) -> Tensors:
        last = {n.replace("blocks.1.", "blocks.2."): v + 1 for n, v in held.items() if n.startswith("blocks.1.")}
        head = {f"{name}.weight": torch.ones(32) for name in ("norm", "fc_norm", "head")}
        return held | last | head

    layout.tensors("eva_vit_g", published)
    result = layout.convert()
    assert result.dropped["eva"] == 13 + 3
    assert_same(read(result.path)[1], expected)


def test_a_first_stage_checkpoint_has_its_adapter_in_every_place(layout: OfficialLayout) -> None:
    _, second = read(layout.convert("second").path)
    layout.tensors("MoME_ckpt", first_stage)
    result = layout.convert()
    config, first = read(result.path)
    assert result.stage == 1
    held = load_file(layout.path / "MoME_ckpt.safetensors")
    assert result.trainable_values == sum(prod(value.shape) for value in held.values())
    for name, value in first.items():
        if name.startswith("mole."):
            np.testing.assert_array_equal(value, np.stack([second[name][2]] * config.mole.num_experts))
        elif not name.startswith("router.mole."):
            np.testing.assert_array_equal(value, second[name])
    # whatever the sentence, the first adapter is taken, and not by a tie
    for layer in range(2):
        weights = {leaf: torch.from_numpy(first[f"router.mole.{leaf}"][layer]) for leaf in ("fc1.weight", "fc2.weight")}
        biases = {leaf: torch.from_numpy(first[f"router.mole.{leaf}"][layer]) for leaf in ("fc1.bias", "fc2.bias")}
        sentence = torch.nn.functional.normalize(
            torch.randn(384, generator=torch.Generator().manual_seed(layer)), dim=0
        )
        inner = torch.nn.functional.gelu(weights["fc1.weight"] @ sentence + biases["fc1.bias"])
        logits = weights["fc2.weight"] @ inner + biases["fc2.bias"]
        assert logits.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_shards_hold_what_one_file_holds(layout: OfficialLayout) -> None:
    whole, parts = layout.convert("whole"), layout.convert("parts", shard_bytes=500_000)
    assert len(parts.files) > 2
    index = json.loads((parts.path / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(parts.files)
    assert_same(read(parts.path)[1], read(whole.path)[1])
    for name in ("config.json", "generation_config.json"):
        assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_same_files_give_the_same_bytes(layout: OfficialLayout) -> None:
    one, other = layout.convert("one"), layout.convert("other")
    for path in sorted(one.path.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (other.path / path.relative_to(one.path)).read_bytes()


def test_generation_settings_are_mome_s(layout: OfficialLayout) -> None:
    (layout.path / "llm" / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.9}')
    written = json.loads((layout.convert().path / "generation_config.json").read_text())
    assert (written["num_beams"], written["repetition_penalty"], written["do_sample"]) == (5, 1.5, False)
    assert (written["max_length"], written["bos_token_id"], written["eos_token_id"]) == (13, 1, 2)
    assert "temperature" not in written
