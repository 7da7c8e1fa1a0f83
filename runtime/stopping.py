"""Stop strings in streamed text: found across token boundaries, never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text through until a stop string appears, holding back what may become the start of one.

    Args:
        stop_strings: any of these ends the text before it.
        trailing: dropped from the end of the text, and only there (the template's separator, spec 5.5); may be empty.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, stop_strings: Sequence[str], trailing: str = "") -> None:
        self._stops = tuple(stop_strings)
        self._trailing = trailing
        self._held = ""
        self._started = False
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown after this piece of text; white space before the first word is dropped."""
        if self.stopped:
            return ""
        self._held += text
        # The one that is complete first, as if the text came character by character.
        found = min(((at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            self._held = self._held[: found[1]]
            return self.finish()
        return self._release(len(self._held) - self._open_length())

    def finish(self) -> str:
        """The rest of the text, at its end, without the trailing string."""
        if self._trailing:
            self._held = self._held.removesuffix(self._trailing)
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        return text

    def _open_length(self) -> int:
        """Length of the longest end of the held text that could still turn out to be dropped."""
        longest = 0
        for stop, whole in [*((stop, 0) for stop in self._stops), (self._trailing, 1)]:
            for length in range(min(len(stop) - 1 + whole, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
