"""The bundle's side: its graphs in ONNX Runtime on copies in memory whose inner values are outputs too, or built engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import numpy as np
import onnx
import torch

from moiie_export.graph.components import Component, Tensor
from moiie_export.parity.metrics import Array
from moiie_export.parity.report import Check, left_out
from moiie_export.parity.trace import Routed, Trace
from moiie_runtime.backends import get_backend
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


_KINDS = {
    "hidden": "hidden states",
    "router_logits": "router logits",
    "expert_ids": "routing",
    "expert_weights": "expert weights",
    "vision_features": "tower features",
    "pooled": "pooled features",
    "refined": "ADT features",
    "sentence_embedding": "the sentence embedding",
    "move_logits": "logits of vision experts",
    "mole_logits": "logits of adapters",
}
"""What people call the values whose names begin so."""


class BundleGraphs:
    """Runs the graphs of a bundle, whatever their sessions are. Use it as a context manager.

    Args:
        bundle: the bundle, its files verified, or with a built engine in its graphs' place.
        open_session: component -> its session. What a session does not give as an output is not compared.
        options: of these sessions; closed with them.
        built: whether they are those of a built engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_session: Callable[[str], Session],
        options: EngineOptions = PORTABLE_OPTIONS,
        *,
        built: bool = False,
    ) -> None:
        self._bundle, self._open, self._options, self._built = bundle, open_session, options, built
        self._sessions: dict[str, Session] = {}
        self._bound: set[str] = set()
        self._cache: KVCache | None = None

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

        return cls(bundle, open_session, options, built=True)

    def run(self, component: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """All outputs and probes of a graph that has no cache; an engine gets pictures one by one, as the runtime feeds it."""
        session = self._session(component)
        count = len(next(iter(feeds.values())))
        if not self._built or count == 1:
            return session.run(dict(feeds))
        each = [session.run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(count)]
        return {name: np.concatenate([found[name] for found in each]) for name in each[0]}

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for so many prompts, where the sessions run; the one given before must not be used any more."""
        self._release_cache()
        self._cache = KVCache(self._bundle, rows, device=self._options.device)
        return self._cache

    def prefill(self, inputs_embeds: Array, token_modality: Array, logits_to_keep: Array, cache: KVCache) -> Trace:
        """Run [B, T, H] embeddings behind what the cache holds; its lengths are not changed.

        Graphs of fixed size take a prompt in pieces and give the logits of one position of each row: a piece is run
        again for every further position that is wanted.
        """
        feeds = {"inputs_embeds": inputs_embeds, "token_modality": token_modality}
        if not cache.static:
            outputs = self._outputs("decoder_prefill", {**feeds, "logits_to_keep": logits_to_keep}, cache)
            return self._trace([outputs], outputs["logits"], inputs_embeds, cache)
        logits = np.zeros((*logits_to_keep.shape, self._bundle.model.vocab_size), np.float32)
        pieces = []
        tokens = inputs_embeds.shape[1]
        chunk = self._bundle.prefill_chunk or tokens
        for start in range(0, tokens, chunk):
            piece = {name: array[:, start : start + chunk] for name, array in feeds.items()}
            here = (logits_to_keep >= start) & (logits_to_keep < start + chunk)
            runs = []
            for column in np.flatnonzero(here.any(axis=0)) if here.any() else (0,):
                kept = np.where(here[:, column], logits_to_keep[:, column] - start, 0)[:, None]
                runs.append(self._outputs("decoder_prefill", {**piece, "logits_to_keep": kept}, cache, start))
                rows = np.flatnonzero(here[:, column])
                logits[rows, column] = runs[-1]["logits"][rows, 0]
            pieces.append(runs[0])
        return self._trace(pieces, logits, inputs_embeds, cache)

    def decode(self, inputs_embeds: Array, cache: KVCache) -> Trace:
        """Run one token a row, [B, 1, H]; the cache's lengths are not changed."""
        outputs = self._outputs("decoder_decode", {"inputs_embeds": inputs_embeds}, cache)
        return self._trace([outputs], outputs["logits"][: len(inputs_embeds)], inputs_embeds, cache)

    def unseen(self, components: Sequence[Component]) -> list[Check]:
        """An entry for each kind of value inside these graphs that their sessions do not give."""
        found: dict[tuple[str, str], Check] = {}
        for component in components if self._built else ():
            given = self._bundle.components[component.name].outputs
            for tensor in (*component.outputs, *component.probes):
                if tensor.name not in given:
                    kind = _KINDS.get(tensor.name.split(".")[0], tensor.name)
                    reason = "the engine does not give them; `moiie parity --bisect` looks inside"
                    found[component.name, kind] = left_out(kind, reason, phase=component.name)
        return list(found.values())

    def forget(self, components: Sequence[str]) -> None:
        """Close these sessions, to give their memory back; they are opened again when they are needed."""
        for name in components:
            if name in self._sessions:
                self._sessions.pop(name).close()

    def close(self) -> None:
        """Close the sessions, and the device they ran on. Closing twice is allowed."""
        self._release_cache()
        while self._sessions:
            self._sessions.popitem()[1].close()
        self._options.close()

    def __enter__(self) -> BundleGraphs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _outputs(self, component: str, feeds: Mapping[str, Array], cache: KVCache, done: int = 0) -> dict[str, Array]:
        """One run of a decoder graph, `done` tokens behind what the cache holds."""
        session = self._session(component)
        fitting = {name: array for name, array in feeds.items() if name in session.inputs}
        fitting["past_lengths"] = cache.lengths + done
        if component not in self._bound:
            cache.bind(session)
            self._bound.add(component)
        return session.run({name: cache.fill_up(array) for name, array in fitting.items()})

    def _trace(self, pieces: Sequence[Mapping[str, Array]], logits: Array, inputs: Array, cache: KVCache) -> Trace:
        """What the runs of one call gave, for inputs [B, T, H] that went in piece by piece."""
        model = self._bundle.model

        def rows(name: str) -> Array:
            found = [piece[name].reshape(cache.rows, -1, piece[name].shape[-1]) for piece in pieces]
            return np.concatenate(found, axis=1)[: len(inputs)]

        layers = range(model.num_hidden_layers)
        routed = model.moe is not None and model.moe.routed
        return Trace(
            logits,
            tuple(rows(name) if (name := f"hidden.{layer}") in pieces[0] else None for layer in layers),
            tuple(np.asarray(cache[f"{layer}.key"], np.float32) for layer in layers),
            tuple(np.asarray(cache[f"{layer}.value"], np.float32) for layer in layers),
            {
                layer: Routed(
                    rows(f"expert_ids.{layer}"),
                    rows(f"expert_weights.{layer}"),
                    rows(f"router_logits.{layer}") if routed else None,
                )
                for layer in (model.moe.layers if model.moe else ())
                if f"expert_ids.{layer}" in pieces[0]
            },
        )

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        return self._sessions[name]

    def _release_cache(self) -> None:
        while self._bound:
            self._sessions[self._bound.pop()].unbind()
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def _marked(model: onnx.ModelProto, probes: tuple[Tensor, ...]) -> bytes:
    """The serialised graph with the probes' values as outputs; weights stay references into the bundle's file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for probe in probes:
        copy.graph.output.append(
            onnx.helper.make_tensor_value_info(probe.name, ELEMENT_TYPES[probe.dtype], list(probe.dims))
        )
    return bytes(copy.SerializeToString())
