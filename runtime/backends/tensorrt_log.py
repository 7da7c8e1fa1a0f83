"""What TensorRT says while it works: kept, so that an error can say why."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from moiie_runtime.errors import MoiieError

_log = logging.getLogger(__name__)

_NOISE = ("cudaError 35", "CUDA driver version is insufficient", "CUDA initialization failure with error: 35")
"""Said about any failure on a machine without a driver, whatever its cause."""


@dataclass
class Said:
    """What TensorRT said."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def hear(self, is_error: bool, message: str) -> None:
        """Sort a message; what every failure says here is dropped."""
        if any(noise in message for noise in _NOISE):
            _log.debug("%s", message)
            return
        (self.errors if is_error else self.warnings).append(message)
        _log.log(logging.DEBUG if is_error else logging.INFO, "%s", message)

    def reason(self) -> str:
        """The first thing it complained about."""
        first = self.errors[0] if self.errors else "it gave no reason"
        return " ".join(first.split())[:600]

    def refusal(self, what: str, hint: str) -> MoiieError:
        """An error with the first thing it complained about."""
        return MoiieError(f"{what}: {self.reason()}", hint)

    def clear(self) -> None:
        """Forget what was said so far."""
        self.errors.clear()
        self.warnings.clear()


def listener(trt: Any) -> Any:
    """A logger for TensorRT; its attribute `said` holds what was heard.

    Args:
        trt: the module.
    """

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said = Said()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.said.hear(severity <= trt.ILogger.Severity.ERROR, message)

    return Listener()
