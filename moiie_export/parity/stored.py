"""What a bundle's weights file holds, as the reference model wants it: quantised weights multiplied out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moiie_export.model.load import checkpoint_reader, views
from moiie_export.parity.metrics import Array
from moiie_export.quantize.folding import SUFFIX, Fold, Folding
from moiie_export.quantize.packing import SCALES, Float32, dequantize
from moiie_export.quantize.rules import experts_apart
from moiie_export.quantize.scheme import Scheme
from moiie_export.source import ModelSource
from moiie_export.weights import Weight
from moiie_export.weights_stage import WEIGHTS_FILE
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError, Unsound
from moiie_runtime.tensors import TensorFile


class StoredWeights:
    """A bundle's weights. Use it as a context manager.

    Args:
        bundle: the bundle.
        source: the checkpoint; its weight map is split where the bundle stores the experts of a stack apart.

    Attributes:
        file: the weights file.
        schemes: bundle tensor -> its form, of those that are quantised.
        folding: where factors of AWQ were moved; `factors` holds them by tensor.
        islands: parameters that stay float32 in a bundle of float16 or quantised weights.

    Raises:
        Unsound: bundle.json says something of a weight that cannot be.
    """

    def __init__(self, bundle: Bundle, source: ModelSource) -> None:
        self.file = TensorFile(bundle.path(WEIGHTS_FILE))
        section = bundle.raw.get("quantization")
        self._section: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
        recipe = bundle.raw.get("recipe")
        self._recipe: Mapping[str, Any] = recipe if isinstance(recipe, Mapping) else {}
        self.schemes = {name: self._scheme(name, entry, bundle.root) for name, entry in self._entries().items()}
        self.folding = self._folding()
        self.factors = {fold.tensor: self.file[fold.tensor] for fold in self.folding.folds}
        self.islands = frozenset(self._section.get("islands", ()))
        self._source = source
        source.weight_map = replace(source.weight_map, weights=tuple(self._apart(source.weight_map.weights)))

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    @property
    def mixed(self) -> bool:
        """Whether weights may be stored otherwise than the bundle's dtype says."""
        recipe = self._recipe.get("quantization")
        return bool(self._section) or (isinstance(recipe, Mapping) and bool(recipe.get("rules")))

    def parameter_schemes(self) -> dict[str, Scheme]:
        """Model parameter -> its form, of those that are quantised."""
        return {
            name: self.schemes[weight.name]
            for weight in self._source.weight_map.weights
            if weight.name in self.schemes
            for name in weight.parameters()
        }

    def methods(self) -> dict[str, str]:
        """Bundle tensor -> how it was quantised."""
        return {name: str(entry.get("method", "")) for name, entry in self._entries().items()}

    def raw(self, name: str) -> Array:
        """The stored bytes of a tensor; 8-bit floats as uint8."""
        info = self.file.header[name]
        if info.dtype.startswith("F8"):
            return np.memmap(self.file.path, np.uint8, "r", info.offset, info.shape)
        return self.file[name]

    def read(self, weight: Weight) -> Mapping[str, Float32]:
        """What the bundle should compute with, by parameter: see `moiie_export.model.load.Reader`.

        Of a quantised weight that is what its stored numbers stand for; of any other the checkpoint's own values,
        rounded to the float type in which the bundle stores them and with the factors of AWQ that were moved into them.

        Raises:
            Unsound: a quantised tensor is missing or has another shape.
        """
        scheme = self.schemes.get(weight.name)
        if scheme is None:
            half = weight.name in self.file and self.file.header[weight.name].dtype == "F16"
            found = checkpoint_reader(self._source, "float16" if half else "float32")(weight)
            return {name: self.folding.apply(name, values, 0, self.factors) for name, values in found.items()}
        values = self._multiplied(weight.name, scheme)
        if values.shape != weight.shape:
            shapes = f"{list(values.shape)}, expected {list(weight.shape)}"
            raise Unsound(f"{self.file.path}: tensor {weight.name} is {shapes}", "export the bundle again")
        return views(weight, values)

    def folded(self, weight: Weight, block: Float32, row: int) -> Float32:
        """Rows of the checkpoint's weight with AWQ's factors in them: what was quantised.

        Args:
            weight: the weight.
            block: float32 [n, K], or [n] of a vector; within one parameter.
            row: their place, all leading axes taken as one.
        """
        name, first = self._parameter(weight, row)
        return self.folding.apply(name, block.copy(), first, self.factors)

    def unfolded(self, weight: Weight, block: Float32, row: int) -> Float32:
        """The reverse of `folded`: stored rows on the checkpoint's own scale."""
        name, first = self._parameter(weight, row)
        factors = self.folding.apply(name, np.ones_like(block), first, self.factors)
        return block / factors

    def _parameter(self, weight: Weight, row: int) -> tuple[str, int]:
        """The parameter in which a row of a weight lies, and its place there."""
        if not weight.views:
            return weight.name, row
        names = {index: name for name, index in weight.views.items()}
        rows = int(np.prod(weight.shape[1:-1]))
        return names[row // rows], row % rows

    def multiplied_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array, Float32]:
        """Rows [start, stop) of a quantised tensor, all its leading axes taken as one.

        Returns:
            What is stored, scales and values of these rows.
        """
        stored, scales = self._rows(name)
        part = (stored[start:stop], scales[start:stop])
        return (*part, dequantize(*part, self.schemes[name]))

    def _rows(self, name: str) -> tuple[Array, Array]:
        stored, scales = self.raw(name), self.file[name + SCALES]
        rows = stored.reshape(-1, stored.shape[-1])
        return rows, scales.reshape(len(rows), -1) if self.schemes[name].grouped else scales.reshape(-1)

    def _multiplied(self, name: str, scheme: Scheme) -> Float32:
        for each in (name, name + SCALES):
            if each not in self.file:
                raise Unsound(f"{self.file.path}: tensor {each} is missing", "export the bundle again")
        return dequantize(self.raw(name), self.file[name + SCALES], scheme)

    def _folding(self) -> Folding:
        """As bundle.json describes it."""
        folds = []
        for tensor, entry in self._section.get("scales", {}).items():
            if tensor not in self.file or tensor != f"{entry['divides']}{SUFFIX}":
                raise Unsound(f"{self.file.path}: tensor {tensor} is missing", "export the bundle again")
            width = self.file.header[tensor].shape[0]
            folds.append(Fold(entry["divides"], tuple(entry["multiplies"]), (), width))
        return Folding(tuple(folds))

    def _entries(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self._section.get("weights", {})
        return found

    def _scheme(self, name: str, entry: Mapping[str, Any], root: Path) -> Scheme:
        try:
            return Scheme(entry["format"], entry.get("group_size") or 0)
        except (KeyError, TypeError, MoiieError) as error:
            raise Unsound(
                f"{root / 'bundle.json'}: quantization.weights.{name}: {error}", "export the bundle again"
            ) from error

    def _apart(self, weights: tuple[Weight, ...]) -> list[Weight]:
        found: list[Weight] = []
        for weight in weights:
            split = weight.name not in self.file and bool(weight.views) and all(n in self.file for n in weight.views)
            found += experts_apart(weight) if split else [weight]
        return found
