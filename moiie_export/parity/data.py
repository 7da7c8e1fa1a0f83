"""The numbers behind a report, for plots: errors by layer, routing, margins, logits along the sequence, texts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from moiie_export.model_config import ModelConfig
from moiie_export.parity.cases import Question
from moiie_export.parity.decoder_stage import CaseRun
from moiie_export.parity.measure import LayerMeasure, Measure
from moiie_export.parity.metrics import MARGIN_EDGES, Array
from moiie_export.parity.report import Check, left_out
from moiie_export.parity.text import Answers
from moiie_export.recipe_parity import Bounds
from moiie_runtime.prompt import Prompt


def report_data(bounds: Bounds, steps: int) -> dict[str, Any]:
    """What is the same for all cases."""
    return {"bounds": asdict(bounds), "decode_steps": steps, "margin_edges": list(MARGIN_EDGES), "cases": []}


def model_data(config: ModelConfig) -> dict[str, Any]:
    """The checkpoint's decoder: its layers, and which experts a token of each modality may go to."""
    moe = config.moe
    experts = None
    if moe is not None:
        groups = {str(modality): list(ids) for modality, ids in moe.expert_groups.items()}
        sizes = {"num_experts": moe.num_experts, "top_k": moe.top_k, "layers": list(moe.layers)}
        experts = {**sizes, "expert_groups": groups, "routed": bool(moe.gates)}
    return {"model_type": config.model_type, "num_hidden_layers": config.text.num_hidden_layers, "moe": experts}


def case_data(question: Question, prompt: Prompt, run: CaseRun, answers: Answers) -> dict[str, Any]:
    """Everything measured in one case."""
    phases = {phase: _phase(measured) for phase, measured in run.measures.items()}
    phases["prefill"]["logits"]["positions"] = [int(position) for position in run.inputs.kept]
    return {
        "name": question.name,
        "question": question.text,
        "images": len(question.images),
        "positions": prompt.length,
        "image_tokens": prompt.image_tokens,
        "vision_spans": _spans(run.inputs.is_vision),
        **phases,
        "text": answers.to_dict(),
    }


def coverage(config: ModelConfig, runs: list[CaseRun]) -> list[Check]:
    """An entry for each layer and modality with experts that no token of any case chose: values cannot judge those."""
    moe = config.moe
    if moe is None or not moe.gates or not runs:
        return []
    entries = []
    for layer in moe.layers:
        for modality, group in moe.expert_groups.items():
            reached = [0] * moe.num_experts
            for run in runs:
                for measured in run.measures.values():
                    found = measured.layers[layer].routing.get(modality)
                    if found is not None:
                        reached = [a + b for a, b in zip(reached, found.reached, strict=True)]
            missed = [expert for expert in group if not reached[expert]]
            if missed:
                names = ", ".join(map(str, missed))
                reason = f"no {modality} token of any case chose expert {names}; stored weights are compared below"
                entries.append(left_out("expert values", reason, where=f"layer {layer} {modality}", layer=layer))
    return entries


def _spans(chosen: Array) -> list[list[int]]:
    """[start, stop) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(np.int8), [0]])))
    return [[int(start), int(stop)] for start, stop in edges.reshape(-1, 2)]


def _phase(measured: Measure) -> dict[str, Any]:
    return {
        "layers": [_layer(layer) for layer in measured.layers],
        "logits": {
            "error": measured.logits.value,
            "errors": [value for value, _ in measured.by_position],
            "same_best_token": [agrees for _, agrees in measured.by_position],
        },
        "ties": measured.ties,
        "decisions": measured.decisions,
    }


def _layer(layer: LayerMeasure) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "errors": {name: found.value for name, found in layer.errors.items()},
        "routing": {
            modality: {**asdict(agreement), "agreement": agreement.share}
            for modality, agreement in layer.routing.items()
        },
    }
