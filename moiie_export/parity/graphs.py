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
from moiie_runtime.backends.device import Device
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.backends.session import PORTABLE_OPTIONS, EngineOptions, Session
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
        options: of these sessions. Where they have a device, caches are copied there for every run, and back.
    """

    def __init__(
        self, bundle: Bundle, open_session: Callable[[str], Session], options: EngineOptions = PORTABLE_OPTIONS
    ) -> None:
        self._bundle, self._open, self._options = bundle, open_session, options
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
        """A built engine, its sessions opened as the runtime opens them.

        Raises:
            MissingDependency: it cannot run on this machine.
        """
        opener, bundle, options = get_backend(engine.backend), engine.bundle, engine.options()

        def open_session(name: str) -> Session:
            path = bundle.path(bundle.components[name].file)
            transient = name != "decoder_decode"
            return opener(path, component=name, threads=engine.threads, transient=transient, options=options)

        return cls(bundle, open_session, options)

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
        """Close the sessions, and the device they ran on."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        self._bound.clear()
        self._options.close()

    def __enter__(self) -> BundleGraphs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, component: str, feeds: dict[str, Array], cache: KVCache) -> Trace:
        session = self._session(component)
        fitting = {name: array for name, array in feeds.items() if name in session.inputs}
        fitting["past_lengths"] = cache.lengths
        if self._options.device is not None:
            outputs = _run_on(self._options.device, session, fitting, cache)
        else:
            if self._bound.get(component) is not cache:
                cache.bind(session)
                self._bound[component] = cache
            outputs = session.run(fitting)
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


def _run_on(device: Device, session: Session, feeds: Mapping[str, Array], cache: KVCache) -> dict[str, Array]:
    """One run with the cache's buffers copied to a device and back."""
    buffers = {name: device.upload(cache[name], "the KV cache") for name in cache}
    try:
        for name, buffer in buffers.items():
            session.bind(f"past_key_values.{name}", buffer)
            session.bind(f"present.{name}", buffer)
        for name, array in cache.constants.items():
            session.bind(name, array)
        outputs = session.run(feeds)
        for name, buffer in buffers.items():
            cache[name][...] = buffer.numpy()
    finally:
        session.unbind()
        for buffer in buffers.values():
            buffer.free()
    return outputs


def _marked(model: onnx.ModelProto, probes: tuple[Tensor, ...]) -> bytes:
    """The serialised graph with the probes' values as outputs; weights stay references into the bundle's file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for probe in probes:
        copy.graph.output.append(
            onnx.helper.make_tensor_value_info(probe.name, ELEMENT_TYPES[probe.dtype], list(probe.dims))
        )
    return bytes(copy.SerializeToString())
