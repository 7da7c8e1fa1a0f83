"""Synthetic checkpoints are what the authors' own code saves, have sane activations, and export and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer

import moiie_runtime as mr
from moiie_export.checkpoint import Checkpoint
from tests.conftest import CASES, GOLDEN
from tests.exports import exported
from tests.synthetic import Synthetic, tokenizer_entries, write_checkpoint

# Written only by some release of a library, or by the converter as it likes.
UNIMPORTANT = {"transformers_version", "s2_scales"}
VARIANTS = {
    "bunny-phi3": ("phi3", "dense"),
    "bunny-phi3-moe": ("phi3", "vanilla"),
    "bunny-phi3-m": ("phi3", "hard"),
    "bunny-mm-phi3-moe": ("phi3", "routed"),
    "bunny-mm-phi3-moe-s": ("phi3", "moiie"),
    "bunny-mm-llama3-moe-s": ("llama", "moiie"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_the_authors_code(case: str, tmp_path: Path) -> None:
    """Same tensors with the same shapes, same keys in config.json, as in the golden case of the same sizes."""
    theirs = Checkpoint.open(GOLDEN / case / "checkpoint")
    tower = next((GOLDEN / case / "vision_tower").iterdir())
    ours = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", **_settings(theirs.config, _read(tower))))
    assert _shapes(ours) == _shapes(theirs)
    assert set(ours.config) - UNIMPORTANT == set(theirs.config) - UNIMPORTANT
    different = {key for key in ours.config if key in theirs.config and ours.config[key] != theirs.config[key]}
    assert different <= {
        "mm_vision_tower",
        "image_aspect_ratio",
        "lan_router_aux_loss_coef",
        "vis_router_aux_loss_coef",
    }
    with Checkpoint.open(tower) as their_tower:
        separate = tmp_path / ours.config["mm_vision_tower"]
        assert set(_read(separate)) <= set(_read(tower))
        if not theirs.config["unfreeze_vision_tower"]:
            assert _shapes(Checkpoint.open(separate)) == _shapes(their_tower)


def test_it_exports_and_answers(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "red.png")
    with mr.load(exported({"layers": 2, "vocab": 288, "dtype": "F32"}).bundle, threads=1) as vlm:
        record = mr.Record(prefill_logits="all", routing=True)
        prompt = "USER: <image> Hi ASSISTANT:"
        answer = vlm.generate_prompt(prompt, [tmp_path / "red.png"], record=record, max_new_tokens=4)
        assert vlm.bundle.tokens.image_tokens == 4
    assert answer.prefill_logits is not None
    assert answer.routing is not None
    assert 0.3 < float(answer.prefill_logits.std()) < 5  # neither flat nor saturated
    assert len(set(answer.token_ids)) > 1


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_depend_on_seed_and_name_alone(tmp_path: Path, dtype: str) -> None:
    first = Checkpoint.open(write_checkpoint(tmp_path / "a", dtype=dtype, seed=1))
    sharded = Checkpoint.open(write_checkpoint(tmp_path / "b", dtype=dtype, seed=1, experts=6, shard_bytes=20_000))
    other = Checkpoint.open(write_checkpoint(tmp_path / "c", dtype=dtype, seed=2))
    exact = Checkpoint.open(write_checkpoint(tmp_path / "d", dtype="F32", seed=1))
    assert len({entry.file for entry in sharded.tensors.values()}) > 2
    for name, entry in first.tensors.items():
        rows = first.rows(name, 0, entry.shape[0])
        if sharded.tensors[name].shape == entry.shape:
            np.testing.assert_array_equal(rows, sharded.rows(name, 0, entry.shape[0]))
        assert not np.array_equal(rows, other.rows(name, 0, entry.shape[0]))
        np.testing.assert_allclose(
            rows, exact.rows(name, 0, entry.shape[0]), rtol={"BF16": 2**-8, "F16": 2**-11, "F32": 0}[dtype], atol=1e-7
        )


def test_blocks_do_not_show_in_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "a")
    monkeypatch.setattr("tests.synthetic._BLOCK", 1000)
    write_checkpoint(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_other_readers_agree(tmp_path: Path) -> None:
    """The safetensors and tokenizers libraries read the files, and bfloat16 is rounded, not cut."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", vocab=1000)
    ours = Checkpoint.open(checkpoint)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        for name in theirs.keys():  # noqa: SIM118 - no mapping
            tensor = theirs.get_tensor(name)
            np.testing.assert_array_equal(tensor.float().numpy(), ours.rows(name, 0, tensor.shape[0]))
    exact = Checkpoint.open(write_checkpoint(tmp_path / "exact", vocab=1000, dtype="F32"))
    name = "model.layers.0.mlp.down_proj.weight"
    kept, true = (each.rows(name, 0, 32) for each in (ours, exact))
    assert (np.abs(kept - true) <= 2**-8 * np.abs(true)).all()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == tokenizer_entries(Synthetic(vocab=1000)) == 984
    text = "USER: Wörter, 言葉 and \U0001f600"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text


def _settings(config: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """The settings of `write_checkpoint` that a config.json of the authors amounts to."""
    backbone, variant = VARIANTS[config["model_type"]]
    settings = {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "vocab": config["vocab_size"],
        "experts": config.get("num_experts") or config.get("num_lan_experts") or 0,
        "vision_experts": config.get("num_vis_experts", 0),
        "backbone": backbone,
        "variant": variant,
        "s2": config["use_s2"],
        "unfreeze": config["unfreeze_vision_tower"],
        "sliding_window": config.get("sliding_window"),
        "dtype": "F32",
    }
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {**settings, "tower": tuple(tower[key] for key in sizes)}


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in checkpoint.tensors.items()}


def _read(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config
