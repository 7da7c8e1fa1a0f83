"""The model families, and which one a config belongs to."""

from __future__ import annotations

from collections.abc import Mapping

from moiie_export.families.family import Family
from moiie_export.families.moiie import MOIIE
from moiie_export.families.mome import MOME
from moiie_export.model_config import ModelConfig, MoiieConfig
from moiie_export.mome_config import MomeConfig

__all__ = ["Family", "family_of"]

_FAMILIES: Mapping[type[ModelConfig], Family] = {MoiieConfig: MOIIE, MomeConfig: MOME}


def family_of(config: ModelConfig) -> Family:
    """The family whose config this is."""
    return _FAMILIES[type(config)]
