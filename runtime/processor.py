"""Messages and pictures to a `Prompt`, by the rules that the bundle states."""

from __future__ import annotations

from collections.abc import Sequence

from moiie_runtime.bundle import Bundle
from moiie_runtime.chat import ChatTemplate, Message, check_markers
from moiie_runtime.errors import MoiieError
from moiie_runtime.images import ImageSource, load_image, pixel_values
from moiie_runtime.prompt import Prompt, token_modality, token_types
from moiie_runtime.tokenizer import Tokenizer


class Processor:
    """Prepares requests for one bundle.

    Args:
        bundle: an opened bundle with its tokenizer and chat template.

    Raises:
        MoiieError: one of these two files is missing or damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.tokenizer = Tokenizer(bundle.path("tokenizer.json"), bundle.tokens)
        self.template = ChatTemplate(bundle.read_text("chat_template.jinja"), bundle.prompt, bundle.tokens.image_marker)

    def __call__(self, messages: Sequence[Message]) -> Prompt:
        """The request for a conversation; see `ChatTemplate.render` for its form.

        Raises:
            MoiieError: a conversation or picture that cannot be used.
        """
        text, images = self.template.render(messages)
        return self._prompt(text, images)

    def from_text(self, text: str, images: Sequence[ImageSource] = ()) -> Prompt:
        """The request for a complete prompt string, which no template is applied to.

        Args:
            text: the prompt, with one image marker for each picture.
            images: the pictures, in the order of the markers.

        Raises:
            MoiieError: an empty prompt, another number of markers than pictures, or a picture that cannot be used.
        """
        marker = self._bundle.tokens.image_marker
        if not isinstance(text, str) or not text.replace(marker, "").strip():
            raise MoiieError("the prompt has no text", "give the complete prompt string")
        check_markers(text, marker, len(images), "the prompt")
        return self._prompt(text, images)

    def _prompt(self, text: str, images: Sequence[ImageSource]) -> Prompt:
        tokens = self._bundle.tokens
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MoiieError(
                f"the prompt is not valid Unicode at character {error.start}", "give UTF-8 text"
            ) from error
        input_ids = self.tokenizer.encode(text)
        vocab_size = self._bundle.model.vocab_size
        if input_ids.max(initial=0) >= vocab_size:
            raise MoiieError(
                f"the tokenizer gives id {input_ids.max()}, but the model knows {vocab_size} tokens",
                "tokenizer.json belongs to another model: export the bundle again",
            )
        types = token_types(input_ids, tokens)
        rule = self._bundle.modality.last_image_token_is_language
        pixels = pixel_values([load_image(image) for image in images], self._bundle.processor) if images else None
        return Prompt(
            text=text,
            input_ids=input_ids,
            token_modality=token_modality(types, last_image_token_is_language=rule),
            pixel_values=pixels,
            image_tokens=int(types.sum()),
            length=len(types),
        )
