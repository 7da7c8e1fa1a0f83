"""The bundle's side: its graphs in ONNX Runtime on copies in memory whose inner values are outputs too, or built engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import numpy as np
import onnx
import torch

from moiie_export.graph.components import Component, Tensor
from moiie_export.parity.metrics import Array
from moiie_export.parity.trace import Routed, Trace
from moiie_runtime.backends import get_backend
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.backends.session import Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import Engine
from moiie_runtime.kv_cache import KVCache

ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
}


class BundleGraphs:
    """Runs the graphs of a bundle, whatever their sessions are. Use it as a context manager.

    Args:
        bundle: the bundle, its files verified, or with a built engine in its graphs' place.
        open_session: component -> its session. What a session does not give as an output is not compared.
    """

    def __init__(self, bundle: Bundle, open_session: Callable[[str], Session]) -> None:
        self._bundle, self._open = bundle, open_session
        self._sessions: dict[str, Session] = {}
        self._bound: dict[str, KVCache] = {}

    @classmethod
    def marked(
        cls, bundle: Bundle, components: tuple[Component, ...], models: Mapping[str, onnx.ModelProto]
    ) -> BundleGraphs:
        """The portable graphs with their probes as extra outputs; the weights are mapped from the bundle's own file.

        Args:
            bundle: the bundle.
            components: what its graphs must be; checked before.
            models: component -> the parsed graph; marked here.
        """
        known = {component.name: component for component in components}

        def open_session(name: str) -> Session:
            marked = _marked(models[name], known[name].probes)
            folder = bundle.path(known[name].file).parent
            return OnnxRuntimeSession(marked, component=f"marked {name}", folder=folder)

        return cls(bundle, open_session)

    @classmethod
    def built(cls, engine: Engine) -> BundleGraphs:
        """A built engine, its sessions opened as the runtime opens them."""
        opener, bundle = get_backend(engine.backend), engine.bundle

        def open_session(name: str) -> Session:
            path = bundle.path(bundle.components[name].file)
            transient = name != "decoder_decode"
            return opener(path, component=name, threads=engine.threads, transient=transient, options=engine.options())

        return cls(bundle, open_session)

    def run(self, component: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """All outputs and probes of a graph that has no cache."""
        return self._session(component).run(dict(feeds))

    def prefill(self, inputs_embeds: Array, token_modality: Array, logits_to_keep: Array, cache: KVCache) -> Trace:
        """Run [B, T, H] embeddings behind what the cache holds; its lengths are not changed."""
        feeds = {"inputs_embeds": inputs_embeds, "token_modality": token_modality, "logits_to_keep": logits_to_keep}
        return self._run("decoder_prefill", feeds, cache)

    def decode(self, inputs_embeds: Array, cache: KVCache) -> Trace:
        """Run one token a row, [B, 1, H]; the cache's lengths are not changed."""
        return self._run("decoder_decode", {"inputs_embeds": inputs_embeds}, cache)

    def close(self) -> None:
        """Close the sessions."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        self._bound.clear()

    def __enter__(self) -> BundleGraphs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, component: str, feeds: dict[str, Array], cache: KVCache) -> Trace:
        session = self._session(component)
        if self._bound.get(component) is not cache:
            cache.bind(session)
            self._bound[component] = cache
        fitting = {name: array for name, array in feeds.items() if name in session.inputs}
        outputs = session.run({**fitting, "past_lengths": cache.lengths})
        model = self._bundle.model
        batch, tokens = feeds["inputs_embeds"].shape[:2]

        def rows(name: str) -> Array:
            array = outputs[name]
            return array.reshape(batch, tokens, array.shape[-1])

        layers = range(model.num_hidden_layers)
        routed = model.moe is not None and model.moe.routed
        return Trace(
            outputs["logits"],
            tuple(rows(name) if (name := f"hidden.{layer}") in outputs else None for layer in layers),
            tuple(np.asarray(cache[f"{layer}.key"], np.float32) for layer in layers),
            tuple(np.asarray(cache[f"{layer}.value"], np.float32) for layer in layers),
            {
                layer: Routed(
                    rows(f"expert_ids.{layer}"),
                    rows(f"expert_weights.{layer}"),
                    rows(f"router_logits.{layer}") if routed else None,
                )
                for layer in (model.moe.layers if model.moe else ())
                if f"expert_ids.{layer}" in outputs
            },
        )

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        return self._sessions[name]


def _marked(model: onnx.ModelProto, probes: tuple[Tensor, ...]) -> bytes:
    """The serialised graph with the probes' values as outputs; weights stay references into the bundle's file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for probe in probes:
        copy.graph.output.append(
            onnx.helper.make_tensor_value_info(probe.name, ELEMENT_TYPES[probe.dtype], list(probe.dims))
        )
    return bytes(copy.SerializeToString())
