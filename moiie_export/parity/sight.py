"""What comes before the decoder: pictures and, where it decides something, the instruction. One sight per family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from moiie_export.parity.cases import Question
from moiie_export.parity.metrics import Array
from moiie_export.parity.report import Check
from moiie_runtime.prompt import Prompt


@dataclass(frozen=True)
class Seen:
    """What both sides made of a question before the decoder.

    Attributes:
        checks: how they compare.
        features: the reference's rows for all pictures [images, tokens, hidden]; None without pictures.
        adapters: the adapter of each layer that has some [L], which both decoders then use; None in a family without.
        data: numbers for the report.
        comparable: False when the bundle's side cannot be fed, so that the case ends here.
    """

    checks: list[Check]
    features: Array | None
    adapters: Array | None = None
    data: dict[str, Any] = field(default_factory=dict)
    comparable: bool = True


class Sight(Protocol):
    """Compares what a family does before its decoder."""

    def look(self, question: Question, prompt: Prompt) -> Seen:
        """Run both sides on one question."""
        ...
