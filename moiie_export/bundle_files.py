"""Stage `files`: the small text files of a bundle, tokenizer and chat template first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_export.disk import write_bytes
from moiie_export.families import family_of
from moiie_export.source import ModelSource

_VERBATIM = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def text_files(source: ModelSource) -> dict[str, bytes]:
    """Name -> content of every small file the bundle carries."""
    files = {
        "tokenizer.json": source.tokenizer.to_str(pretty=True).encode(),
        "chat_template.jinja": source.config.prompt.template.encode(),
    }
    for name in _VERBATIM:
        path = source.checkpoint.path / name
        if path.is_file():
            files[name] = path.read_bytes()
    return files | family_of(source.config).text_files(source)


def copy_files(files: Mapping[str, bytes], directory: Path) -> Mapping[str, Any]:
    """Write them, each atomically."""
    for name, content in files.items():
        write_bytes(directory / name, content)
    return {}
