"""Pictures: from whatever the caller has to an RGB image, and from there to `pixel_values` (spec moiie.md, 5.1)."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import open_regular
from moiie_runtime.vision_settings import ImageSettings

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]"

# The side of the padded square is limited as well: its pixels are what the resize has to read.
MAX_PIXELS = 178_956_970  # the number at which Pillow itself refuses
_BAND_PIXELS = 2**22
# Formats that are decoded by libraries inside Pillow; others start programs (EPS) or are no pictures.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUPPORTED = "give a picture file (PNG, JPEG, WebP, BMP, GIF, TIFF or PPM)"


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture. What the encoders are fed is made of it when, and if, one of them runs.

    Attributes:
        image: RGB, from `load_image`. Not to be changed.
    """

    image: Image.Image

    @property
    def nbytes(self) -> int:
        """Memory of the pixels; Pillow takes 4 bytes for each."""
        return 4 * self.image.width * self.image.height

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels, in hexadecimal: the same for the same picture from whatever file."""
        digest = hashlib.sha256("{}x{} ".format(*self.image.size).encode())
        for top in range(0, self.image.height, rows := max(1, _BAND_PIXELS // self.image.width)):
            digest.update(self.image.crop((0, top, self.image.width, min(top + rows, self.image.height))).tobytes())
        return digest.hexdigest()


def load_image(source: ImageSource) -> Image.Image:
    """The picture as an RGB image.

    Args:
        source: a path, the bytes of a picture file, a PIL image, or a uint8 array [height, width, 3] in RGB order.

    Returns:
        An RGB image of the stored pixels. The EXIF orientation is not applied and colour profiles are not converted:
        the authors' code, which the model was trained with, does neither.

    Raises:
        MoiieError: no such file, not a picture, a damaged or empty one, one of more than `MAX_PIXELS` pixels (also
            counting the padding to a square), or an array of another type or shape.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"image of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        web = "://" in str(source)
        hint = "pictures are read from local files: download it first" if web else "check the path of the picture"
        with open_regular(Path(source), hint) as file:
            return _decode(file, str(source))
    raise MoiieError(
        f"an image must be a path, bytes, a PIL image or a numpy array, got {type(source).__name__}", _SUPPORTED
    )


def check_size(size: tuple[int, int], where: str) -> None:
    """Refuse a picture [width, height] that is empty or whose padded square exceeds `MAX_PIXELS`."""
    width, height = size
    if width < 1 or height < 1:
        raise MoiieError(f"{where}: the picture is empty ({width}x{height} pixels)", _SUPPORTED)
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise MoiieError(
            f"{where}: the picture is too large: {width}x{height} pixels; the longer side may have at most "
            f"{int(MAX_PIXELS**0.5)}",
            "scale it down or cut it into parts",
        )


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings) -> NDArray[np.float32]:
    """Pictures as the vision encoder wants them.

    Args:
        images: RGB images from `load_image`.
        settings: size, padding and normalisation.

    Returns:
        float32 [images, 3, image_size, image_size].
    """
    size = settings.image_size
    result = np.empty((len(images), 3, size, size), np.float32)
    # The picture has 8 bits a channel: a table of 256 values holds the rescaling and normalisation of all of them.
    levels = (np.arange(256) * settings.rescale_factor).astype(np.float32)
    for index, image in enumerate(images):
        pixels = np.asarray(resized(image, settings))
        for channel in range(3):
            mean, std = np.float32(settings.mean[channel]), np.float32(settings.std[channel])
            result[index, channel] = ((levels - mean) / std)[pixels[:, :, channel]]
    return result


def resized(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """The picture at `image_size` x `image_size`, 8 bits a channel.

    With aspect ratio `pad` it is first centred on a square of the longer side in the mean colour (rounded down to
    integers, offset rounded down); with `square` it is stretched. The resize is Pillow's bicubic one.
    """
    size = settings.image_size
    width, height = image.size
    if settings.aspect_ratio == "square" or width == height:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    colour = tuple(int(value * 255) for value in settings.mean)
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    # Pillow resizes along x, then along y. Doing x in bands of rows gives the same bytes without ever holding the
    # square, which for a 1 x 10000 picture would take 400 MB.
    columns = Image.new("RGB", (size, side), colour)
    rows = max(1, _BAND_PIXELS // side)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        band = Image.new("RGB", (side, stop - start), colour)
        band.paste(image.crop((0, start, width, stop)), (left, 0))
        columns.paste(band.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return columns.resize((size, size), Image.Resampling.BICUBIC)


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise MoiieError(
            f"an image array must be uint8 [height, width, 3] in RGB order, got {array.dtype} {list(array.shape)}",
            "convert it first, for example (array * 255).astype(np.uint8) for floats from 0 to 1",
        )
    check_size((array.shape[1], array.shape[0]), "image array")
    return Image.fromarray(np.ascontiguousarray(array))


def _decode(file: IO[bytes], where: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size has its own, firmer limit
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise MoiieError(f"{where}: the picture is too large: {error}", "scale it down") from error
        except Exception as error:  # decoders raise many types on damaged files
            raise MoiieError(f"{where}: is not a picture that can be read", _SUPPORTED) from error
    return _rgb(image, where)


def _rgb(image: Image.Image, where: str) -> Image.Image:
    check_size(image.size, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow advises RGBA for transparent palettes; the model has RGB
        try:
            return image.convert("RGB")
        except Exception as error:  # decoders raise many types on damaged files
            raise MoiieError(f"{where}: the picture is damaged or cut short: {error}", "copy it again") from error
