"""Both sides of parity as Polygraphy runners, compared by its Comparator with the recipe's bounds.

A second opinion: other code feeds the two sides and takes the differences. Each graph is run once on made-up inputs;
`check_parity` looks at more.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moiie_export.families import family_of
from moiie_export.graph.components import Component
from moiie_export.model.load import load_model
from moiie_export.parity.bisect_inputs import made_up_inputs
from moiie_export.parity.bounds import bounds_kind, read_bounds
from moiie_export.parity.built_form import built_form
from moiie_export.parity.comparator import (
    BaseRunner,
    SessionRunner,
    judge,
    largest_of,
    metadata_of,
    outputs_of,
    run_both,
)
from moiie_export.parity.metrics import Array
from moiie_export.parity.quantised import stored_formats
from moiie_export.parity.report import Check, Report
from moiie_export.parity.stored import StoredWeights
from moiie_export.parity.values import caches_of
from moiie_export.recipe_parity import Bounds
from moiie_export.source import ModelSource
from moiie_runtime.backends import get_backend
from moiie_runtime.backends.session import EngineOptions, Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import PORTABLE
from moiie_runtime.kv_cache import static_rows

_EXACT = "expert_ids."


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """What a graph was traced from, in PyTorch, as a Polygraphy runner.

    Args:
        component: the graph.
        model: the reference model with its weights.
    """

    def __init__(self, component: Component, model: Any) -> None:
        super().__init__(name=f"PyTorch {component.name}")
        self.component = component.name
        self._component = component
        self._module = component.module(model).eval()

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of the graph's inputs."""
        return metadata_of({tensor.name: (tensor.dtype, tensor.dims) for tensor in self._component.inputs})

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> Any:
        """The module on these inputs, its outputs by the graph's names."""
        flat = [torch.from_numpy(np.array(feed_dict[tensor.name])) for tensor in self._component.inputs]
        start = time.perf_counter()
        with torch.no_grad():
            results = self._module(*self._component.arrange(flat))
        self.inference_time = time.perf_counter() - start
        names = [tensor.name for tensor in (*self._component.outputs, *self._component.probes)]
        found = results if isinstance(results, tuple) else (results,)
        return OrderedDict((name, each.numpy()) for name, each in zip(names, found, strict=True))


def compare_with_polygraphy(
    bundle: Path,
    checkpoint: Path,
    vision_tower: Path | None,
    target: str | None,
    progress: Callable[[str, int, int], None],
    *,
    gpu: int | None = None,
) -> Report:
    """Run every graph of a bundle, or of a built form, and its reference, and let Polygraphy compare.

    Args:
        bundle: the exported directory.
        checkpoint: what it was exported from.
        vision_tower: where a separate vision tower lies.
        target: a built form; None for the bundle's own graphs.
        progress: called with the stage's name, graphs done and graphs in all.
        gpu: which GPU runs a form that was built for one; None: the first.

    Returns:
        One check for each output of each graph.

    Raises:
        MissingDependency: an engine cannot run on this machine.
    """
    portable = Bundle.open(bundle)
    engine = built_form(portable, target or PORTABLE, gpu)
    options = EngineOptions() if engine is None else engine.options()
    opened = portable if engine is None else engine.bundle
    formats = stored_formats(opened)
    kind = bounds_kind(opened, engine, formats)
    bounds = getattr(read_bounds(opened, [kind]), kind)
    report = Report(opened.name, checkpoint.resolve().name, ", ".join([*formats, opened.dtype]))
    opener = get_backend("onnxruntime" if engine is None else engine.backend)
    try:
        with ModelSource.open(checkpoint, vision_tower) as source, StoredWeights(opened, source) as stored:
            model = load_model(source, read=stored.read)
            components = family_of(source.config).components(source.config, opened.kv_cache.capacity)
            for done, component in enumerate(components):
                progress("polygraphy", done, len(components))
                path = opened.path(opened.components[component.name].file)

                def open_session(name: str = component.name, path: Path = path) -> Session:
                    return opener(path, component=name, threads=None, transient=False, options=options)

                caches = caches_of(opened, options.device)
                inputs = portable.components[component.name].inputs
                runner = SessionRunner(f"{target or PORTABLE} {component.name}", open_session, inputs, caches)
                feeds = made_up_inputs(portable, component.name, rows=static_rows(opened) or 1)
                report.checks += compare(ReferenceRunner(component, model), runner, feeds, bounds)
            progress("polygraphy", len(components), len(components))
    finally:
        options.close()
    return report


def compare(reference: Any, runner: Any, feeds: Mapping[str, Array], bounds: Bounds) -> list[Check]:
    """Two runners on the same inputs.

    Args:
        reference: a Polygraphy runner that is right.
        runner: one that is judged.
        feeds: inputs of both, by name.
        bounds: errors that are allowed, as shares of the largest number of the reference where that is above 1.

    Returns:
        A check for each output that both give.
    """
    runs = run_both(reference, runner, feeds)
    sizes = {name: largest_of(array) for name, array in outputs_of(runs)[0].items()}
    verdicts = judge(runs, {name: _bound(name, bounds) * size for name, size in sizes.items()})
    return [
        Check(name, "error", each.largest / sizes[name], _bound(name, bounds), each.passed, where=reference.component)
        for name, each in verdicts.items()
    ]


def _bound(name: str, bounds: Bounds) -> float:
    if name.startswith(_EXACT):
        return 0.0
    if name.startswith("present."):
        return bounds.kv_error
    if name == "logits":
        return bounds.logits_error
    inner = name.startswith(("hidden.", "router_logits.", "expert_weights."))
    return bounds.hidden_error if inner else bounds.vision_error
