"""--config: what it changes, and everything it may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_export.convert.settings import load_settings, pretrained_positions
from moiie_export.mome_published import PUBLISHED
from moiie_runtime.errors import MoiieError


def settings(tmp_path: Path, changes: Any) -> tuple[dict[str, Any], Any]:
    path = tmp_path / "mome.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(changes))
    return load_settings(path)


def test_nothing_changed_is_the_published_model(tmp_path: Path) -> None:
    raw, config = load_settings(None)
    assert raw == PUBLISHED
    assert settings(tmp_path, {}) == (raw, config)
    assert settings(tmp_path, raw) == (raw, config)
    assert pretrained_positions(raw) == 1 + 37 * 37


def test_changes_go_as_deep_as_they_are_written(tmp_path: Path) -> None:
    dino = {"name": "dino", "hidden_size": 512, "adt": {"num_layers": 2}}
    raw, config = settings(
        tmp_path, {"vision_experts": [dino], "mole_config": {"num_experts": 8}, "eos_token_id": [2, 5]}
    )
    clip, found, pix2struct = raw["vision_experts"]
    assert (clip, pix2struct) == (PUBLISHED["vision_experts"][0], PUBLISHED["vision_experts"][2])
    assert found == {
        **PUBLISHED["vision_experts"][1],
        "hidden_size": 512,
        "adt": {**PUBLISHED["vision_experts"][1]["adt"], "num_layers": 2},
    }
    assert (config.mole.num_experts, config.mole.bottleneck, config.eos_token_id) == (8, 64, (2, 5))
    assert PUBLISHED["vision_experts"][1]["hidden_size"] == 1024  # the original is untouched


WRONG = [
    ({"text_confg": {}}, "mome.json: 'text_confg' is no key of a MoME's config.json", "did you mean 'text_config'"),
    ({"text_config": {"hidden": 1}}, "mome.json: text_config: 'hidden' is no key", ""),
    ({"text_config": 4096}, "mome.json: text_config: expected an object, found 4096", ""),
    ({"vision_experts": {}}, "mome.json: vision_experts: expected a list of objects", ""),
    (
        {"vision_experts": [{"hidden_size": 8}]},
        r"vision_experts\[0\]: name: expected each of clip, dino, pix2struct",
        "",
    ),
    ({"vision_experts": [{"name": "sam"}]}, r"vision_experts\[0\]: name: .* found 'sam'", ""),
    ({"vision_experts": [{"name": "dino"}, {"name": "dino"}]}, r"vision_experts\[1\]: name: expected each", ""),
    ({"vision_experts": [{"name": ["dino"]}]}, r"vision_experts\[0\]: name: expected each", ""),
    ({"vision_experts": [{"name": "dino", "depth": 3}]}, "vision_experts: dino: 'depth' is no key", ""),
    (
        {"vision_experts": [{"name": "dino", "num_attention_heads": 7}]},
        "mome.json: vision_experts.1.: hidden_size = 1024",
        "",
    ),
    ({"mole_config": {"top_k": 2}}, "mome.json: mole_config: top_k: 2 is not implemented", ""),
    ({"model_type": "llava"}, "mome.json: model_type: 'llava' is not implemented", ""),
    ("[]", "mome.json: expected a JSON object, found a list", "--config"),
    ("{", "mome.json: not valid JSON", "--config"),
    ('{"eos_token_id": 2, "eos_token_id": 3}', "key 'eos_token_id' appears twice", ""),
]


@pytest.mark.parametrize(("changes", "message", "hint"), WRONG)
def test_what_it_may_not_say(tmp_path: Path, changes: Any, message: str, hint: str) -> None:
    with pytest.raises(MoiieError, match=message) as caught:
        settings(tmp_path, changes)
    assert hint in (caught.value.hint or "")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="gone.json: no such file"):
        load_settings(tmp_path / "gone.json")


def test_a_table_of_positions_has_to_be_a_grid(tmp_path: Path) -> None:
    dino = {"name": "dino", "pretrained_image_size": 520}
    raw, _ = settings(tmp_path, {"vision_experts": [dino]})
    with pytest.raises(MoiieError, match="pretrained_image_size = 520 is not a multiple of patch_size = 14"):
        pretrained_positions(raw)
