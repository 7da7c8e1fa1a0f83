"""Taking parts of a model away for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def zeroed(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """While open, these parameters are zero."""
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        for parameter, _ in saved:
            parameter.data.zero_()
        yield
    finally:
        for parameter, values in saved:
            parameter.data.copy_(values)
