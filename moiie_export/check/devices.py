"""What keeps a target from being used whatever the model is: said once, and not of every op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moiie_export.targets import DIALECT_SMS, Target

_OLDEST_BFLOAT16 = 80


@dataclass(frozen=True)
class Refusal:
    """Something that a target asks for in vain.

    Attributes:
        sms: the GPUs for which it does; those of the target, or some of them.
        reason: a sentence.
    """

    sms: tuple[int, ...]
    reason: str


def refusals(target: Target) -> Iterator[Refusal]:
    """What its library does for no model."""
    if target.backend == "onnxruntime_cuda" and target.precision == "bfloat16":
        yield Refusal((), "bfloat16 is not written for ONNX Runtime: precision float16 or float32")
    known = DIALECT_SMS.get(target.dialect)
    if known is None:
        return
    if target.precision == "float32":
        yield Refusal(target.sms, "TensorRT's attention has no float32 kernels: precision float16 or bfloat16")
    unknown = tuple(sm for sm in target.sms if sm not in known)
    if unknown:
        verbs = ("is not expected to build", "it is") if target.expected else ("does not build", "it does")
        reason = f"{target.backend} {verbs[0]} for SM {_words(unknown)} ({verbs[1]} for {_words(sorted(known))})"
        yield Refusal(unknown, reason)
    old = tuple(sm for sm in target.sms if sm in known and sm < _OLDEST_BFLOAT16)
    if old and target.precision == "bfloat16":
        yield Refusal(old, f"bfloat16 needs SM {_OLDEST_BFLOAT16} or above, not {_words(old)}")


def _words(sms: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, sms))
