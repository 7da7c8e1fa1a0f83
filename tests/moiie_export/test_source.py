"""A checkpoint with its tower and tokenizer: what is opened, whose weights count, and every refusal by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import moiie_export.source
from moiie_export.source import ModelSource
from moiie_runtime.errors import MoiieError

GOLDEN = Path(__file__).parents[1] / "golden"
Copy = Callable[..., Any]
Tensors = dict[str, np.ndarray]

GATE = "model.layers.1.mlp.gate.weight"
PREFIX = "model.vision_tower.vision_tower."


def refused(directory: Path, match: str, vision_tower: Path | None = None) -> MoiieError:
    with pytest.raises(MoiieError, match=match) as caught:
        ModelSource.open(directory, vision_tower)
    return caught.value


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def held(directory: Path) -> Tensors:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def weight(source: ModelSource, name: str) -> np.ndarray:
    return source.tensor(next(item for item in source.weight_map.weights if item.name == name))


def test_golden_checkpoints_open_with_the_vocabulary_cut_to_the_tokenizer(golden: Any) -> None:
    about, raw = golden.about, json.loads((golden.checkpoint / "config.json").read_text())
    with ModelSource.open(golden.checkpoint) as source:
        assert source.config.text.vocab_size == about["load"]["rows_after_official_resize_to_tokenizer_length"]
        assert source.checkpoint.config["vocab_size"] == about["load"]["checkpoint_rows"]
        assert source.config.eos_token_id == (about["special_ids"]["eos"],)
        assert source.config.image_aspect_ratio == about["image_aspect_ratio"]
        assert bool(source.config.vision.scales) == about["use_s2"]
        assert (source.tower is None) == raw["unfreeze_vision_tower"]
        assert source.tower_path is not None
        moe = source.config.moe
        dead = about["dead_experts"] or []
        assert moe is None or sorted(set(range(moe.num_experts)) - set(moe.reachable)) == dead


def test_weights_are_the_checkpoints_rows_fused_and_stacked() -> None:
    """By hand, from the safetensors library, for a checkpoint with split projections and one with fused ones."""
    directory = GOLDEN / "moiie_llama3" / "checkpoint"
    theirs, layer = held(directory), "model.layers.1."
    with ModelSource.open(directory) as source:
        qkv = np.concatenate([theirs[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"])
        np.testing.assert_array_equal(weight(source, "decoder.layers.1.self_attn.qkv_proj.weight"), qkv, strict=True)
        pairs = [[theirs[f"{layer}mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up")] for e in range(4)]
        stacked = np.stack([np.concatenate(pair) for pair in pairs])
        np.testing.assert_array_equal(weight(source, "decoder.layers.1.mlp.experts.gate_up_proj"), stacked, strict=True)
    directory = GOLDEN / "moiie_phi3" / "checkpoint"
    theirs = held(directory)
    with ModelSource.open(directory) as source:
        for name, tensor in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("decoder.lm_head.weight", "lm_head.weight"),
        ):
            np.testing.assert_array_equal(weight(source, name), theirs[tensor][:352], strict=True)
        down = np.stack([theirs[f"{layer}mlp.experts.{e}.down_proj.weight"] for e in range(4)])
        np.testing.assert_array_equal(weight(source, "decoder.layers.1.mlp.experts.down_proj"), down, strict=True)


@pytest.mark.parametrize("case", ["moiie_phi3", "moiie_llama3"])
def test_unfreeze_vision_tower_says_whose_weights_count(case: str) -> None:
    """false: the separate tower, the checkpoint's rounded copies are ignored; true: the checkpoint (spec 4.3)."""
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    directory = GOLDEN / case / "checkpoint"
    separate = held(next((GOLDEN / case / "vision_tower").iterdir()))[name]
    copy = held(directory)[PREFIX + name]
    assert not np.array_equal(separate, copy)
    with ModelSource.open(directory) as source:
        expected = copy if source.config.vision_weights_in_checkpoint else separate
        np.testing.assert_array_equal(weight(source, "vision_encoder.tower.layers.0.mlp.fc1.weight"), expected)
        reasons = set(source.weight_map.unreachable.values())
        ignored = any("unfreeze_vision_tower is false" in reason for reason in reasons)
        assert ignored is not source.config.vision_weights_in_checkpoint


def test_copies_of_the_tower_that_do_not_count_may_be_anything(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")

    def spoil(tensors: Tensors) -> Tensors:
        tensors[PREFIX + "vision_model.post_layernorm.bias"] = np.full((2, 3), np.nan, np.float32)
        tensors[PREFIX + "vision_model.encoder.layers.99.unheard_of"] = np.zeros(1, np.float32)
        return tensors

    case.tensors(spoil)
    ModelSource.open(case.checkpoint).close()
    case.config(unfreeze_vision_tower=True)
    refused(case.checkpoint, "1 tensor.s. that this model does not have, the first: .*layers.99.unheard_of")


def test_blocks_are_bounded_and_together_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelSource.open(GOLDEN / "moiie_phi3_s2" / "checkpoint") as source:
        whole = {item.name: source.tensor(item) for item in source.weight_map.weights}
        monkeypatch.setattr(moiie_export.source, "BLOCK_BYTES", 1000)
        for item in source.weight_map.weights:
            blocks = list(source.blocks(item))
            widest = max(int(np.prod(part.shape[1:])) for part in item.parts)
            assert all(block.size <= max(250, widest) for block in blocks)
            assert all(block.dtype == np.float32 for block in blocks)
            joined = np.concatenate([block.reshape(-1) for block in blocks]).reshape(item.shape)
            np.testing.assert_array_equal(joined, whole[item.name], strict=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_row(golden_copy: Copy, bad: float) -> None:
    case = golden_copy("moiie_phi3")
    name = "model.layers.3.mlp.experts.2.down_proj.weight"

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name][7, 5] = bad
        return tensors

    case.tensors(spoil)
    with ModelSource.open(case.checkpoint) as source, pytest.raises(MoiieError, match=f"{name}.*row 7: .*finite"):
        weight(source, "decoder.layers.3.mlp.experts.down_proj")


def test_a_missing_tensor_is_named_with_its_shape(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.tensors(without("model.layers.2.self_attn.o_proj.weight", "lm_head.weight"))
    error = refused(case.checkpoint, r"2 tensor.s. missing, the first: model.layers.2.self_attn.o_proj.weight")
    assert "expected shape [32, 32]" in error.message
    assert str(case.checkpoint) in error.message


def test_a_missing_tensor_of_the_tower_is_named_with_the_towers_directory(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.tower_tensors(without("vision_model.encoder.layers.1.layer_norm2.bias"))
    error = refused(case.checkpoint, "the first: vision_model.encoder.layers.1.layer_norm2.bias")
    assert str(case.tower.resolve()) in error.message


def test_an_unknown_tensor_is_named(golden_copy: Copy) -> None:
    case = golden_copy("dense_phi3")
    case.tensors(lambda tensors: {**tensors, "model.layers.1.mlp.gate.weight": np.zeros((3, 32), np.float32)})
    refused(case.checkpoint, "1 tensor.s. that this model does not have, the first: model.layers.1.mlp.gate.weight")
    case = golden_copy("moiie_phi3", "towers")
    case.tower_tensors(lambda tensors: {**tensors, "vision_model.new_part": np.zeros(1, np.float32)})
    refused(case.checkpoint, "the first: vision_model.new_part")


def test_one_layer_too_many_is_unknown_and_one_too_few_is_missing(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(num_hidden_layers=3)
    refused(case.checkpoint, "that this model does not have, the first: model.layers.3.")
    case.config(num_hidden_layers=5)
    refused(case.checkpoint, "missing, the first: model.layers.4.input_layernorm.weight")


def test_a_wrong_shape_is_named_with_both_shapes(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(intermediate_size=40)
    error = refused(case.checkpoint, r"expected shape \[80, 32\], found \[96, 32\]")
    assert "model.layers.0.mlp.gate_up_proj.weight" in error.message


def test_a_gate_of_width_e_is_refused_with_the_reason(golden_copy: Copy) -> None:
    """What importers of ordinary mixtures expect; here a gate has one row per expert of its modality (spec 8.3)."""
    case = golden_copy("moiie_phi3")
    case.tensors(lambda tensors: {**tensors, GATE: np.zeros((4, 32), np.float32)})
    error = refused(case.checkpoint, rf"{GATE}: expected shape \[3, 32\], found \[4, 32\]")
    assert "one row per expert its modality may reach" in str(error.hint)


def test_a_checkpoint_of_another_expert_count_is_refused_at_its_gates(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(num_experts=3)
    error = refused(case.checkpoint, r"gate.*weight: expected shape \[2, 32\], found \[3, 32\]")
    assert "num_experts" in str(error.hint)


def test_a_converted_checkpoint_without_gates_is_told_so(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    gates = [f"model.layers.{layer}.mlp.{gate}.weight" for layer in (1, 3) for gate in ("gate", "gate_vis")]
    case.tensors(without(*gates))
    error = refused(case.checkpoint, f"the checkpoint has experts but no router gates; missing {GATE} and 3 more")
    assert "moiie upcycle" in str(error.hint)
    case.tensors(without("lm_head.weight"))
    assert "moiie upcycle" not in str(refused(case.checkpoint, "5 tensor.s. missing").hint)


def test_the_projectors_width_contradicts_use_s2(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(use_s2=True, mm_hidden_size=48)
    error = refused(case.checkpoint, r"model.mm_projector.0.weight: expected shape \[32, 48\], found \[32, 16\]")
    assert "compare use_s2" in str(error.hint)
    case = golden_copy("moiie_phi3_s2", "s2")
    case.config(use_s2=False, mm_hidden_size=16)
    refused(case.checkpoint, r"model.mm_projector.0.weight: expected shape \[32, 16\], found \[32, 48\]")


def test_the_tower_is_looked_for_beside_the_checkpoint_then_beside_its_parent(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3", "runs/case")
    with ModelSource.open(case.checkpoint) as source:
        assert source.tower_path == case.tower
    above = case.path.parent / "vision_tower"
    shutil.move(case.path / "vision_tower", above)
    with ModelSource.open(case.checkpoint) as source:
        assert source.tower_path is not None
        assert source.tower_path.parent == above


def test_an_absolute_path_of_a_tower_is_taken_as_it_is(golden_copy: Copy, tmp_path: Path) -> None:
    case = golden_copy("moiie_phi3")
    elsewhere = tmp_path / "clip models" / "tower"
    shutil.move(case.tower, elsewhere)
    case.config(mm_vision_tower=str(elsewhere))
    with ModelSource.open(case.checkpoint) as source:
        assert source.tower_path == elsewhere


@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_tower_that_is_not_found_says_where_it_was_looked_for(golden_copy: Copy, unfreeze: bool) -> None:
    case = golden_copy("moiie_phi3")
    case.config(mm_vision_tower="google/siglip-base", unfreeze_vision_tower=unfreeze)
    error = refused(case.checkpoint, "mm_vision_tower: found no directory with a config.json for 'google/siglip-base'")
    parents = (case.checkpoint.resolve().parent, case.checkpoint.resolve().parent.parent)
    assert all(str(parent / "google/siglip-base") in error.message for parent in parents)
    assert ("its weights count" in error.message) is not unfreeze
    assert "--vision-tower" in str(error.hint)


def test_a_given_tower_is_used_instead_and_only_it(golden_copy: Copy, tmp_path: Path) -> None:
    case = golden_copy("moiie_phi3")
    elsewhere = tmp_path / "tower"
    shutil.move(case.tower, elsewhere)
    with ModelSource.open(case.checkpoint, elsewhere) as source:
        assert source.tower_path == elsewhere
        expected = held(elsewhere)["vision_model.embeddings.patch_embedding.bias"]
        found = weight(source, "vision_encoder.tower.embeddings.patch_embedding.bias")
        np.testing.assert_array_equal(found, expected)
    error = refused(case.checkpoint, "looked in: .*nowhere", tmp_path / "nowhere")
    assert "vision_tower/siglip" not in error.message.split("looked in:")[1]


def test_a_given_tower_of_another_kind_is_refused(golden_copy: Copy, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip_vision_model"}')
    refused(golden_copy("moiie_phi3").checkpoint, "model_type: 'clip_vision_model' is not implemented", other)


def test_the_published_tower_needs_no_directory_when_its_weights_are_in_the_checkpoint(golden_copy: Copy) -> None:
    """Its sizes are known, so the small copies of this checkpoint lack layers and width, by name."""
    case = golden_copy("moiie_llama3")
    case.config(mm_vision_tower="google/siglip-so400m-patch14-384", mm_hidden_size=1152)
    prefix = f"{PREFIX}vision_model.encoder.layers.3."
    refused(case.checkpoint, rf"missing, the first: {prefix}layer_norm1.weight, expected shape \[1152\]")
    case.config(unfreeze_vision_tower=False)
    refused(case.checkpoint, "its weights count")


def test_a_whole_siglip_serves_as_tower(golden_copy: Copy) -> None:
    """A hub snapshot holds both halves of SigLIP; the text half is unreachable, the vision half as in a tower alone."""
    case = golden_copy("moiie_phi3")
    with ModelSource.open(case.checkpoint) as source:
        alone = {item.name: source.tensor(item) for item in source.weight_map.weights}
    config = json.loads((case.tower / "config.json").read_text())
    (case.tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": config}))
    text = {
        "text_model.embeddings.token_embedding.weight": np.zeros((5, 4), np.float32),
        "text_model.encoder.layers.0.mlp.fc1.weight": np.zeros((8, 4), np.float32),
        "logit_scale": np.zeros(1, np.float32),
        "logit_bias": np.zeros(1, np.float32),
    }
    case.tower_tensors(lambda tensors: {**tensors, **text})
    with ModelSource.open(case.checkpoint) as source:
        assert {source.weight_map.unreachable[name] for name in text} == {"the text half of SigLIP"}
        for item in source.weight_map.weights:
            np.testing.assert_array_equal(source.tensor(item), alone[item.name], strict=True)


def test_a_tokenizer_with_more_entries_than_rows_is_refused(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(vocab_size=351)
    refused(case.checkpoint, "the tokenizer has 352 entries, the embedding only 351 rows")


def test_the_end_token_of_llama_is_forced(golden_copy: Copy) -> None:
    """The authors' loader overrides both files (spec 5.4)."""
    case = golden_copy("moiie_llama3")
    case.config(eos_token_id=7)
    (case.checkpoint / "generation_config.json").write_text('{"eos_token_id": 9}')
    with ModelSource.open(case.checkpoint) as source:
        assert source.config.eos_token_id == (source.tokenizer.token_to_id("<|end_of_text|>"),) == (1,)
    tokenizer = (case.checkpoint / "tokenizer.json").read_text()
    (case.checkpoint / "tokenizer.json").write_text(tokenizer.replace("<|end_of_text|>", "<|other|>"))
    refused(case.checkpoint, "the tokenizer has no '<|end_of_text|>', which ends every answer".replace("|", r"\|"))


@pytest.mark.parametrize(
    ("generation", "eos"), [({"eos_token_id": [3, 5]}, (3, 5)), ({"eos_token_id": 4}, (4,)), ({}, (6,))]
)
def test_the_end_tokens_of_phi3_are_those_of_generation_config(
    golden_copy: Copy, generation: dict[str, Any], eos: tuple[int, ...]
) -> None:
    case = golden_copy("moiie_phi3")
    case.config(eos_token_id=6)
    (case.checkpoint / "generation_config.json").write_text(json.dumps(generation))
    with ModelSource.open(case.checkpoint) as source:
        assert source.config.eos_token_id == eos


@pytest.mark.parametrize("in_generation", [True, False])
def test_an_end_token_outside_the_vocabulary_is_refused(golden_copy: Copy, in_generation: bool) -> None:
    case = golden_copy("moiie_phi3")
    generation = case.checkpoint / "generation_config.json"
    if in_generation:
        generation.write_text('{"eos_token_id": [3, 352]}')
    else:
        generation.unlink()
        case.config(eos_token_id=352)
    refused(case.checkpoint, r"eos_token_id: 352 is not among the tokenizer's 352 entries")


def test_a_tower_name_that_no_file_system_holds_is_not_found(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    case.config(mm_vision_tower="siglip" * 1000)
    refused(case.checkpoint, "mm_vision_tower: found no directory")


def test_a_tokenizer_that_ends_every_text_is_refused(golden_copy: Copy) -> None:
    case = golden_copy("moiie_phi3")
    path = case.checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_eos_token": True}))
    refused(case.checkpoint, "add_eos_token: true is not implemented")


def test_hashes_name_every_file_that_counts() -> None:
    with ModelSource.open(GOLDEN / "moiie_phi3" / "checkpoint") as source:
        names = {
            f"{where}/{file}"
            for where in ("checkpoint", "vision_tower")
            for file in ("config.json", "model.safetensors")
        }
        assert set(source.hashes) == names
    with ModelSource.open(GOLDEN / "moiie_llama3" / "checkpoint") as source:
        assert not any(name.startswith("vision_tower/") for name in source.hashes)


def test_a_closed_source_gives_no_weights() -> None:
    with ModelSource.open(GOLDEN / "moiie_phi3" / "checkpoint") as source:
        pass
    with pytest.raises(MoiieError, match="after close"):
        weight(source, "decoder.norm.weight")
    with pytest.raises(MoiieError, match="after close"):
        weight(source, "vision_encoder.tower.embeddings.patch_embedding.bias")
