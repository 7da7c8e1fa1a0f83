"""The strings around a question, exactly as the authors' conversation templates give them (spec moiie.md, 5.2; mome.md, 3)."""

from __future__ import annotations

from dataclasses import dataclass

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class PromptStyle:
    """A conversation template.

    Attributes:
        system: the text in front of everything.
        template: Jinja text of the whole prompt; gets `system`, `messages` (role, content),
            `add_generation_prompt`, `image_marker` and `separator`.
        stop_string: what ends an answer; also the token that stops generation where `stop_is_forced`.
        stop_is_forced: the authors' loader overrides the configured end token by `stop_string` (LLaMA, spec 5.4).
        separator: what the template puts where the text is cut into pieces that are tokenised apart, beside pictures.
    """

    system: str
    template: str
    stop_string: str
    stop_is_forced: bool = False
    separator: str | None = None


def _template(separator: str, stop: str) -> str:
    """Two-separator style: `separator` behind the system text and every question, `stop` behind every answer."""
    sep = f"{{{{ '{separator}' }}}}" if separator else ""
    return (
        f"{{{{ system }}}}{sep}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ message['content'] }}" + sep + "{% else %}"
        f"ASSISTANT: {{{{ message['content'] }}}}{stop}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


PHI3 = PromptStyle(_SYSTEM, _template(" ", "<|endoftext|>"), "<|endoftext|>")
LLAMA3 = PromptStyle(_SYSTEM, _template("", "<|end_of_text|>"), "<|end_of_text|>", stop_is_forced=True)
_PIECE = "\N{INFORMATION SEPARATOR TWO}"

MOME = PromptStyle(
    "",
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' ~ ('<Img>' ~ image_marker ~ '</Img>') * message['content'].count(image_marker) ~ separator }}"
    "{{ message['content'] | replace(image_marker ~ '\n', '') | replace(image_marker, '') }} ASSISTANT: "
    "{% else %}{{ separator ~ message['content'] ~ '</s>' ~ separator }}{% endif %}{% endfor %}",
    "</s>",
    separator=_PIECE,
)
"""Not Vicuna's own template. Pictures stand in front of the question; the space at the end is a token (spec mome.md, 3).
Several turns and several pictures are ours: the authors trained with one of each."""
