"""The three graphs of a bundle as two calls: prefill of whole prompts, and decode of one token a row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moiie_runtime.backends.session import Array, Session
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.kv_cache import KVCache
from moiie_runtime.prompt import Prompt
from moiie_runtime.residency import release_pages, weight_views
from moiie_runtime.routing import LayerRouting
from moiie_runtime.tensors import TensorFile

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StepResult:
    """What one run of the decoder gives.

    Attributes:
        logits: float32 [batch, kept, vocabulary].
        routing: by layer; empty unless it was asked for.
    """

    logits: Floats
    routing: Mapping[int, LayerRouting]


class Decoder:
    """Runs the vision encoder, prefill and decode graphs of a bundle over a KV cache that the caller owns.

    Several generations may take turns on one decoder, each with its own cache.

    Args:
        bundle: an opened bundle.
        open_session: opens the session of a component; called once for each, when it is first needed.
    """

    def __init__(self, bundle: Bundle, open_session: Callable[[str], Session]) -> None:
        self._bundle = bundle
        self._open_session = open_session
        self._sessions: dict[str, Session] = {}
        self._bound: dict[str, KVCache] = {}
        self._weights = TensorFile(bundle.path(bundle.embed_tokens.file))
        self._table = _embedding_table(bundle, self._weights)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 for a dense model."""
        return self._bundle.model.moe.num_experts if self._bundle.model.moe else 0

    def load(self, component: str) -> None:
        """Open a component's session now, if it is not open, so that its first run is not slower than the others."""
        with self._lock:
            self._session(component)

    def image_features(self, pixel_values: Floats) -> Floats:
        """Rows that stand for pictures: float32 [images, image_tokens, hidden], from [images, 3, size, size].

        One picture at a time: activations are then bounded by one, whatever their number.
        """
        with self._lock:
            session = self._session("vision_encoder")
            features = [
                session.run({"pixel_values": pixel_values[i : i + 1]}, ["image_features"])["image_features"]
                for i in range(len(pixel_values))
            ]
        return np.concatenate(features)

    def inputs_embeds(self, prompt: Prompt) -> Floats:
        """Decoder input of one prompt, float32 [length, hidden]: rows of the embedding table and of its pictures."""
        is_image = prompt.input_ids == self._bundle.tokens.image_placeholder
        widths = np.where(is_image, self._bundle.tokens.image_tokens, 1)
        positions = np.repeat(is_image, widths)
        result = np.empty((len(positions), self._bundle.model.hidden_size), np.float32)
        result[~positions] = self._rows(prompt.input_ids[~is_image])
        if prompt.pixel_values is not None:
            features = self.image_features(prompt.pixel_values)
            result[positions] = features.reshape(-1, result.shape[1])
        return result

    def prefill(
        self, prompts: Sequence[Prompt], cache: KVCache, *, all_logits: bool = False, routing: bool = False
    ) -> StepResult:
        """Run whole prompts, one a row, into an empty cache.

        Args:
            prompts: as many as the cache has rows; shorter ones are padded on the right.
            cache: filled; its lengths are set.
            all_logits: logits of every position instead of each row's last; rows beyond a prompt's length are noise.
            routing: also return the experts chosen.

        Returns:
            Logits [batch, 1 or the longest length, vocabulary].
        """
        lengths = np.array([prompt.length for prompt in prompts], np.int64)
        batch, longest = len(prompts), int(lengths.max())
        embeds = np.zeros((batch, longest, self._bundle.model.hidden_size), np.float32)
        modality = np.zeros((batch, longest), np.int32)
        for row, prompt in enumerate(prompts):
            embeds[row, : prompt.length] = self.inputs_embeds(prompt)
            modality[row, : prompt.length] = prompt.token_modality
        kept = np.tile(np.arange(longest), (batch, 1)) if all_logits else lengths[:, None] - 1
        feeds: dict[str, Array] = {"inputs_embeds": embeds, "token_modality": modality, "logits_to_keep": kept}
        result = self._run("decoder_prefill", feeds, cache, routing)
        cache.lengths[:] = lengths
        return result

    def decode(
        self, token_ids: Sequence[int], cache: KVCache, *, active: NDArray[np.bool_], routing: bool = False
    ) -> StepResult:
        """Run one token a row.

        Args:
            token_ids: the last token of each row.
            cache: grows by one token in each active row.
            active: bool [batch]; the other rows are run too, but keep their length, so nothing they write is read.
            routing: also return the experts chosen.

        Returns:
            Logits [batch, 1, vocabulary].
        """
        embeds = self._rows(np.array(token_ids, np.int64))[:, None]
        result = self._run("decoder_decode", {"inputs_embeds": embeds}, cache, routing)
        cache.lengths += active
        return result

    def release(self, cache: KVCache) -> None:
        """Let go of a cache that will not be used again, so that its memory can go."""
        with self._lock:
            for component in [name for name, bound in self._bound.items() if bound is cache]:
                self._sessions[component].unbind()
                del self._bound[component]

    def release_prefill_weights(self) -> int:
        """Give back the mapped pages of weights that decode does not use; see `release_pages`."""
        phases = self._bundle.residency
        unused = {*phases["vision_encoder"].weights, *phases["prefill"].weights} - {*phases["decode"].weights}
        with self._lock:  # not while a graph runs: its pages would be read twice
            return release_pages(self._weights.path, weight_views(self._weights.header, sorted(unused)))

    def close(self) -> None:
        """Close all sessions. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._bound.clear()
            while self._sessions:
                self._sessions.popitem()[1].close()

    def _run(self, component: str, feeds: dict[str, Array], cache: KVCache, routing: bool) -> StepResult:
        model = self._bundle.model
        layers = model.moe.layers if routing and model.moe is not None else ()
        names = [f"{kind}.{layer}" for layer in layers for kind in ("expert_ids", "expert_weights")]
        with self._lock:
            session = self._session(component)
            if self._bound.get(component) is not cache:
                cache.bind(session)
                self._bound[component] = cache
            # A model without experts has no use for the modality, and its graph no such input.
            fitting = {name: array for name, array in feeds.items() if name in session.inputs}
            outputs = session.run({**fitting, "past_lengths": cache.lengths}, ["logits", *names])
        batch, sequence = feeds["inputs_embeds"].shape[:2]
        chosen = {name: outputs[name].reshape(batch, sequence, -1) for name in names}
        return StepResult(
            outputs["logits"],
            {layer: LayerRouting(chosen[f"expert_ids.{layer}"], chosen[f"expert_weights.{layer}"]) for layer in layers},
        )

    def _session(self, component: str) -> Session:
        if self._closed:
            raise MoiieError(f"{self._bundle.root}: the model is closed", "load the bundle again")
        if component not in self._sessions:
            self._sessions[component] = self._open_session(component)
        return self._sessions[component]

    def _rows(self, ids: NDArray[np.int64]) -> Floats:
        return self._table[ids].astype(np.float32, copy=False)


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
