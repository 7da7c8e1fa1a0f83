"""Which experts the calibration prompts reach: tokens by sparse layer, expert and modality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moiie_export.model_config import ModelConfig
from moiie_runtime.errors import MoiieError

MODALITIES = ("language", "vision")


class Coverage:
    """Counts of routed tokens; a token counts once for each of its experts.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._moe = config.moe
        moe = config.moe
        self._counts: dict[int, dict[int, dict[str, int]]] = (
            {layer: {e: dict.fromkeys(MODALITIES, 0) for e in moe.reachable} for layer in moe.layers} if moe else {}
        )

    def add(self, layer: int, expert_ids: Iterable[Sequence[int]], is_vision: Iterable[bool]) -> None:
        """Count a layer's tokens: the experts of each, and whether it is a vision token."""
        for ids, vision in zip(expert_ids, is_vision, strict=True):
            for expert in ids:
                self._counts[layer][expert][MODALITIES[vision]] += 1

    def tokens(self, layer: int, expert: int) -> int:
        """Tokens of both modalities."""
        return sum(self._counts[layer][expert].values())

    def to_dict(self) -> dict[str, Any]:
        """{"<layer>": {"<expert>": {"language": n, "vision": n}}}, as in the manifest."""
        return {
            str(layer): {str(expert): dict(counts) for expert, counts in experts.items()}
            for layer, experts in self._counts.items()
        }


def require_pictures(config: ModelConfig, wanted: Iterable[str], pictures: int) -> None:
    """Refuse prompts without pictures where statistics are wanted of what only pictures reach.

    Args:
        config: the model.
        wanted: model parameters.
        pictures: how many pictures there are in all prompts.

    Raises:
        MoiieError: naming the experts, or the encoders, that would starve.
    """
    if pictures:
        return
    starving: dict[str, set[int]] = {}
    encoders = set()
    for parameter in wanted:
        place = expert_of(parameter)
        if place is not None and config.moe is not None:
            if place[1] not in config.moe.expert_groups["language"]:
                starving.setdefault(f"{place[1]}", set()).add(place[0])
        elif parameter.startswith("vision_"):
            encoders.add(parameter.partition(".")[0])
    lines = [
        f"expert {expert} of layer{'s' * (len(layers) > 1)} {', '.join(map(str, sorted(layers)))}"
        for expert, layers in sorted(starving.items())
    ]
    if lines or encoders:
        raise MoiieError(
            f"calibration.cases has no picture, so nothing reaches {'; '.join([*lines, *sorted(encoders)])}",
            "add pictures (images: [...]) to the cases, or quantise these by round to nearest (method: rtn)",
        )


def expert_of(parameter: str) -> tuple[int, int] | None:
    """(layer, expert) of an expert's parameter; None for any other."""
    pieces = parameter.split(".")
    if len(pieces) == 7 and pieces[:2] == ["decoder", "layers"] and pieces[3:5] == ["mlp", "experts"]:
        return int(pieces[2]), int(pieces[5])
    return None


def table_rows(coverage: Mapping[str, Any], min_tokens: int = 0) -> list[list[str]]:
    """A manifest's coverage as rows of text: layer, expert, language, vision, and a mark where too few tokens came."""
    rows = [["layer", "expert", *MODALITIES, ""]]
    for layer, experts in sorted(coverage.items(), key=lambda item: int(item[0])):
        for expert, counts in sorted(experts.items(), key=lambda item: int(item[0])):
            few = sum(counts[modality] for modality in MODALITIES) < min_tokens
            numbers = [str(counts[modality]) for modality in MODALITIES]
            rows.append([layer, expert, *numbers, f"fewer than {min_tokens}" if few else ""])
    return rows
