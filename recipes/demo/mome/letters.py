"""The other demo's scenes with letters on some of their things."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from moiie_recipes.demo.scenes import PICTURE_SIZE, Scene, Split, Thing, draw, make_scene

LETTERS = tuple("ACHKLOTZ")
"""Few enough, and unlike enough, to be told apart by a tower of two layers."""
FONT_SIZE = 40

_INK, _RIM = (15, 15, 15), (245, 245, 245)


@dataclass(frozen=True)
class LetteredScene:
    """A scene, and of each thing the letter on it; None: it has none."""

    scene: Scene
    letters: tuple[str | None, ...]

    @property
    def things(self) -> tuple[tuple[Thing, str | None], ...]:
        """Things with their letters, in reading order."""
        return tuple(zip(self.scene.things, self.letters, strict=True))


def make_lettered(split: Split, seed: int, index: int, most: int = 5) -> LetteredScene:
    """Scene number `index` of a split with letters; which set it belongs to is said by its things alone."""
    scene = make_scene(split, seed, index, most)
    rng = random.Random(f"letters/{scene.style}")  # noqa: S311 (no secret)
    return LetteredScene(scene, tuple(rng.choice(LETTERS) if rng.random() < 0.75 else None for _ in scene.things))


def draw_lettered(lettered: LetteredScene) -> Image.Image:
    """The scene's picture with its letters: dark with a light rim, legible on every colour and beside the thing.

    They stand near the middle of their cell, within the thing wherever that is; few pixels are enough to read them then.
    """
    picture = draw(lettered.scene)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    rng, cell = random.Random(f"ink/{lettered.scene.style}"), PICTURE_SIZE / 3  # noqa: S311
    for thing, letter in lettered.things:
        if letter is not None:
            x = (thing.column + 0.5) * cell + rng.uniform(-2, 2)
            y = (thing.row + 0.5) * cell + rng.uniform(-2, 2)
            canvas.text((x, y), letter, fill=_INK, font=font, anchor="mm", stroke_width=3, stroke_fill=_RIM)
    return picture
