"""What the decoder is given for one request: token ids, the modality of every position, and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError
from moiie_runtime.images import Picture, pixel_values
from moiie_runtime.manifest import Tokens
from moiie_runtime.vision_settings import Encoder, ImageSettings

VISION = 1
LANGUAGE = 0


@dataclass(frozen=True)
class Prompt:
    """One request, ready for prefill.

    Attributes:
        text: the complete prompt string.
        input_ids: int64 [n], with the placeholder id where a picture stands.
        token_modality: int32 [length]; 1 where the token is routed as vision, 0 as language.
        image_tokens: positions taken by pictures.
        length: positions in all, each placeholder counted as the rows of its picture.
        pictures: in the order of their placeholders.
        encoders: the bundle's, which read them.
        instruction: what an instance router reads; None for bundles without one.
    """

    text: str
    input_ids: NDArray[np.int64]
    token_modality: NDArray[np.int32]
    image_tokens: int
    length: int
    pictures: tuple[Picture, ...] = ()
    encoders: tuple[Encoder, ...] = ()
    instruction: str | None = None

    @cached_property
    def pixel_values(self) -> NDArray[np.float32] | None:
        """All pictures as a single vision encoder reads them, [images, 3, size, size]; None without pictures.

        Raises:
            MoiieError: the bundle has several encoders, and each reads something else.
        """
        if not self.pictures:
            return None
        settings = self.encoders[0].processor if len(self.encoders) == 1 else None
        if not isinstance(settings, ImageSettings):
            raise MoiieError(
                f"pixel_values: the bundle has {len(self.encoders)} vision encoders, each with an input of its own",
                "use moiie_runtime.vision.encoder_inputs",
            )
        return pixel_values([picture.image for picture in self.pictures], settings)


def token_types(input_ids: NDArray[np.int64], tokens: Tokens) -> NDArray[np.int32]:
    """1 at every position of a picture, 0 at every position of text.

    Args:
        input_ids: int64 [n] with placeholders.
        tokens: the placeholder id and how many positions it stands for.

    Returns:
        int32 [length].
    """
    is_image = input_ids == tokens.image_placeholder
    return np.repeat(is_image.astype(np.int32), np.where(is_image, tokens.image_tokens, 1))


def token_modality(types: NDArray[np.int32], *, last_image_token_is_language: bool) -> NDArray[np.int32]:
    """The modality by which each position is routed.

    Under the rule that the model was trained with (spec 2.1), a position is vision when it and the next one are image
    tokens: the last token of every run of image tokens, and the last of the sequence, count as language.

    Args:
        types: int32 [length]; 1 for an image token, anything else for text.
        last_image_token_is_language: whether the rule applies; otherwise every image token is vision.

    Returns:
        int32 [length] of `VISION` and `LANGUAGE`.
    """
    vision = types == 1
    if last_image_token_is_language:
        vision = vision & np.append(vision[1:], False)
    return np.where(vision, VISION, LANGUAGE).astype(np.int32)


def penalty_ids(prompt: Prompt, rule: str, tokens: Tokens) -> NDArray[np.int64]:
    """Ids that the repetition penalty counts as used before the first token of the answer, int64 [n].

    Args:
        prompt: what is answered.
        rule: `penalty_prompt` of the bundle.
        tokens: the start token.
    """
    if rule == "prompt":
        return prompt.input_ids[prompt.input_ids >= 0]  # placeholders are no tokens
    return np.array([tokens.bos] if rule == "bos" else [], np.int64)
