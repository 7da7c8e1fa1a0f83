"""What a bundle says about its vision encoders: one, or several experts that the instruction weighs."""

from __future__ import annotations

from dataclasses import dataclass

from moiie_runtime.fields import Fields


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes `pixel_values` (spec moiie.md, 5.1; for MoME mome.md, 2)."""

    image_size: int
    aspect_ratio: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    resample: str


@dataclass(frozen=True)
class PatchSettings:
    """How a picture becomes `flattened_patches` and the matrix that pools them to `query_grid` (spec mome.md, 2).

    `positions` is the length of the encoder's tables of rows and columns, which are counted from 1; None: long enough
    for `max_patches`.
    """

    patch_size: int
    max_patches: int
    query_grid: tuple[int, int]
    positions: int | None = None


@dataclass(frozen=True)
class Encoder:
    """One vision encoder.

    Attributes:
        name: for people, for example `dino`.
        component: its graph.
        tokens: rows of `image_features` for each picture.
        cls: whether the first row is a class token, which goes to the decoder unweighted.
        processor: how its input is made.
        mean_abs_feature: the mean absolute value of its features, measured at calibration; None when it was not.
    """

    name: str
    component: str
    tokens: int
    cls: bool
    processor: ImageSettings | PatchSettings
    mean_abs_feature: float | None = None


def read_encoders(top: Fields, image_tokens: int) -> tuple[Encoder, ...]:
    """The encoders in the order of the router's weights: `vision_experts`, or the one that `processor` describes.

    Args:
        top: the whole manifest.
        image_tokens: rows that one picture takes in the decoder's input.

    Raises:
        MoiieError: a key that is missing or wrong, or experts whose rows do not add up to `image_tokens`.
    """
    if top.data.get("vision_experts") is None:
        fields = top.child("processor")
        settings = read_image_settings(fields, fields.string("aspect_ratio", ("pad", "square")))
        return (Encoder("vision_encoder", "vision_encoder", image_tokens, cls=False, processor=settings),)
    experts = list(top.items("vision_experts"))
    if not experts:
        raise top.error("vision_experts", "a list of at least one object")
    encoders = tuple(_expert(fields) for fields in experts)
    with_class_token = [encoder.name for encoder in encoders if encoder.cls]
    if len(with_class_token) > 1:
        raise experts[0].error("cls", f"true for one expert at most, not for {' and '.join(with_class_token)}")
    queries = image_tokens - len(with_class_token)
    for fields, encoder in zip(experts, encoders, strict=True):
        if encoder.tokens != queries + encoder.cls:
            raise fields.error("tokens", f"{queries + encoder.cls}, because image_tokens is {image_tokens}")
        if isinstance(encoder.processor, PatchSettings) and _area(encoder.processor.query_grid) != queries:
            raise fields.child("processor").error("query_grid", f"two integers whose product is {queries}")
    return encoders


def read_image_settings(fields: Fields, aspect_ratio: str) -> ImageSettings:
    """The settings under `processor`, with an aspect ratio that was read before."""
    std = fields.numbers("std", 3)
    if not all(value > 0 for value in std):
        raise fields.error("std", "a list of 3 numbers above 0")
    mean = fields.numbers("mean", 3)
    if not all(0 <= value <= 1 for value in mean):
        raise fields.error("mean", "a list of 3 numbers from 0 to 1")
    return ImageSettings(
        image_size=fields.integer("image_size", 1, 16384),
        aspect_ratio=aspect_ratio,
        mean=mean,
        std=std,
        rescale_factor=fields.number("rescale_factor"),
        resample=fields.string("resample", ("bicubic",)),
    )


def _expert(fields: Fields) -> Encoder:
    processor = fields.child("processor")
    settings: ImageSettings | PatchSettings
    if processor.string("kind", ("squash", "patches")) == "squash":
        settings = read_image_settings(processor, "square")
    else:
        settings = _patch_settings(processor)
    mean_abs = None if fields.data.get("mean_abs_feature") is None else fields.number("mean_abs_feature")
    if mean_abs is not None and mean_abs <= 0:
        raise fields.error("mean_abs_feature", "a number above 0")
    return Encoder(
        name=fields.string("name"),
        component=fields.string("component"),
        tokens=fields.integer("tokens", 1),
        cls=fields.boolean("cls"),
        processor=settings,
        mean_abs_feature=mean_abs,
    )


def _patch_settings(fields: Fields) -> PatchSettings:
    grid = fields.integers("query_grid", 1, 1024)
    if len(grid) != 2:
        raise fields.error("query_grid", "a list of two integers, rows and columns")
    return PatchSettings(
        patch_size=fields.integer("patch_size", 1, 256),
        max_patches=fields.integer("max_patches", 1, 65536),
        query_grid=(grid[0], grid[1]),
        positions=fields.optional_integer("positions", 2),
    )


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]
