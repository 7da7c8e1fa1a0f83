"""The adapters that a request uses, taken out of the banks in the weight file once (spec mome.md, 1.3 and 6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_settings import AdapterBanks
from moiie_runtime.tensors import TensorFile

BANKS = "mole."
"""What the names of the tensors that hold adapters begin with."""
# Input of the decoder's graphs -> the tensor that stacks it over the adapters of a layer.
_PARTS = {
    "down": "down_proj.weight",
    "down_bias": "down_proj.bias",
    "up": "up_proj.weight",
    "up_bias": "up_proj.bias",
    "scale": "scale",
}


class Adapters:
    """The adapter banks of a bundle. They stay in the file; only what is chosen is read.

    Args:
        bundle: an opened bundle.
        settings: its section `adapters`.

    Raises:
        MoiieError: a bank is missing, or has another number of adapters than the manifest says.
    """

    def __init__(self, bundle: Bundle, settings: AdapterBanks) -> None:
        weights = TensorFile(bundle.path(settings.file))
        self._layers = settings.layers
        self._banks: dict[str, NDArray[Any]] = {}
        for layer in settings.layers:
            for part, leaf in _PARTS.items():
                bank = weights[f"{BANKS}{layer}.{leaf}"]
                if bank.shape[:1] != (settings.num_experts,) or bank.dtype not in (np.float32, np.float16):
                    raise MoiieError(
                        f"{weights.path}: tensor '{BANKS}{layer}.{leaf}' must be float32 or float16 "
                        f"[{settings.num_experts}, ...], got {bank.dtype} {list(bank.shape)}",
                        "export the bundle again",
                    )
                self._banks[f"adapter.{layer}.{part}"] = bank

    def inputs(self, choices: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[np.float32]]:
        """What the decoder's graphs are fed for these rows, at every step the same.

        Args:
            choices: for each row the adapter of each layer.

        Returns:
            `adapter.{layer}.down` and so on, each float32 [1, ...] when all rows agree in all layers, otherwise
            [rows, ...]. In the first case float32 banks are not copied: the arrays are views of the mapped file.
        """
        rows = [np.asarray(choice) for choice in choices]
        if all(np.array_equal(row, rows[0]) for row in rows):
            rows = rows[:1]
        chosen = {}
        for column, layer in enumerate(self._layers):
            index = [int(row[column]) for row in rows]
            for part in _PARTS:
                bank = self._banks[f"adapter.{layer}.{part}"]
                picked = bank[index[0] : index[0] + 1] if len(index) == 1 else bank[index]
                chosen[f"adapter.{layer}.{part}"] = picked.astype(np.float32, copy=False)
        return chosen
