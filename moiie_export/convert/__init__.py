"""The authors' layout of MoME -> one checkpoint directory (spec mome.md, section 7)."""

from moiie_export.convert.conversion import ConvertResult, convert, summary
from moiie_export.convert.sources import Originals

__all__ = ["ConvertResult", "Originals", "convert", "summary"]
