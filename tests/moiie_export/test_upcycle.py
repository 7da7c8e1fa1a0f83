"""Upcycling: what is copied, what is drawn, that the sparse model first computes what the dense one does, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_writer import INDEX
from moiie_export.model.load import load_model
from moiie_export.model.moe import MoeBlock
from moiie_export.source import ModelSource
from moiie_export.upcycle import Upcycling, check_upcycled, upcycle
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensor_header import read_header
from moiie_runtime.tensor_writer import TensorWriter
from tests.conftest import GoldenCase

DENSE = GoldenCase("dense_phi3")
TOWER = DENSE.path / "vision_tower" / "siglip-tiny-patch14-384"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("upcycled") / "sparse"
    upcycle(DENSE.checkpoint, output, Upcycling(num_experts=4, top_k=2, seed=3))
    return output


def rows_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])


def test_experts_are_copies_and_all_else_is_unchanged(sparse: Path) -> None:
    check_upcycled(DENSE.checkpoint, sparse)
    with Checkpoint.open(DENSE.checkpoint) as dense, Checkpoint.open(sparse) as made:
        for name in dense.tensors:
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            if layer % 2 and ".mlp." in name:
                names = [name.replace(".mlp.", f".mlp.experts.{e}.") for e in range(4)]
                assert name not in made.tensors
            else:
                names = [name]
            for copy in names:
                assert made.raw_dtype(copy) == dense.raw_dtype(name)
                np.testing.assert_array_equal(rows_of(made, copy), rows_of(dense, name))


def test_gates_are_drawn_by_seed(sparse: Path, tmp_path: Path) -> None:
    upcycle(DENSE.checkpoint, tmp_path / "same", Upcycling(seed=3))
    upcycle(DENSE.checkpoint, tmp_path / "other", Upcycling(seed=4))
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (sparse / "model.safetensors").read_bytes()
    with Checkpoint.open(sparse) as one, Checkpoint.open(tmp_path / "other") as other:
        gates = [name for name in one.tensors if name.endswith((".gate.weight", ".gate_vis.weight"))]
        values = {name: rows_of(one, name) for name in gates}
        hidden = one.config["hidden_size"]
        assert gates
        assert all(value.shape == (3, hidden) for value in values.values())
        assert all((values[name] != rows_of(other, name)).any() for name in gates)
        drawn = np.concatenate([value.ravel() for value in values.values()])
        assert abs(drawn.std() - 0.02) < 0.02 * 4 / np.sqrt(2 * drawn.size)
        assert len({value.tobytes() for value in values.values()}) == len(gates)


def test_config_is_that_of_the_moiie_class(sparse: Path) -> None:
    before = json.loads((DENSE.checkpoint / "config.json").read_text())
    after = json.loads((sparse / "config.json").read_text())
    assert after["model_type"] == "bunny-mm-phi3-moe-s"
    assert after["architectures"] == ["BunnyMMSPhi3MoEForCausalLM"]
    assert (after["num_experts"], after["num_experts_per_tok"]) == (4, 2)
    assert after["router_jitter_noise"] == 0.0
    assert after["output_vis_router_logits"] is after["output_lan_router_logits"] is False
    changed = {"model_type", "architectures", "output_vis_router_logits", "output_lan_router_logits"}
    assert {key: after[key] for key in before if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (sparse / name).read_bytes() == (DENSE.checkpoint / name).read_bytes()


def test_moe_output_is_the_dense_feed_forward(sparse: Path) -> None:
    with ModelSource.open(DENSE.checkpoint, TOWER) as source:
        dense_model = load_model(source)
    with ModelSource.open(sparse, TOWER) as source:
        sparse_model = load_model(source)
    generator = torch.Generator().manual_seed(0)
    blocks = 0
    for one, other in zip(dense_model.decoder.layers, sparse_model.decoder.layers, strict=True):
        if not isinstance(other.mlp, MoeBlock):
            continue
        x = torch.randn(40, dense_model.config.text.hidden_size, generator=generator)
        modality = torch.randint(0, 2, (40,), generator=generator, dtype=torch.int32)
        out, routing = other.mlp(x, modality)
        torch.testing.assert_close(out, one.mlp(x), rtol=1e-5, atol=1e-6)
        assert len(routing.expert_ids.unique()) == 4
        blocks += 1
    assert blocks


def test_logits_are_the_dense_model_s(sparse: Path) -> None:
    logits = []
    for path in (DENSE.checkpoint, sparse):
        with ModelSource.open(path, TOWER) as source:
            model = load_model(source)
        ids = torch.arange(1, 25).view(1, -1)
        modality = torch.zeros(1, 24, dtype=torch.int32)
        modality[:, 4:15] = 1
        with torch.no_grad():
            out = model.decoder(
                model.embed_tokens(ids), modality, torch.zeros(1, dtype=torch.int64), None, model.new_cache(1, 32)
            )
        logits.append(out.logits)
    assert logits[0].abs().max() > 0.01
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_the_back_check_finds_a_changed_bit(sparse: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sparse, broken)
    with Checkpoint.open(sparse) as made:
        name = next(name for name in made.tensors if ".experts.2." in name)
    info = read_header(broken / "model.safetensors")[name]
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[info.offset + info.nbytes - 1] ^= 0x10
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(MoiieError, match=r"experts\.2\."):
        check_upcycled(DENSE.checkpoint, broken)


def dense_llama(directory: Path, dtype: str) -> Path:
    """A dense two-shard LLaMA checkpoint with made-up weights."""
    directory.mkdir()
    hidden, inner = 8, 12
    config = {
        "model_type": "bunny-llama",
        "architectures": ["BunnyLlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    for shard, layers in enumerate(((0, 1), (2, 3)), start=1):
        specs = {}
        for layer in layers:
            for leaf, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                specs[f"model.layers.{layer}.mlp.{leaf}.weight"] = (dtype, shape)
            specs[f"model.layers.{layer}.input_layernorm.weight"] = (dtype, (hidden,))
        file = f"model-0000{shard}-of-00002.safetensors"
        with TensorWriter(directory / file, specs) as writer:
            for name, (_, shape) in specs.items():
                values = rng.standard_normal(shape).astype(np.float32)
                writer.write((values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values, name)
        weight_map |= dict.fromkeys(specs, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_shards_in_and_out_keep_the_dtype(tmp_path: Path, dtype: str) -> None:
    dense = dense_llama(tmp_path / "dense", dtype)
    result = upcycle(dense, tmp_path / "sparse", Upcycling(shard_bytes=2000))
    check_upcycled(dense, result.path)
    assert result.layers == (1, 3)
    assert len(result.files) > 1
    index = json.loads((result.path / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(result.files)
    with Checkpoint.open(result.path) as made:
        assert {entry.dtype for entry in made.tensors.values()} == {dtype}
        assert made.config["model_type"] == "bunny-mm-llama3-moe-s"
        assert len([name for name in made.tensors if ".experts." in name]) == 2 * 4 * 3


def test_a_converted_checkpoint_gets_its_gates_only(tmp_path: Path) -> None:
    dense = dense_llama(tmp_path / "dense", "F32")
    upcycle(dense, tmp_path / "sparse", Upcycling(seed=5))
    converted = tmp_path / "converted"
    converted.mkdir()
    shutil.copy(tmp_path / "sparse" / "config.json", converted)
    with Checkpoint.open(tmp_path / "sparse") as made:
        kept = {n: ("F32", t.shape) for n, t in made.tensors.items() if ".gate." not in n and ".gate_vis." not in n}
        with TensorWriter(converted / "model.safetensors", kept) as writer:
            for name in kept:
                writer.write(rows_of(made, name), name)
    upcycle(converted, tmp_path / "again", Upcycling(seed=5))
    with Checkpoint.open(tmp_path / "sparse") as one, Checkpoint.open(tmp_path / "again") as other:
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            np.testing.assert_array_equal(rows_of(one, name), rows_of(other, name))
    with pytest.raises(MoiieError, match="converted with 4, asked for 6"):
        upcycle(converted, tmp_path / "six", Upcycling(num_experts=6))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("moiie_llama3", "is sparse already"),
        ("vanilla_moe_phi3", "cannot be upcycled"),
        ("modality_hard_phi3", "cannot be upcycled"),
        ("modality_moe_phi3", "cannot be upcycled"),
    ],
)
def test_sparse_models_are_refused(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(MoiieError, match=message):
        upcycle(GoldenCase(case).checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "message"), [("mm_projector.bin", "projector"), ("adapter_config.json", "LoRA")])
def test_parts_of_models_are_refused(tmp_path: Path, file: str, message: str) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / file).write_text("{}")
    with pytest.raises(MoiieError, match=message):
        upcycle(part, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [(Upcycling(1), "at least 2"), (Upcycling(2), "may reach 1"), (Upcycling(4, 4), "may reach 3")],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, options: Upcycling, message: str) -> None:
    with pytest.raises(MoiieError, match=message):
        upcycle(DENSE.checkpoint, tmp_path / "out", options)


def test_an_incomplete_checkpoint_and_an_existing_output_are_refused(tmp_path: Path) -> None:
    dense = dense_llama(tmp_path / "dense", "F32")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(MoiieError, match=r"model\.layers\.5\.mlp\.gate_proj\.weight is missing"):
        upcycle(dense, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(MoiieError, match="exists already"):
        upcycle(DENSE.checkpoint, tmp_path / "full")


def test_a_killed_run_leaves_no_output_and_is_repeated(tmp_path: Path) -> None:
    def stop(_: str, done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(DENSE.checkpoint, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    upcycle(DENSE.checkpoint, tmp_path / "out")
    check_upcycled(DENSE.checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
