"""The training pictures as each encoder reads them, made once by the runtime's own preprocessing and kept in files."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moiie_export.mome_config import MomeConfig
from moiie_recipes.demo.mome.architecture import encoders
from moiie_recipes.demo.mome.letters import LetteredScene, draw_lettered, make_lettered
from moiie_runtime.images import Picture
from moiie_runtime.vision import encoder_inputs
from moiie_runtime.vision_settings import PatchSettings

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.float16]


@cache
def training_scene(seed: int, index: int) -> LetteredScene:
    """Training scene number `index`; every third has at most three things, which is easier to begin with."""
    return make_lettered("train", seed, index, 3 if index % 3 == 0 else 5)


def inputs_of(config: MomeConfig, scene: LetteredScene) -> dict[str, Pixels]:
    """Encoder -> its main input for the scene's picture, float16, without the batch dimension."""
    picture = Picture(draw_lettered(scene))
    found = {}
    for encoder in encoders(config):
        inputs = encoder_inputs(encoder, picture)
        main = "flattened_patches" if isinstance(encoder.processor, PatchSettings) else "pixel_values"
        found[encoder.name] = inputs[main][0].astype(np.float16)
    return found


def training_pictures(directory: Path, config: MomeConfig, seed: int, count: int) -> dict[str, Pixels]:
    """Encoder -> the inputs [count, ...] of the first training scenes, read from files that are made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [encoder.name for encoder in encoders(config)]
    paths = {name: directory / f"{name}.npy" for name in names}
    if not all(path.is_file() for path in paths.values()):
        first = inputs_of(config, training_scene(seed, 0))
        arrays = {name: np.empty((count, *first[name].shape), np.float16) for name in names}
        for index in range(count):
            for name, values in inputs_of(config, training_scene(seed, index)).items():
                arrays[name][index] = values
            if index % 500 == 0:
                log.info("picture %d of %d", index, count)
        for name, array in arrays.items():
            temporary = paths[name].with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, array)
            temporary.replace(paths[name])
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
