"""transformers as a second oracle: its SigLIP, LLaMA and Phi-3 on small random weights, read as a checkpoint of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from safetensors.torch import save_file

from moiie_export.config import parse_config
from moiie_export.model.load import load_model
from moiie_export.model.siglip import SiglipTower
from moiie_export.model.vlm import VlmModel
from moiie_export.source import ModelSource
from tests.synthetic_tokenizer import special_ids, write_tokenizer

HIDDEN, INNER, VOCAB, LENGTH, WINDOW = 32, 48, 320, 21, 6
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 45,
    "patch_size": 14,
}


def random_weights(model: torch.nn.Module, seed: int) -> Any:
    """Large enough that every part matters; transformers initialises with 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return random_weights(SiglipVisionModel(SiglipVisionConfig(**TOWER)), 1)


def language_model(kind: str) -> Any:
    """LLaMA with grouped keys, or Phi-3 with a short window: theirs counts a query itself among its W keys, ours does not."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        return random_weights(transformers.LlamaForCausalLM(config), 2)
    config = transformers.Phi3Config(**sizes, sliding_window=WINDOW + 1)
    return random_weights(transformers.Phi3ForCausalLM(config), 3)


def write(directory: Path, kind: str, language: Any, tower: Any) -> Path:
    """A dense checkpoint in the authors' layout around two transformers models; the tower as save_pretrained leaves it."""
    directory.mkdir()
    tower.save_pretrained(directory.parent / "siglip")
    projector = {
        "model.mm_projector.0.weight": torch.randn(HIDDEN, TOWER["hidden_size"]),
        "model.mm_projector.0.bias": torch.randn(HIDDEN),
        "model.mm_projector.2.weight": torch.randn(HIDDEN, HIDDEN),
        "model.mm_projector.2.bias": torch.randn(HIDDEN),
    }
    save_file({**language.state_dict(), **projector}, directory / "model.safetensors")
    config = {
        "model_type": {"llama": "bunny-llama", "phi3": "bunny-phi3"}[kind],
        "mm_vision_tower": "siglip",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": {"llama": 500000.0, "phi3": 10000.0}[kind],
        "max_position_embeddings": 128,
        "sliding_window": WINDOW,
        **special_ids(kind),
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, kind, VOCAB)
    return directory


@pytest.fixture(scope="module", params=["llama", "phi3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, siglip: Any
) -> Iterator[tuple[Any, VlmModel]]:
    """Theirs and ours with the same weights."""
    theirs = language_model(request.param)
    with ModelSource.open(write(tmp_path_factory.mktemp("oracle") / "model", request.param, theirs, siglip)) as source:
        yield theirs, load_model(source)


def decode(model: VlmModel, ids: torch.Tensor, past: int, cache: Any) -> Any:
    """Our decoder over token ids [B, T]."""
    with torch.no_grad():
        return model.decoder(model.embed_tokens(ids), None, torch.full((len(ids),), past), None, cache)


def test_decoder_equals_transformers(pair: tuple[Any, VlmModel]) -> None:
    """All logits and the residual stream behind every layer, two rows; the sequence is longer than the window."""
    theirs, ours = pair
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    expected = theirs(ids, output_hidden_states=True)
    output = decode(ours, ids, 0, ours.new_cache(2, LENGTH))
    np.testing.assert_allclose(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    # transformers norms its last hidden state, so that one is not comparable
    for mine, their in zip(output.hidden[:-1], expected.hidden_states[1:-1], strict=True):
        np.testing.assert_allclose(mine.view(2, LENGTH, HIDDEN), their, atol=1e-5, rtol=1e-5)


def test_token_by_token_equals_transformers_at_once(pair: tuple[Any, VlmModel]) -> None:
    theirs, ours = pair
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = theirs(ids).logits
    cache, logits = ours.new_cache(1, LENGTH + 3), []
    for position in range(LENGTH):
        output = decode(ours, ids[:, position : position + 1], position, cache)
        cache = output.present
        logits.append(output.logits)
    np.testing.assert_allclose(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_the_window_is_exact(pair: tuple[Any, VlmModel]) -> None:
    """One key more or less is a large difference, so the comparison above settles the off-by-one (spec 4.5)."""
    theirs, ours = pair
    window = ours.config.text.visible_keys
    if window is None:
        pytest.skip("LLaMA has no window")
    assert window == WINDOW + 1
    ids = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(6))
    expected = theirs(ids).logits
    try:
        for other in (WINDOW, WINDOW + 2):
            for layer in ours.decoder.layers:
                layer.self_attn.window = other
            difference = (decode(ours, ids, 0, ours.new_cache(1, LENGTH)).logits - expected).abs()
            assert float(difference.max()) > 1e-2
    finally:
        for layer in ours.decoder.layers:
            layer.self_attn.window = window


def test_tower_equals_transformers(pair: tuple[Any, VlmModel], siglip: Any) -> None:
    """hidden_states[-2], on a picture whose last pixels fall outside the patches (spec 1.1)."""
    pixels = torch.randn(2, 3, 45, 45, generator=torch.Generator().manual_seed(7))
    expected = siglip(pixels, output_hidden_states=True).hidden_states[-2]
    with torch.no_grad():
        projected, features = pair[1].vision_encoder(pixels)
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=1e-5)
    first, second = pair[1].vision_encoder.projector[0], pair[1].vision_encoder.projector[2]
    by_hand = F.gelu(expected @ first.weight.T + first.bias) @ second.weight.T + second.bias
    np.testing.assert_allclose(projected, by_hand, atol=1e-4, rtol=1e-5)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, which PyTorch uses."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic along one axis at a time, borders clamped, no antialiasing: [..., S, S] -> [..., size, size]."""
    side = pixels.shape[-1]
    matrix = np.zeros((size, side))
    for i in range(size):
        centre = (i + 0.5) * side / size - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), side - 1)] += cubic(centre - tap)
    return matrix @ pixels @ matrix.T


def test_scales_equal_an_independent_implementation(siglip: Any) -> None:
    """S2 by spec 1.2 in numpy around transformers' tower: tiles, chessboard, mean over blocks, channels by scale."""
    raw = json.loads((Path(__file__).parents[2] / "golden" / "moiie_phi3" / "checkpoint" / "config.json").read_text())
    tower = {**TOWER, "model_type": "siglip_vision_model"}
    settings = {"use_s2": True, "s2_scales": "45,90,135", "mm_hidden_size": 48}
    vision = parse_config({**raw, **settings}, tower).vision
    ours = SiglipTower(vision).requires_grad_(False)
    state = siglip.state_dict()
    renamed = {name.replace("encoder.layers.", "layers."): value for name, value in state.items()}
    ours.load_state_dict({name: renamed[name] for name in ours.state_dict()})
    pixels = np.random.default_rng(8).standard_normal((2, 3, 135, 135)).astype(np.float32)

    features = []
    for n in (1, 2, 3):
        scaled = shrink(pixels.astype(np.float64), 45 * n).astype(np.float32)
        if n == 3:
            np.testing.assert_allclose(scaled, pixels, atol=1e-6)
        if n == 1:  # a decimation: pixel 3i + 1 (spec 1.2)
            np.testing.assert_allclose(scaled, pixels[..., 1::3, 1::3], atol=1e-6)
        board = np.zeros((2, 16, 3 * n, 3 * n), np.float32)
        for i in range(n):
            for j in range(n):
                tile = torch.from_numpy(scaled[..., 45 * i : 45 * (i + 1), 45 * j : 45 * (j + 1)].copy())
                encoded = siglip(tile, output_hidden_states=True).hidden_states[-2].numpy()
                board[..., 3 * i : 3 * (i + 1), 3 * j : 3 * (j + 1)] = encoded.reshape(2, 3, 3, 16).transpose(
                    0, 3, 1, 2
                )
        features.append(board.reshape(2, 16, 3, n, 3, n).mean(axis=(3, 5)).reshape(2, 16, 9).transpose(0, 2, 1))
    expected = np.concatenate(features, axis=2)
    np.testing.assert_allclose(ours(torch.from_numpy(pixels)), expected, atol=2e-5, rtol=1e-5)
    alone = SiglipTower(replace(vision, scales=())).requires_grad_(False)
    alone.load_state_dict(ours.state_dict())
    np.testing.assert_allclose(alone(torch.from_numpy(pixels[..., 1::3, 1::3].copy())), expected[..., :16], atol=1e-5)
