"""The graphs of a bundle as two calls: prefill of whole prompts, and decode of one token a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.adapters import Adapters
from moiie_runtime.backends.session import Array
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_routing import Instance, InstanceRouting
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.prompt import Prompt
from moiie_runtime.residency import release_pages, weight_views
from moiie_runtime.routing import LayerRouting
from moiie_runtime.sessions import Sessions
from moiie_runtime.tensors import TensorFile
from moiie_runtime.vision import Vision

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class StepResult:
    """What one run of the decoder gives.

    Attributes:
        logits: float32 [batch, kept, vocabulary].
        routing: by layer; empty unless it was asked for.
        instances: of a prefill, what the instance router chose for each row; empty for bundles without one.
    """

    logits: Floats
    routing: Mapping[int, LayerRouting]
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """Which rows of a cache a run uses, and how many tokens each of them holds."""

    which: slice
    past_lengths: Ids


@dataclass(frozen=True)
class _Wanted:
    all_logits: bool
    routing: bool


class Decoder:
    """Runs the prefill and decode graphs of a bundle, and before them its router and encoders, over a KV cache.

    Several generations may take turns on one decoder, each with a cache of its own, which the caller owns.

    Args:
        bundle: an opened bundle.
        sessions: its graphs.
        vision: turns pictures into rows.
    """

    def __init__(self, bundle: Bundle, sessions: Sessions, vision: Vision) -> None:
        self._bundle = bundle
        self._sessions = sessions
        self._vision = vision
        router, adapters = bundle.instance_router, bundle.adapters
        self._router = None if router is None else InstanceRouting(bundle, router, sessions)
        self._adapters = None if adapters is None else Adapters(bundle, adapters)
        self._bound: dict[str, tuple[KVCache, slice]] = {}
        self._weights = TensorFile(bundle.path(bundle.embed_tokens.file))
        self._table = _embedding_table(bundle, self._weights)
        built = bundle.weights_file != bundle.embed_tokens.file
        self._phase_weights = TensorFile(bundle.path(bundle.weights_file)) if built else self._weights

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 for a dense model."""
        return self._bundle.model.moe.num_experts if self._bundle.model.moe else 0

    @property
    def opening_seconds(self) -> float:
        """Time spent opening graphs so far."""
        return self._sessions.opening_seconds

    def load(self, component: str) -> None:
        """Open a component's session now, if it is not open, so that its first run is not slower than the others."""
        self._sessions.get(component)

    def image_features(self, prompt: Prompt) -> Floats:
        """What stands for the pictures of a prompt in its decoder input, float32 [images, image_tokens, hidden]."""
        instances = self._route([prompt])
        return self._vision.rows(prompt.pictures, instances[0] if instances else None).rows

    def inputs_embeds(self, prompt: Prompt, picture_rows: Floats | None = None) -> Floats:
        """Decoder input of one prompt, float32 [length, hidden].

        Args:
            prompt: gives the rows of the embedding table.
            picture_rows: [images, image_tokens, hidden], of its pictures; None when it has none.
        """
        is_image = prompt.input_ids == self._bundle.tokens.image_placeholder
        widths = np.where(is_image, self._bundle.tokens.image_tokens, 1)
        positions = np.repeat(is_image, widths)
        result = np.empty((len(positions), self._bundle.model.hidden_size), np.float32)
        result[~positions] = self._rows(prompt.input_ids[~is_image])
        if picture_rows is not None:
            result[positions] = picture_rows.reshape(-1, result.shape[1])
        return result

    def prefill(
        self, prompts: Sequence[Prompt], cache: KVCache, *, all_logits: bool = False, routing: bool = False
    ) -> StepResult:
        """Run whole prompts, one a row, into an empty cache.

        Args:
            prompts: as many as the cache has requests; shorter ones are padded on the right.
            cache: its first row of each request in turn is filled and their lengths are set; see `KVCache.spread`.
            all_logits: logits of every position instead of each row's last; rows beyond a prompt's length are noise.
            routing: also return the experts chosen.

        Returns:
            Logits [batch, 1 or the longest length, vocabulary], and what the instance router chose.
        """
        instances = self._route(prompts)
        lengths = np.array([prompt.length for prompt in prompts], np.int64)
        batch, longest = len(prompts), int(lengths.max())
        embeds = np.zeros((batch, longest, self._bundle.model.hidden_size), np.float32)
        modality = np.zeros((batch, longest), np.int32)
        for row, prompt in enumerate(prompts):
            instance = instances[row] if instances else None
            pictures = self._vision.rows(prompt.pictures, instance) if prompt.pictures else None
            embeds[row, : prompt.length] = self.inputs_embeds(prompt, None if pictures is None else pictures.rows)
            if instance is not None and pictures is not None:
                instances[row] = replace(instance, contributions=pictures.contributions)
            modality[row, : prompt.length] = prompt.token_modality
        if self._adapters is not None:
            self._unbind(cache)  # a cache that was used before is bound with the adapters of that time
            cache.constants = self._adapters.inputs([instance.mole_index for instance in instances])
        feeds = {"inputs_embeds": embeds, "token_modality": modality}
        if cache.static:
            result = self._in_pieces(feeds, lengths, cache, _Wanted(all_logits, routing))
        elif longest <= (self._bundle.prefill_chunk or longest):
            kept = np.tile(np.arange(longest), (batch, 1)) if all_logits else lengths[:, None] - 1
            result = self._run(
                "decoder_prefill",
                {**feeds, "logits_to_keep": kept},
                cache,
                _Rows(slice(0, batch), cache.lengths[:batch]),
                routing,
            )
        else:
            result = self._in_chunks(feeds, lengths, cache, _Wanted(all_logits, routing))
        cache.lengths[:batch] = lengths
        self._sessions.end_prefill()
        opened = self._sessions.opened  # what was closed is bound to nothing
        self._bound = {component: bound for component, bound in self._bound.items() if component in opened}
        return replace(result, instances=tuple(instances))

    def decode(
        self, token_ids: Sequence[int], cache: KVCache, *, active: NDArray[np.bool_], routing: bool = False
    ) -> StepResult:
        """Run one token a row.

        Args:
            token_ids: the last token of each row.
            cache: grows by one token in each active row.
            active: bool [rows]; the other rows are run too, but keep their length, so nothing they write is read.
            routing: also return the experts chosen.

        Returns:
            Logits [rows, 1, vocabulary].
        """
        embeds = self._rows(np.array(token_ids, np.int64))[:, None]
        rows = _Rows(slice(0, len(embeds)), cache.lengths)
        result = self._run("decoder_decode", {"inputs_embeds": embeds}, cache, rows, routing)
        cache.lengths += active
        return result

    def release(self, cache: KVCache) -> None:
        """Let go of a cache that will not be used again, so that its memory can go."""
        with self._sessions.lock:
            self._unbind(cache)
            cache.close()

    def release_prefill_weights(self) -> int:
        """Give back the mapped pages of all weights, after a prefill; see `release_pages`.

        Decode takes back those that it reads, from the page cache: what stays away is what only the prefill and the
        vision encoder use, and the prefill graph's own mapping of what both use.
        """
        phases = self._bundle.residency
        used = {weight for phase in self._bundle.phases.values() for weight in phases[phase].weights}
        with self._sessions.lock:  # not while a graph runs: its pages would be read twice
            return release_pages(self._phase_weights.path, weight_views(self._phase_weights.header, sorted(used)))

    def close(self) -> None:
        """Close all sessions. Closing twice is allowed."""
        with self._sessions.lock:
            self._bound.clear()
            self._sessions.close()

    def _unbind(self, cache: KVCache) -> None:
        with self._sessions.lock:
            for component in [name for name, bound in self._bound.items() if bound[0] is cache]:
                self._sessions.get(component).unbind()
                del self._bound[component]

    def _route(self, prompts: Sequence[Prompt]) -> list[Instance]:
        if self._router is None:
            return []
        instructions = [prompt.instruction for prompt in prompts]
        if None in instructions:
            raise MoiieError(
                f"{self._bundle.name}: a prompt has no instruction, which the instance router reads",
                "prepare prompts with the processor of this bundle",
            )
        return self._router([instruction for instruction in instructions if instruction is not None])

    def _in_chunks(self, feeds: dict[str, Array], lengths: Ids, cache: KVCache, wanted: _Wanted) -> StepResult:
        """A prefill in pieces, row by row, so that what it works with does not grow with the prompt."""
        chunk = self._bundle.prefill_chunk
        assert chunk is not None
        batch, longest = feeds["inputs_embeds"].shape[:2]
        logits = np.zeros((batch, longest if wanted.all_logits else 1, self._bundle.model.vocab_size), np.float32)
        routing: dict[int, LayerRouting] = {}
        for row, length in enumerate(lengths.tolist()):
            for start in range(0, length, chunk):
                part = slice(start, min(start + chunk, length))
                size = part.stop - start
                piece = {name: array[row : row + 1, part] for name, array in feeds.items()}
                piece["logits_to_keep"] = np.arange(size)[None] if wanted.all_logits else np.array([[size - 1]])
                rows = _Rows(slice(row, row + 1), np.array([start], np.int64))
                result = self._run("decoder_prefill", piece, cache, rows, wanted.routing)
                logits[row, part if wanted.all_logits else slice(None)] = result.logits[0]
                _put(routing, result.routing, (batch, longest), (row, part))
        return StepResult(logits, routing)

    def _in_pieces(self, feeds: dict[str, Array], lengths: Ids, cache: KVCache, wanted: _Wanted) -> StepResult:
        """A prefill by graphs that always have all rows of the cache and keep one position's logits of each.

        All rows go through together, piece by piece. What a row writes behind its end is never read, and a row that ended
        in an earlier piece writes behind that.
        """
        batch, longest = feeds["inputs_embeds"].shape[:2]
        if wanted.all_logits:
            raise MoiieError(
                f"{self._bundle.name}: this form of the bundle gives the logits of a prompt's last position only",
                "ask for those, or run the bundle's own graphs, target portable",
            )
        logits = np.zeros((batch, 1, self._bundle.model.vocab_size), np.float32)
        routing: dict[int, LayerRouting] = {}
        chunk = self._bundle.prefill_chunk or longest
        for start in range(0, longest, chunk):
            part = slice(start, min(start + chunk, longest))
            piece = {name: array[:, part] for name, array in feeds.items()}
            last = lengths - 1 - start
            ends = (last >= 0) & (last < part.stop - start)
            piece["logits_to_keep"] = np.where(ends, last, 0)[:, None]
            rows = _Rows(slice(0, batch), np.full(batch, start, np.int64))
            result = self._run("decoder_prefill", piece, cache, rows, wanted.routing)
            logits[ends] = result.logits[ends]
            _put(routing, result.routing, (batch, longest), (slice(0, batch), part))
        return StepResult(logits, routing)

    def _run(self, component: str, feeds: dict[str, Array], cache: KVCache, rows: _Rows, routing: bool) -> StepResult:
        model = self._bundle.model
        batch, sequence = feeds["inputs_embeds"].shape[:2]
        layers = model.moe.layers if routing and model.moe is not None else ()
        names = [f"{kind}.{layer}" for layer in layers for kind in ("expert_ids", "expert_weights")]
        with self._sessions.lock:
            session = self._sessions.get(component)
            bound = self._bound.get(component)
            if bound is None or bound[0] is not cache or bound[1] != rows.which:
                cache.bind(session, rows.which)
                self._bound[component] = (cache, rows.which)
            # A model without experts has no use for the modality, and its graph no such input.
            fitting = {name: array for name, array in feeds.items() if name in session.inputs}
            fitting["past_lengths"] = rows.past_lengths
            fed = {name: cache.fill_up(array) for name, array in fitting.items()}
            outputs = session.run(fed, ["logits", *names])
        chosen = {name: outputs[name].reshape(-1, sequence, outputs[name].shape[-1])[:batch] for name in names}
        return StepResult(
            outputs["logits"][:batch],
            {layer: LayerRouting(chosen[f"expert_ids.{layer}"], chosen[f"expert_weights.{layer}"]) for layer in layers},
        )

    def _rows(self, ids: NDArray[np.int64]) -> Floats:
        return self._table[ids].astype(np.float32, copy=False)


def _put(
    whole: dict[int, LayerRouting],
    part: Mapping[int, LayerRouting],
    shape: tuple[int, int],
    where: tuple[int | slice, slice],
) -> None:
    """Write the routing of a piece of one row, or of all, into that of the whole prefill [rows, tokens, k]."""
    for layer, routing in part.items():
        if layer not in whole:
            sizes = (*shape, routing.expert_ids.shape[-1])
            whole[layer] = LayerRouting(np.zeros(sizes, np.int32), np.zeros(sizes, np.float32))
        rows = 0 if isinstance(where[0], int) else slice(None)
        whole[layer].expert_ids[where] = routing.expert_ids[rows]
        whole[layer].expert_weights[where] = routing.expert_weights[rows]


def _embedding_table(bundle: Bundle, weights: TensorFile) -> Array:
    """The token embeddings [vocabulary, hidden], mapped from the file."""
    table = weights[bundle.embed_tokens.tensor]
    expected = (bundle.model.vocab_size, bundle.model.hidden_size)
    if table.shape != expected or table.dtype not in (np.float32, np.float16):
        raise MoiieError(
            f"{weights.path}: tensor {bundle.embed_tokens.tensor!r} must be float32 or float16 {list(expected)}, "
            f"got {table.dtype} {list(table.shape)}",
            "export the bundle again",
        )
    return table
