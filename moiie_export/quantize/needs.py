"""What is wanted of calibration, and whether the recipe's prompts can give it; checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moiie_export.model_config import ModelConfig
from moiie_export.quantize.coverage import require_pictures
from moiie_export.recipe_parity import ParityCase
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import sha256_file


@dataclass(frozen=True)
class Needs:
    """What is wanted of a parameter's inputs, beside means and a sample. `gram`: x x^T, which GPTQ works on."""

    gram: bool = False


def case_fingerprint(cases: Sequence[ParityCase]) -> list[Any]:
    """What of the cases decides the outcome: prompts, and sha256 of the pictures.

    Raises:
        MoiieError: a picture is missing.
    """
    for case in cases:
        for path in case.images:
            if not path.is_file():
                raise MoiieError(f"calibration.cases: {path}: no such file", "paths start at the recipe file's folder")
    return [[case.prompt, [sha256_file(path) for path in case.images]] for case in cases]


def check_cases(config: ModelConfig, cases: Sequence[ParityCase], wanted: Mapping[str, Needs]) -> None:
    """Refuse prompts that could not serve.

    Raises:
        MoiieError: statistics are wanted and there are no cases, or none with a picture where only pictures reach what
            is wanted.
    """
    if not wanted:
        return
    if not cases:
        some = next(iter(wanted))
        raise MoiieError(
            f"calibration.cases: empty, but {len(wanted)} weights are quantised by what reaches them, the first: {some}",
            "list prompts with pictures of your own kind, or use method: rtn",
        )
    require_pictures(config, wanted, sum(len(case.images) for case in cases))
