"""Sections of the manifest that only bundles with several vision experts and adapters have."""

from __future__ import annotations

import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_settings import AdapterBanks, InstanceRouter
from moiie_runtime.manifest import read_manifest
from moiie_runtime.vision_settings import Encoder, ImageSettings, PatchSettings
from tests.runtime import instance_bundle as made

HALF = (0.5, 0.5, 0.5)


def test_sections_become_settings():
    data = made.manifest()
    data["vision_experts"][1]["mean_abs_feature"] = 2
    found = read_manifest(data, "x")
    assert found.encoders == (
        Encoder("clip", "vision_clip", 5, True, ImageSettings(4, "square", HALF, HALF, 1 / 255, "bicubic")),
        Encoder("dino", "vision_dino", 4, False, ImageSettings(6, "square", HALF, HALF, 1 / 255, "bicubic"), 2.0),
        Encoder("pix2struct", "vision_pix2struct", 4, False, PatchSettings(2, 12, (2, 2))),
    )
    assert found.instance_router == InstanceRouter("router", "sentence_encoder/tokenizer.json", 6)
    assert found.adapters == AdapterBanks("onnx/weights.safetensors", (0, 1), 3)
    assert found.prompt.separator == "\x1e"
    assert list(found.phases) == list(made.COMPONENTS)
    assert found.phases["vision_dino"] == "vision_dino"
    assert (found.phases["decoder_prefill"], found.phases["decoder_decode"]) == ("prefill", "decode")


def test_a_bundle_with_one_encoder_has_none_of_these_sections(manifest):
    found = read_manifest(manifest, "x")
    [encoder] = found.encoders
    assert (encoder.component, encoder.tokens, encoder.cls) == ("vision_encoder", 729, False)
    assert encoder.processor.aspect_ratio == "pad"
    assert (found.instance_router, found.adapters, found.prompt.separator) == (None, None, None)
    assert list(found.phases) == ["vision_encoder", "decoder_prefill", "decoder_decode"]


def set_at(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vision_experts",), [], r"'vision_experts' must be a list of at least one object"),
        (("vision_experts", 0, "cls"), KeyError, r"key 'vision_experts\[0\]\.cls' is missing"),
        (("vision_experts", 1, "tokens"), 5, r"'vision_experts\[1\]\.tokens' must be 4, because image_tokens is 5"),
        (("vision_experts", 0, "cls"), False, r"'vision_experts\[1\]\.tokens' must be 5, because image_tokens is 5"),
        (("vision_experts", 1, "cls"), True, r"cls' must be true for one expert at most, not for clip and dino"),
        (("vision_experts", 1, "processor", "kind"), "crop", r'must be "squash" or "patches"'),
        (("vision_experts", 1, "processor", "std"), [0.5, 0.5, 0], r"std' must be a list of 3 numbers above 0"),
        (("vision_experts", 2, "processor", "query_grid"), [4], r"query_grid' must be a list of two integers"),
        (
            ("vision_experts", 2, "processor", "query_grid"),
            [1, 3],
            r"query_grid' must be two integers whose product is 4",
        ),
        (("vision_experts", 2, "processor", "max_patches"), 0, r"max_patches' must be an integer from 1"),
        (("vision_experts", 2, "mean_abs_feature"), 0, r"mean_abs_feature' must be a number above 0"),
        (("vision_experts", 2, "component"), "vision_more", r"key 'components\.vision_more' is missing"),
        (
            ("instance_router",),
            KeyError,
            r"key 'instance_router' is missing \(expected an object, because `vision_experts`",
        ),
        (("instance_router", "max_length"), 2, r"max_length' must be an integer from 3"),
        (("adapters", "layers"), [0, 2], r"'adapters\.layers' must be a list of integers from 0 to 1"),
        (("adapters", "num_experts"), 0, r"'adapters\.num_experts' must be an integer"),
        (("adapters", "layers"), [0], r"outputs' must be a list with mole_index \[batch, 1\]"),
        (("components", "router", "outputs"), [], r"outputs' must be a list with move_weights \[batch, 3\]"),
        (("components", "vision_dino"), KeyError, r"key 'components\.vision_dino' is missing"),
        (("residency", "router"), KeyError, r"key 'residency\.router' is missing"),
        (("prompt", "separator"), "\n", "separator' must be one control character other than a line break"),
        (("prompt", "separator"), "|", "separator' must be one control character"),
        (("prompt", "separator"), "\x1e\x1e", "separator' must be one control character"),
    ],
)
def test_what_does_not_fit_is_named(path, value, message):
    data = made.manifest()
    set_at(data, path, value)
    with pytest.raises(MoiieError, match=message):
        read_manifest(data, "bundle.json")


def test_adapters_need_a_router(manifest):
    manifest["adapters"] = {"file": "onnx/weights.safetensors", "layers": [0], "num_experts": 2}
    with pytest.raises(MoiieError, match="expected an object, because `adapters` is there"):
        read_manifest(manifest, "x")


def test_only_a_model_without_experts_can_leave_modality_out(manifest):
    del manifest["modality"]
    with pytest.raises(MoiieError, match="key 'modality' is missing"):
        read_manifest(manifest, "x")
    manifest["model"]["moe"] = None
    assert not read_manifest(manifest, "x").modality.last_image_token_is_language


@pytest.mark.parametrize(("section", "key"), [("instance_router", "tokenizer"), ("adapters", "file")])
def test_files_of_these_sections_are_inside_the_bundle_and_listed(tmp_path, section, key):
    data = made.manifest()
    data[section][key] = "../elsewhere"
    with pytest.raises(MoiieError, match="without `..`"):
        Bundle.open(made.write(tmp_path / "bundle", data))
    data[section][key] = "elsewhere"
    with pytest.raises(MoiieError, match="`elsewhere` is used but `files` does not list it"):
        Bundle.open(made.write(tmp_path / "bundle", data))
