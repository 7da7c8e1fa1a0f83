"""Rows of pictures: the weighted sum, what is cached, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.feature_cache import FeatureCache
from moiie_runtime.images import Picture, load_image
from moiie_runtime.instance_routing import Instance
from moiie_runtime.sessions import Sessions
from moiie_runtime.vision import Vision, encoder_inputs
from tests.runtime import instance_bundle as made

WEIGHTS = Instance(np.array([0.5, 0.2, 0.3], np.float32), np.zeros(2, np.int32))


def opened(tmp_path, budget=2**20, data=None, skip_below=None):
    graphs, bundle = made.Graphs(), Bundle.open(made.write(tmp_path / "bundle", data))
    return Vision(bundle, Sessions(bundle, graphs), FeatureCache(budget), skip_below), graphs, bundle


def pictures(*seeds):
    return [Picture(load_image(made.picture(seed))) for seed in seeds]


def features(bundle, shown):
    return [made.see(encoder.component, encoder_inputs(encoder, shown))[0] for encoder in bundle.encoders]


def test_rows_are_the_class_token_and_the_weighted_sum(tmp_path):
    vision, _, bundle = opened(tmp_path)
    shown = pictures(0, 1)
    found = vision.rows(shown, WEIGHTS)
    assert found.rows.shape == (2, 5, made.HIDDEN)
    sizes = np.zeros(3)
    for row, each in zip(found.rows, shown, strict=True):
        clip, dino, pix = features(bundle, each)
        np.testing.assert_array_equal(row[0], clip[0])
        parts = [0.5 * clip[1:], 0.2 * dino, 0.3 * pix]
        np.testing.assert_allclose(row[1:], sum(parts), atol=1e-6)
        sizes += [np.abs(part).mean() for part in parts]
    np.testing.assert_allclose(found.contributions, sizes / sizes.sum(), rtol=1e-5)


def test_a_second_question_on_a_picture_runs_no_encoder(tmp_path):
    vision, graphs, _ = opened(tmp_path)
    first = vision.rows(pictures(0), WEIGHTS)
    assert graphs.runs == {"vision_clip": 1, "vision_dino": 1, "vision_pix2struct": 1}
    np.testing.assert_array_equal(vision.rows(pictures(0), WEIGHTS).rows, first.rows)
    other = vision.rows(pictures(0), Instance(np.array([0, 0, 1], np.float32), WEIGHTS.mole_index))
    assert not np.allclose(other.rows, first.rows)
    assert graphs.runs.total() == 3
    assert (vision._cache.hits, vision._cache.misses) == (6, 3)
    vision.rows(pictures(0, 1), WEIGHTS)
    assert graphs.runs.total() == 6


def test_a_cache_that_holds_little_or_nothing_changes_no_number(tmp_path):
    vision, graphs, bundle = opened(tmp_path)
    expected = vision.rows(pictures(0, 1, 0), WEIGHTS).rows
    for budget, runs in ((0, 9), (made.HIDDEN * 4 * 4, 9), (made.HIDDEN * 4 * 13, 9), (made.HIDDEN * 4 * 26, 6)):
        graphs = made.Graphs()
        small = Vision(bundle, Sessions(bundle, graphs), FeatureCache(budget))
        np.testing.assert_array_equal(small.rows(pictures(0, 1, 0), WEIGHTS).rows, expected)
        assert graphs.runs.total() == runs
        assert small._cache.nbytes <= budget


def test_without_a_cache_no_picture_is_hashed(tmp_path, monkeypatch):
    vision, _, _ = opened(tmp_path, budget=0)
    monkeypatch.setattr(Picture, "digest", property(lambda picture: pytest.fail("was hashed")))
    vision.rows(pictures(0), WEIGHTS)


def test_a_digest_is_that_of_the_pixels_and_the_size():
    array = np.zeros((4, 6, 3), np.uint8)
    digest = Picture(load_image(array)).digest
    assert digest == Picture(load_image(array.copy())).digest
    assert digest != Picture(load_image(array.reshape(6, 4, 3))).digest
    array[3, 5, 2] = 1
    assert digest != Picture(load_image(array)).digest


def test_hashing_in_bands_equals_hashing_at_once(monkeypatch):
    whole = Picture(load_image(made.picture(width=13, height=11))).digest
    monkeypatch.setattr("moiie_runtime.images._BAND_PIXELS", 30)
    assert Picture(load_image(made.picture(width=13, height=11))).digest == whole


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 1), (100, 10), (10, 100)])
def test_pictures_below_a_patch_and_strips_work(tmp_path, width, height):
    vision, graphs, _ = opened(tmp_path)
    found = vision.rows([Picture(load_image(made.picture(0, width, height)))], WEIGHTS)
    assert np.isfinite(found.rows).all()
    [fed] = graphs.fed["vision_pix2struct"]
    columns, rows = fed["grid_size"][0].astype(int)
    assert fed["flattened_patches"].shape == (1, rows * columns, 14)
    assert fed["pool_matrix"].shape == (1, 4, rows * columns)
    assert 1 <= rows * columns <= 12


def calibrated(*means):
    data = made.manifest()
    for expert, mean in zip(data["vision_experts"], means, strict=True):
        expert["mean_abs_feature"] = mean
    return data


def test_experts_of_little_expected_weight_are_left_out_when_asked(tmp_path):
    # Shares 0.5, 0.4 and 0.1 of the sum of weight times mean.
    data = calibrated(1.0, 2.0, 1 / 3)
    exact = opened(tmp_path / "a", data=data)[0].rows(pictures(0), WEIGHTS)
    vision, graphs, bundle = opened(tmp_path / "b", data=data, skip_below=0.11)
    found = vision.rows(pictures(0), WEIGHTS)
    assert "vision_pix2struct" not in graphs.opened
    clip, dino, _ = features(bundle, pictures(0)[0])
    np.testing.assert_allclose(found.rows[0, 1:], 0.5 * clip[1:] + 0.2 * dino, atol=1e-6)  # not made up for
    assert found.contributions[2] == 0
    assert found.contributions.sum() == pytest.approx(1)
    np.testing.assert_array_equal(found.rows[0, 0], exact.rows[0, 0])
    below = opened(tmp_path / "c", data=data, skip_below=0.09)[0].rows(pictures(0), WEIGHTS)
    np.testing.assert_array_equal(below.rows, exact.rows)


def test_the_expert_with_the_class_token_and_the_largest_always_run(tmp_path):
    vision, graphs, _ = opened(tmp_path, data=calibrated(0.1, 5.0, 1.0), skip_below=0.99)
    vision.rows(pictures(0), WEIGHTS)
    assert sorted(graphs.opened) == ["vision_clip", "vision_dino"]


def test_skipping_needs_a_calibration_and_a_sensible_limit(tmp_path):
    with pytest.raises(MoiieError, match="needs the calibration `mean_abs_feature` .*; dino, pix2struct has none"):
        opened(tmp_path, data=calibrated(1.0, None, None), skip_below=0.1)
    for limit in (0, 1, -0.1, 1.5, True, "0.1", float("nan")):
        with pytest.raises(MoiieError, match="skip_below must be a number between 0 and 1"):
            opened(tmp_path, data=calibrated(1.0, 1.0, 1.0), skip_below=limit)


def test_a_bundle_with_one_encoder_has_nothing_to_skip(manifest, write_bundle):
    bundle = Bundle.open(write_bundle(manifest))
    with pytest.raises(MoiieError, match="skip_below has no effect"):
        Vision(bundle, Sessions(bundle, made.Graphs()), FeatureCache(0), 0.1)


def test_features_of_another_shape_are_named(tmp_path, monkeypatch):
    vision, _, _ = opened(tmp_path)
    monkeypatch.setattr(made, "see", lambda component, feeds: np.zeros((1, 7, made.HIDDEN), np.float32))
    with pytest.raises(MoiieError, match=r"vision_clip: image_features of a picture is \[7, 8\], .* says \[5, 8\]"):
        vision.rows(pictures(0), WEIGHTS)
