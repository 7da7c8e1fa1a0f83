"""MoME: the instruction's decisions, three encoders with what happens inside them, and their weighted rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moiie_export.families.mome import SENTENCE_TOKENIZER
from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.mome.router import InstanceRouting
from moiie_export.mome_config import MomeConfig, VisionExpert
from moiie_export.parity.cases import Question
from moiie_export.parity.graphs import BundleGraphs
from moiie_export.parity.metrics import Array, error, non_finite
from moiie_export.parity.reference import Reference
from moiie_export.parity.report import Check, judge, tell
from moiie_export.parity.sight import Seen
from moiie_export.recipe_parity import Bounds
from moiie_runtime.bundle import Bundle
from moiie_runtime.prompt import Prompt
from moiie_runtime.vision import encoder_inputs
from moiie_runtime.vlm import VLM
from moiie_runtime.word_pieces import WordPieces

Outputs = Mapping[str, Array]
_PLACES = {"vision_features": "tower", "pooled": "pooling", "refined": "ADT", "image_features": "projector"}


class MomeSight:
    """Router, encoders and their sum.

    Args:
        vlm: the bundle as the runtime loads it.
        graphs: the bundle's marked graphs.
        reference: the PyTorch model.
        bounds: what differences are allowed.
    """

    def __init__(self, vlm: VLM, graphs: BundleGraphs, reference: Reference, bounds: Bounds) -> None:
        self._vlm, self._graphs, self._model, self._bounds = vlm, graphs, reference.model, bounds
        self._config: MomeConfig = reference.model.config
        self._pieces = _Pieces(vlm.bundle, self._config)

    def look(self, question: Question, prompt: Prompt) -> Seen:
        """The instruction first, then the pictures."""
        instruction = "" if prompt.instruction is None else prompt.instruction
        ids, checks = self._pieces.compare(question, instruction)
        mask = np.ones_like(ids)
        with torch.inference_mode():
            own: InstanceRouting = self._model.router(torch.from_numpy(ids), torch.from_numpy(mask))
        outputs = self._graphs.run("router", {"input_ids": ids, "attention_mask": mask})
        checks += self._judge_weights(outputs, own, question.name)
        adapters, check, data = self._settle(outputs["mole_index"][0], own, question.name)
        checks.append(check)
        data["move_weights"] = own.move_weights[0].tolist()
        if not prompt.pictures:
            return Seen(checks, None, adapters, {"instance": data})
        seen = [self._picture(prompt, number, question.name) for number in range(len(prompt.pictures))]
        checks += [check for found, _ in seen for check in found]
        experts = [torch.cat([rows[name] for _, rows in seen]) for name in seen[0][1]]
        weights = own.move_weights.expand(len(seen), -1)
        rows: Array = visual_tokens(weights, experts, self._config.queries).numpy()
        checks.append(self._judge_rows(prompt, rows, question.name))
        data["contributions"] = _contributions(own.move_weights[0], experts, self._config.queries)
        data["experts"] = [expert.name for expert in self._config.experts]
        return Seen(checks, rows, adapters, {"instance": data})

    def _judge_weights(self, outputs: Outputs, own: InstanceRouting, case: str) -> list[Check]:
        """The sentence embedding, and what the routers make of it."""
        place: dict[str, Any] = {"case": case, "phase": "router"}
        bad = sum(non_finite(array) for array in outputs.values() if array.dtype == np.float32)
        checks = [tell("finite", [f"{bad} NaN or infinite values"] * bool(bad), **place)]
        for name, where in (
            ("sentence_embedding", "sentence encoder"),
            ("move_weights", "vision experts"),
            ("mole_logits", "adapters"),
        ):
            if name in outputs:  # an engine tells less
                value, bound = error(outputs[name], getattr(own, name).numpy()).value, self._bounds.vision_error
                checks.append(judge("instance routing", "error", value, bound, where=where, **place))
        return checks

    def _settle(self, chosen: Array, own: InstanceRouting, case: str) -> tuple[Array, Check, dict[str, Any]]:
        """The adapter of every layer: the reference's, or the bundle's where the two best are nearly equal."""
        probabilities = own.mole_logits[0].softmax(dim=-1).numpy()
        wanted: Array = own.mole_index[0].numpy()
        falling = -np.sort(-probabilities, axis=1)
        margins = falling[:, 0] - falling[:, 1] if falling.shape[1] > 1 else np.full(len(falling), np.inf)
        differs = chosen != wanted
        inside = np.clip(chosen, 0, probabilities.shape[1] - 1)
        gaps = falling[:, 0] - np.take_along_axis(probabilities, inside[:, None].astype(np.int64), 1)[:, 0]
        ties = differs & (inside == chosen) & (gaps < self._bounds.tie_margin)
        wrong = np.flatnonzero(differs & ~ties)
        layers = self._config.mole.layers
        notes = [f"layer {layers[i]} takes adapter {chosen[i]}, expected {wanted[i]}" for i in wrong]
        layer = None if not notes else layers[int(wrong[0])]
        settled: Array = np.where(ties, chosen, wanted).astype(np.int32)
        data = {"mole_index": settled.tolist(), "mole_margins": margins.tolist(), "ties": int(ties.sum())}
        place: dict[str, Any] = {"case": case, "phase": "router", "where": "adapters", "layer": layer}
        return settled, tell("instance routing", notes, **place), data

    def _picture(self, prompt: Prompt, number: int, case: str) -> tuple[list[Check], dict[str, torch.Tensor]]:
        """Every encoder on one picture; the checks, and the reference's image_features by encoder."""
        checks: list[Check] = []
        features: dict[str, torch.Tensor] = {}
        for encoder, expert in zip(self._vlm.bundle.encoders, self._config.experts, strict=True):
            inputs = encoder_inputs(encoder, prompt.pictures[number])
            module = self._model.get_submodule(expert.component)
            with torch.inference_mode():
                found = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values()))
            wanted = dict(zip(_outputs_of(expert), found, strict=True))
            ours = self._graphs.run(expert.component, inputs)
            features[expert.name] = wanted["image_features"]
            bad = sum(non_finite(array) for array in ours.values())
            place: dict[str, Any] = {"case": case, "phase": expert.component}
            checks.append(tell("finite", [f"{bad} NaN or infinite features"] * bool(bad), **place))
            for name, inside in _PLACES.items():
                if name in wanted and name in ours:  # an engine tells less
                    value, where = error(ours[name], wanted[name].numpy()).value, f"{expert.name} {inside}"
                    checks.append(judge("vision", "error", value, self._bounds.vision_error, where=where, **place))
        return checks, features

    def _judge_rows(self, prompt: Prompt, rows: Array, case: str) -> Check:
        """What the runtime itself puts into the decoder's input, from its own router, encoders and sum."""
        found = error(self._vlm.image_features(prompt), rows)
        row = "" if found.row is None else f"picture {found.row + 1}"
        bound = self._bounds.vision_error
        return judge("vision", "error", found.value, bound, where="weighted sum", case=case, note=row)


class _Pieces:
    """Both sides' word pieces of an instruction."""

    def __init__(self, bundle: Bundle, config: MomeConfig) -> None:
        settings = bundle.instance_router
        assert settings is not None
        self._ours = WordPieces(bundle.path(settings.tokenizer), settings.max_length)
        self._theirs = Tokenizer.from_file(str(bundle.path(SENTENCE_TOKENIZER)))
        self._theirs.no_padding()
        self._theirs.enable_truncation(config.sentence.max_length)

    def compare(self, question: Question, instruction: str) -> tuple[Array, list[Check]]:
        """Expected ids [1, n] and the check that the bundle reads the question, all of it and nothing else."""
        expected = self._theirs.encode(question.text).ids
        found = self._ours([instruction])[0][0].tolist()
        notes = [] if found == expected else [f"the router reads {instruction!r} as {found}, expected {expected}"]
        return np.array([expected], np.int64), [tell("instruction", notes, case=question.name)]


def _outputs_of(expert: VisionExpert) -> tuple[str, ...]:
    """Names of what an expert's module returns, in order."""
    inside = ("pooled", "refined") if expert.adt is not None else ()
    return ("image_features", "vision_features", *inside)


def _contributions(weights: torch.Tensor, features: list[torch.Tensor], queries: int) -> list[float]:
    """Each expert's share of the mean absolute weighted features (spec mome.md, 1.2): what the paper's figures show."""
    sizes = torch.stack(
        [weight * each[:, -queries:].abs().mean() for weight, each in zip(weights, features, strict=True)]
    )
    shares: list[float] = (sizes / sizes.sum()).tolist()
    return shares
