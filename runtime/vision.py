"""Pictures as rows of the decoder's input: one encoder, or several weighed by the instruction (spec mome.md, 1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.feature_cache import FeatureCache
from moiie_runtime.images import Picture, pixel_values
from moiie_runtime.instance_routing import Instance
from moiie_runtime.pix2struct import patch_inputs
from moiie_runtime.sessions import Sessions
from moiie_runtime.vision_settings import Encoder, PatchSettings

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PictureRows:
    """The pictures of one request.

    Attributes:
        rows: float32 [images, image_tokens, hidden].
        contributions: see `Instance`; None where nothing is weighed.
    """

    rows: Floats
    contributions: Floats | None


class Vision:
    """Runs the vision encoders of a bundle, each only on pictures whose features are not kept from before.

    Args:
        bundle: an opened bundle.
        sessions: its graphs.
        cache: features by picture and encoder.
        skip_below: encoders whose share, estimated from their weight and `mean_abs_feature`, is below this are not run,
            and what they would add is left out. This is an approximation, not part of the model: the weights of the
            others stay as they are, and what it costs in accuracy is for the user to measure. The encoder with the
            class token always runs. None runs all.

    Raises:
        MoiieError: `skip_below` out of range, or for a bundle that has nothing to skip or was not calibrated.
    """

    def __init__(
        self, bundle: Bundle, sessions: Sessions, cache: FeatureCache, skip_below: float | None = None
    ) -> None:
        self._encoders = bundle.encoders
        self._shape = (bundle.tokens.image_tokens, bundle.model.hidden_size)
        self._sessions = sessions
        self._cache = cache
        self._skip_below = skip_below
        if skip_below is not None and not (_is_number(skip_below) and 0 < skip_below < 1):
            raise MoiieError(f"skip_below must be a number between 0 and 1, got {skip_below!r}")
        self._mean_abs = None if skip_below is None else _calibration(bundle)

    def rows(self, pictures: Sequence[Picture], instance: Instance | None = None) -> PictureRows:
        """What stands in the decoder's input for each picture.

        Args:
            pictures: those of one request.
            instance: the weights of the encoders; None for a bundle without an instance router.

        Returns:
            The features of the only encoder; or the class token, unweighted, and below it the weighted sum.
        """
        rows = np.zeros((len(pictures), *self._shape), np.float32)
        if instance is None:
            for row, picture in zip(rows, pictures, strict=True):
                row[:] = self._features(self._encoders[0], picture)
            return PictureRows(rows, None)
        sizes = np.zeros(len(self._encoders))
        skipped = self._skipped(instance)
        # One picture at a time: activations are then bounded by one, whatever their number.
        for row, picture in zip(rows, pictures, strict=True):
            for index, encoder in enumerate(self._encoders):
                if index in skipped:
                    continue
                features = self._features(encoder, picture)
                queries = features[1:] if encoder.cls else features
                weighted = instance.move_weights[index] * queries
                row[len(row) - len(queries) :] += weighted
                sizes[index] += np.abs(weighted).mean()
                if encoder.cls:
                    row[0] = features[0]
        return PictureRows(rows, (sizes / max(sizes.sum(), np.finfo(np.float64).tiny)).astype(np.float32))

    def _skipped(self, instance: Instance) -> list[int]:
        if self._skip_below is None or self._mean_abs is None:
            return []
        shares = instance.move_weights * self._mean_abs
        shares = shares / shares.sum()
        least = min(self._skip_below, shares.max())  # the largest runs, whatever the limit
        return [index for index, encoder in enumerate(self._encoders) if shares[index] < least and not encoder.cls]

    def _features(self, encoder: Encoder, picture: Picture) -> Floats:
        """[tokens, hidden] of one encoder, from the cache or by running it."""
        if not self._cache.budget:
            return self._run(encoder, picture)
        key = (picture.digest, encoder.component)
        features = self._cache.get(key)
        if features is None:
            features = self._run(encoder, picture)
            self._cache.put(key, features)
        return features

    def _run(self, encoder: Encoder, picture: Picture) -> Floats:
        inputs = encoder_inputs(encoder, picture)
        with self._sessions.lock:
            outputs = self._sessions.get(encoder.component).run(inputs, ["image_features"])
        features: Floats = outputs["image_features"][0]
        expected = (encoder.tokens, self._shape[1])
        if features.shape != expected:
            raise MoiieError(
                f"{encoder.component}: image_features of a picture is {list(features.shape)}, "
                f"bundle.json says {list(expected)}",
                "export the bundle again",
            )
        return features


def encoder_inputs(encoder: Encoder, picture: Picture) -> dict[str, Floats]:
    """What an encoder is fed for one picture: `pixel_values` [1, 3, size, size], or see `patch_inputs`."""
    if isinstance(encoder.processor, PatchSettings):
        return patch_inputs(picture.image, encoder.processor)
    return {"pixel_values": pixel_values([picture.image], encoder.processor)}


def _calibration(bundle: Bundle) -> NDArray[np.float64]:
    """mean_abs_feature of each encoder."""
    if bundle.instance_router is None:
        raise MoiieError(
            f"{bundle.name}: skip_below has no effect: no instance router weighs the vision encoder", "leave it out"
        )
    missing = [encoder.name for encoder in bundle.encoders if encoder.mean_abs_feature is None]
    if missing:
        raise MoiieError(
            f"{bundle.name}: skip_below needs the calibration `mean_abs_feature` of every vision expert; "
            f"{', '.join(missing)} has none",
            "leave skip_below out: all experts then run, as in the model",
        )
    return np.array([encoder.mean_abs_feature for encoder in bundle.encoders], np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
