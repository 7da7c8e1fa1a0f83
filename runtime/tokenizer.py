"""Text to token ids and back: chunk-wise encoding around image markers, and decoding as a stream."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from moiie_runtime.errors import MoiieError
from moiie_runtime.manifest import Tokens

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of a bundle.

    Args:
        path: its `tokenizer.json`.
        tokens: special ids and the image marker.
        separator: a text that, like a picture, parts what is encoded in pieces; itself it is no part of any.

    Raises:
        MoiieError: the file is missing or is not a tokenizer.
    """

    def __init__(self, path: Path, tokens: Tokens, separator: str | None = None) -> None:
        self._tokens = tokens
        borders = [tokens.image_marker, *([] if separator is None else [separator])]
        self._borders = re.compile("(" + "|".join(map(re.escape, borders)) + ")")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise MoiieError(
                f"{path}: cannot be read as a tokenizer: {error}", "copy the bundle again, or export it again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """Token ids of a prompt, with the placeholder id for each image marker.

        The text between markers and separators is encoded chunk by chunk, each with the tokenizer's own special
        tokens; the beginning-of-text token is kept once, at the start (spec moiie.md, 5.3; mome.md, 3).

        Returns:
            int64 [n].
        """
        pieces = self._borders.split(prompt)  # text and border in turn
        ids = list(self._tokenizer.encode(pieces[0]).ids)
        adds_bos = self._tokens.bos is not None and ids[:1] == [self._tokens.bos]
        for border, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            if border == self._tokens.image_marker:
                ids.append(self._tokens.image_placeholder)
            chunk = self._tokenizer.encode(piece).ids
            ids += chunk[1:] if adds_bos and chunk[:1] == [self._tokens.bos] else chunk
        return np.array(ids, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens; invalid UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """A fresh stream decoder."""
        return Detokenizer(self)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for one byte of a character (SentencePiece's byte fallback)."""
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding skips the token: special tokens and ids outside the vocabulary."""
        return not self.decode([token_id]) and not self.is_byte(token_id)


class Detokenizer:
    """Decodes ids one by one into pieces of text that together equal `decode` of all ids.

    A piece ends only where the text can no longer change: not inside a multi-byte character, and not inside a run of
    byte tokens, which decoders replace as a whole when it turns out to be invalid. What is still open at the end comes
    out of `finish`, with U+FFFD for the incomplete rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # [0:_done] is text that went out, kept as context for the decoder
        self._done = 0

    def push(self, token_id: int) -> str:
        """Text that is complete now that this token is known; often empty."""
        self._ids.append(token_id)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE) or self._tokenizer.is_byte(self._last_audible()):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return new

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        rest = self._new_text()
        self._done = len(self._ids)
        return rest

    def _new_text(self) -> str:
        # Decoded together with the piece before: some decoders treat the first token of a text differently.
        before = self._tokenizer.decode(self._ids[: self._done])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _last_audible(self) -> int:
        return next((i for i in reversed(self._ids[self._done :]) if not self._tokenizer.is_silent(i)), self._ids[-1])
