"""Messages and pictures to a `Prompt`, by the rules that the bundle states."""

from __future__ import annotations

from collections.abc import Sequence

from moiie_runtime.bundle import Bundle
from moiie_runtime.chat import ChatTemplate, Message, check_markers
from moiie_runtime.errors import MoiieError
from moiie_runtime.images import ImageSource, Picture, load_image
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
        self.tokenizer = Tokenizer(bundle.path("tokenizer.json"), bundle.tokens, bundle.prompt.separator)
        self.template = ChatTemplate(bundle.read_text("chat_template.jinja"), bundle.prompt, bundle.tokens.image_marker)

    def __call__(self, messages: Sequence[Message], *, reroute: bool = False) -> Prompt:
        """The request for a conversation.

        Args:
            messages: see `ChatTemplate.render`.
            reroute: an instance router reads the user's last turn; by default it reads the first, and what it chose
                there holds for the whole conversation.

        Raises:
            MoiieError: a conversation or picture that cannot be used, or `reroute` without an instance router.
        """
        text, images = self.template.render(messages)
        router = self._bundle.instance_router
        if reroute and router is None:
            raise MoiieError(f"{self._bundle.name}: the bundle has no instance router", "leave reroute out")
        questions = [] if router is None else self.template.questions(messages)
        return self._prompt(text, images, questions[-1 if reroute else 0] if questions else None)

    def from_text(self, text: str, images: Sequence[ImageSource] = (), instruction: str | None = None) -> Prompt:
        """The request for a complete prompt string, which no template is applied to.

        Args:
            text: the prompt, with one image marker for each picture, and the bundle's separator where its template has
                it.
            images: the pictures, in the order of the markers.
            instruction: the raw question, which an instance router reads; only for bundles with one, and there needed.

        Raises:
            MoiieError: an empty prompt, another number of markers than pictures, a picture that cannot be used, or an
                instruction that is missing, empty or of no use.
        """
        self._check_instruction(instruction)
        marker = self._bundle.tokens.image_marker
        if not isinstance(text, str) or not text.replace(marker, "").strip():
            raise MoiieError("the prompt has no text", "give the complete prompt string")
        check_markers(text, marker, len(images), "the prompt")
        return self._prompt(text, images, instruction)

    def _check_instruction(self, instruction: str | None) -> None:
        name = self._bundle.name
        if self._bundle.instance_router is None:
            if instruction is not None:
                raise MoiieError(f"{name}: no instance router reads an instruction", "leave the instruction out")
        elif instruction is None:
            raise MoiieError(
                f"{name}: chooses its experts by the instruction, which a complete prompt does not tell",
                "give the raw question beside the prompt as `instruction` (`moiie run --instruction TEXT`)",
            )
        elif not isinstance(instruction, str) or not instruction.strip():
            raise MoiieError("the instruction has no text", "give the raw question, without template and pictures")

    def _prompt(self, text: str, images: Sequence[ImageSource], instruction: str | None) -> Prompt:
        tokens = self._bundle.tokens
        _check_unicode("prompt", text)
        _check_unicode("instruction", instruction or "")
        input_ids = self.tokenizer.encode(text)
        vocab_size = self._bundle.model.vocab_size
        if input_ids.max(initial=0) >= vocab_size:
            raise MoiieError(
                f"the tokenizer gives id {input_ids.max()}, but the model knows {vocab_size} tokens",
                "tokenizer.json belongs to another model: export the bundle again",
            )
        types = token_types(input_ids, tokens)
        rule = self._bundle.modality.last_image_token_is_language
        return Prompt(
            text=text,
            input_ids=input_ids,
            token_modality=token_modality(types, last_image_token_is_language=rule),
            image_tokens=int(types.sum()),
            length=len(types),
            pictures=tuple(Picture(load_image(image)) for image in images),
            encoders=self._bundle.encoders,
            instruction=instruction,
        )


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MoiieError(f"the {name} is not valid Unicode at character {error.start}", "give UTF-8 text") from error
