"""The JSON document of a comparison (`Report.to_dict`), read back: the one source of everything a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moiie_export.parity.report import Check, Report
from moiie_runtime.errors import MoiieError


@dataclass(frozen=True)
class Phase:
    """One phase (prefill, decode, ...) of one case, with its layers and whatever else was measured."""

    case: str
    name: str
    data: Mapping[str, Any]

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """What was measured in each layer."""
        found: list[Mapping[str, Any]] = self.data["layers"]
        return found


class Document:
    """A comparison as data.

    Args:
        data: what `Report.to_dict` gave, or the same read from JSON.

    Raises:
        MoiieError: it is no such document.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        try:
            checks = [Check.from_dict(each) for each in data["checks"]]
            self.report = Report(data["bundle"], data["checkpoint"], data["dtype"], checks)
        except (KeyError, TypeError, ValueError) as error:
            raise MoiieError(
                f"this is no document of `moiie parity --json`: {error!r}", "make one with the same version of moiie"
            ) from error

    @property
    def checks(self) -> list[Check]:
        """All checks, in the order they are judged."""
        return self.report.checks

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        """What was measured in each case."""
        found: list[Mapping[str, Any]] = self.data.get("cases", [])
        return found

    @cached_property
    def phases(self) -> list[Phase]:
        """The phases of all cases."""
        return [
            Phase(case["name"], name, data)
            for case in self.cases
            for name, data in case.items()
            if isinstance(data, Mapping) and "layers" in data
        ]

    @property
    def moe(self) -> Mapping[str, Any] | None:
        """The model's experts; None for a dense one."""
        found: Mapping[str, Any] | None = (self.data.get("model") or {}).get("moe")
        return found

    def routed(self) -> Iterator[tuple[Phase, int, str, Mapping[str, Any]]]:
        """(phase, layer, modality, what was measured) wherever tokens were routed."""
        for phase in self.phases:
            for layer in phase.layers:
                for modality, found in layer.get("routing", {}).items():
                    yield phase, layer["layer"], modality, found


def real(value: Any) -> float:
    """A number of the document, where NaN and infinities are names."""
    return float(value)
