"""Pictures of coloured shapes on a three by three grid, and which of them belong to training and which to testing."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 50),
    "pink": (240, 110, 210),
    "white": (240, 240, 240),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
PICTURE_SIZE = 288
"""Side of a drawn picture in pixels; the model's processor makes it smaller."""

_TEST_SHARE = 8  # one scene of eight is kept for testing


@dataclass(frozen=True, order=True)
class Thing:
    """One shape: where it is on the grid, what it is, and its colour."""

    row: int
    column: int
    shape: str
    colour: str

    @property
    def place(self) -> str:
        """Its cell in words, `top left`."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order, and the seed of what does not matter (exact places, sizes, shades)."""

    things: tuple[Thing, ...]
    style: str

    @property
    def split(self) -> Split:
        """Which set the scene belongs to, whatever its style: scenes of the two sets never coincide."""
        digest = hashlib.sha256(repr(self.things).encode()).digest()
        return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def make_scene(split: Split, seed: int, index: int, most: int = 5) -> Scene:
    """Scene number `index` of a split; the same numbers always give the same scene.

    Two to `most` things, or one to two; shapes and colours repeat often enough that counting has something to count.
    """
    rng = random.Random(f"scene/{split}/{seed}/{index}")  # noqa: S311 (no secret)
    while True:
        things: list[Thing] = []
        for cell in rng.sample(range(9), rng.randint(1 if most == 2 else 2, most)):
            repeat_shape, repeat_colour = rng.random() < 0.3, rng.random() < 0.3
            shape = rng.choice(things).shape if things and repeat_shape else rng.choice(SHAPES)
            colour = rng.choice(things).colour if things and repeat_colour else rng.choice(list(COLOURS))
            things.append(Thing(cell // 3, cell % 3, shape, colour))
        scene = Scene(tuple(sorted(things)), style=f"{split}/{seed}/{index}/{most}")
        if scene.split == split:
            return scene


@dataclass(frozen=True)
class Placed:
    """A thing as it is drawn: the middle and half the width of its place in pixels, and its exact colour."""

    thing: Thing
    colour: tuple[int, ...]
    x: float
    y: float
    radius: float


def place(scene: Scene) -> tuple[int, list[Placed]]:
    """How a scene is drawn: the grey of its ground, and its things."""
    rng = random.Random(f"style/{scene.style}")  # noqa: S311
    cell = PICTURE_SIZE / 3
    shade, placed = rng.randint(20, 60), []
    for thing in scene.things:
        colour = tuple(min(255, max(0, value + rng.randint(-14, 14))) for value in COLOURS[thing.colour])
        radius = rng.uniform(30, 40)
        x = (thing.column + 0.5) * cell + rng.uniform(-7, 7)
        y = (thing.row + 0.5) * cell + rng.uniform(-7, 7)
        placed.append(Placed(thing, colour, x, y, radius))
    return shade, placed


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of PICTURE_SIZE squared."""
    shade, placed = place(scene)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), (shade, shade, shade))
    canvas = ImageDraw.Draw(picture)
    for each in placed:
        _draw_thing(canvas, each, each.colour)
    return picture


def patch_labels(scene: Scene, patches: int) -> list[int]:
    """What fills each of patches x patches squares of the picture, row by row.

    Returns:
        0 for background, else 1 + shape * 6 + colour of the thing that covers at least an eighth of the square.
    """
    canvas_picture = Image.new("L", (PICTURE_SIZE, PICTURE_SIZE), 0)
    canvas = ImageDraw.Draw(canvas_picture)
    for each in place(scene)[1]:
        shape, colour = SHAPES.index(each.thing.shape), list(COLOURS).index(each.thing.colour)
        _draw_thing(canvas, each, 1 + shape * len(COLOURS) + colour)
    side = PICTURE_SIZE // patches
    labels = []
    for y in range(0, side * patches, side):
        for x in range(0, side * patches, side):
            counts = canvas_picture.crop((x, y, x + side, y + side)).histogram()
            label = max(range(1, len(counts)), key=counts.__getitem__)
            labels.append(label if counts[label] * 8 >= side * side else 0)
    return labels


def _draw_thing(canvas: ImageDraw.ImageDraw, placed: Placed, fill: int | tuple[int, ...]) -> None:
    shape, x, y, radius = placed.thing.shape, placed.x, placed.y, placed.radius
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.88
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        corners = [
            (x + 1.15 * radius * sin(a), y + 0.2 * radius - 1.15 * radius * cos(a)) for a in (0, 2 * pi / 3, 4 * pi / 3)
        ]
        canvas.polygon(corners, fill=fill)
    else:
        arm = radius * 0.3
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
