"""Reports: a parity document as one HTML page, and its charts as pictures."""

from __future__ import annotations

from moiie_export.report.files import prepare, write_pngs, write_report
from moiie_export.report.page import render

__all__ = ["prepare", "render", "write_pngs", "write_report"]
