"""Made-up documents of comparisons, of any size, in the form that `Report.to_dict` gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moiie_export.parity.metrics import MARGIN_EDGES
from moiie_export.parity.report import Check, Report, judge, left_out, tell

BOUND = 2e-4
VISION = (5, 12)
PROMPT = 24
STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """What the made-up model has; `wrong` is a layer whose hidden states differ, and from the next one on the routing."""

    layers: int = 4
    sparse: tuple[int, ...] = (1, 3)
    experts: int = 4
    groups: Mapping[str, tuple[int, ...]] | None = None
    wrong: int | None = None
    routed: bool = True
    quantised: bool = False
    name: str = "made-up"
    text: str = "A red truck is parked beside a brick house."

    @property
    def expert_groups(self) -> Mapping[str, tuple[int, ...]]:
        """Modality -> experts; by default vision may not go to the last one, nor language to the first."""
        every = tuple(range(self.experts))
        return self.groups or {"language": every[1:], "vision": every[:-1]}


def document(sizes: Sizes | None = None, **changes: Any) -> dict[str, Any]:
    """A document as it comes out of JSON. Keywords replace fields of `Sizes`."""
    sizes = replace(sizes or Sizes(), **changes)
    random = np.random.default_rng(3)
    cases = [_case(name, sizes, random) for name in ("picture", "text")]
    report = Report(sizes.name, "checkpoint", "float32", _checks(cases, sizes))
    moe = {"num_experts": sizes.experts, "top_k": 2, "layers": list(sizes.sparse), "routed": sizes.routed}
    moe["expert_groups"] = {modality: list(group) for modality, group in sizes.expert_groups.items()}
    report.data = {
        "bounds": {"hidden_error": BOUND, "logits_error": BOUND, "tie_margin": 1e-5, "tie_fraction": 0.01},
        "decode_steps": STEPS,
        "margin_edges": list(MARGIN_EDGES),
        "model": {"model_type": "m", "num_hidden_layers": sizes.layers, "moe": moe if sizes.sparse else None},
        "cases": cases,
    }
    if sizes.quantised:
        report.data["quantisation"] = _quantisation(sizes)
    found: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    return found


def _case(name: str, sizes: Sizes, random: np.random.Generator) -> dict[str, Any]:
    vision = name == "picture"
    tokens = {"language": PROMPT - (VISION[1] - VISION[0] if vision else 0), "vision": VISION[1] - VISION[0]}
    prefill = _phase(sizes, random, tokens if vision else {**tokens, "vision": 0}, PROMPT)
    prefill["logits"]["positions"] = list(range(PROMPT))
    text, wrong = sizes.text, sizes.wrong is not None
    words = text.split()
    other = " ".join([*words[:3], "not", *words[4:]]) if wrong else text
    return {
        "name": name,
        "question": f"What is <image>? {sizes.text}",
        "images": int(vision),
        "positions": PROMPT,
        "image_tokens": VISION[1] - VISION[0],
        "vision_spans": [list(VISION)] if vision else [],
        "prefill": prefill,
        "decode": _phase(sizes, random, {"language": STEPS, "vision": 0}, STEPS),
        "text": {
            "reference_ids": list(range(200, 200 + len(words))),
            "bundle_ids": [777 if wrong and index == 3 else 200 + index for index in range(len(words))],
            "reference_text": text,
            "bundle_text": other,
            "shared_text": " ".join(words[:3]) if wrong else text,
            "reference_token": words[3] if wrong else None,
            "bundle_token": "not" if wrong else None,
            "diverges": 3 if wrong else None,
            "gap": 1.5 if wrong else None,
            "near": False,
        },
    }


def _quantisation(sizes: Sizes) -> dict[str, Any]:
    """A picture and a text of 40 tokens; all but one token a layer keep their experts."""
    cases = [{"case": name, "logits_error": 0.125, "top1_agreement": 39 / 40} for name in ("picture", "text")]
    tokens = {"language": 60, "vision": 20}
    routing = {
        modality: {str(layer): {"tokens": count, "same": count - 1} for layer in sizes.sparse}
        for modality, count in tokens.items()
    }
    bounds = {"logits_error": 0.4, "top1_agreement": 0.85, "routing_agreement": 0.95}
    return {"bounds": bounds, "formats": ["int4", "int8"], "cases": cases, "routing": routing}


def _phase(sizes: Sizes, random: np.random.Generator, tokens: Mapping[str, int], positions: int) -> dict[str, Any]:
    wrong = sizes.wrong is not None
    small = [float(value) for value in random.uniform(1e-7, 1e-5, positions)]
    return {
        "layers": [_layer(layer, sizes, random, tokens) for layer in range(sizes.layers)],
        "logits": {
            "error": 0.5 if wrong else max(small),
            "errors": [0.5, *small[1:]] if wrong else small,
            "same_best_token": [not (wrong and index == 0) for index in range(positions)],
        },
        "ties": 0,
        "decisions": sum(tokens.values()) * len(sizes.sparse),
    }


def _layer(layer: int, sizes: Sizes, random: np.random.Generator, tokens: Mapping[str, int]) -> dict[str, Any]:
    bad = sizes.wrong is not None and layer >= sizes.wrong
    names = ["hidden states", "keys", "values", *(["expert weights"] if layer in sizes.sparse else [])]
    errors = {name: float(random.uniform(1e-7, 1e-5)) for name in names} | ({"hidden states": 0.25} if bad else {})
    routing = {}
    for modality, count in tokens.items() if layer in sizes.sparse else ():
        group = sizes.expert_groups[modality]
        chosen = [random.permutation(group)[:2] for _ in range(count)]
        reached = np.bincount(np.array(chosen, int).reshape(-1), minlength=sizes.experts)
        spoiled = bad and layer != sizes.wrong and count > 0
        margins = np.histogram(random.uniform(0, 0.5, count), MARGIN_EDGES)[0] if sizes.routed else [0] * 11
        routing[modality] = {
            "tokens": count,
            "ties": 0,
            "wrong": count if spoiled else 0,
            "first_wrong": 0 if spoiled else None,
            "margins": [int(each) for each in margins],
            "reached": [int(each) for each in reached],
            "bundle_reached": [int(each) for each in (np.roll(reached, 1) if spoiled else reached)],
            "agreement": 0.0 if spoiled else 1.0,
        }
    return {"layer": layer, "errors": errors, "routing": routing}


def _checks(cases: list[dict[str, Any]], sizes: Sizes) -> list[Check]:
    checks = [tell("files", []), tell("names", [], where="decoder_prefill")]
    for case in cases:
        for phase in ("prefill", "decode"):
            place = {"case": case["name"], "phase": phase}
            for layer in case[phase]["layers"]:
                at = {"where": f"layer {layer['layer']}", "layer": layer["layer"], **place}
                for modality, found in layer["routing"].items():
                    where = f"layer {layer['layer']} {modality}"
                    checks.append(judge("routing", "agreement", found["agreement"], 1.0, **{**at, "where": where}))
                checks += [judge(name, "error", value, BOUND, **at) for name, value in layer["errors"].items()]
            checks.append(judge("logits", "error", case[phase]["logits"]["error"], BOUND, **place))
    checks.append(left_out("batch", f"no room for {sizes.name}"))
    return checks
