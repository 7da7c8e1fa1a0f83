"""Which files of a checkpoint directory hold its weights (spec 4.2), and what the directory is when none do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import quote, read_json_object, show

CONFIG = "config.json"
CONFIG_LIMIT = 16 << 20
_INDEX_LIMIT = 100_000_000
# Official loaders look for these in this order; the first that exists is the checkpoint.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
_PROJECTOR = "mm_projector.bin"
_SHARD = re.compile(r"-\d+-of-(\d+)\.(safetensors|bin)$")
_SHARD_SET = re.compile(r"-of-\d+\.(safetensors|bin)$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

MERGE = "merge the adapter into its base model (peft: merge_and_unload, then save_pretrained) and give that directory"
TRAIN = "give the directory of the full fine-tune: stage 1 saves the projector alone"


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights, as names relative to its directory.

    Attributes:
        shards: the tensor files, sorted.
        index: the index file, None when there is a single tensor file.
        weight_map: tensor -> shard as the index says, None without an index.
    """

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None


def locate(directory: Path) -> WeightFiles:
    """Find the weights of a checkpoint directory.

    Safetensors win over pickles and a single file over shards, as in transformers; a single safetensors file of any
    name is accepted when nothing else is there.

    Raises:
        MoiieError: not a directory, no weights, an adapter or a projector alone, a wrong index or missing shards.
    """
    _check_directory(directory)
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise MoiieError(
            f"{directory}: cannot be listed: {error.strerror or error}", "check its permissions"
        ) from error
    adapters = [name for name in _ADAPTER if name in names]
    found = next((name for name in _NAMES if name in names), None) or _only_safetensors(directory, names)
    if found is None:
        _refuse_without_weights(directory, names, adapters)
    if adapters:
        raise MoiieError(
            f"{directory}: expected full weights or an adapter, found both {found} and {', '.join(adapters)}",
            f"{MERGE}; when {found} is already merged, move the adapter's files away",
        )
    if not found.endswith(".json"):
        return WeightFiles((found,))
    weight_map = _read_index(directory / found)
    shards = tuple(sorted(set(weight_map.values())))
    _check_shards(directory, found, names, shards)
    return WeightFiles(shards, found, weight_map)


def _check_shards(directory: Path, index: str, names: list[str], shards: tuple[str, ...]) -> None:
    missing = [shard for shard in shards if not (directory / shard).exists()]
    if missing:
        raise MoiieError(
            f"{directory / index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}",
            "the download or copy is incomplete: fetch the missing files",
        )
    # A shard of the same set that the index forgets; shards of another count are left over from another save.
    sets = {match[0] for match in map(_SHARD_SET.search, shards) if match}
    forgotten = [n for n in names if n not in shards and (match := _SHARD_SET.search(n)) and match[0] in sets]
    if forgotten:
        raise MoiieError(
            f"{directory / index}: names {len(shards)} shards, but {', '.join(forgotten[:8])} lie beside them",
            "the index and the shards are from different saves: fetch both again",
        )


def _check_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.exists():
        raise MoiieError(f"{directory}: expected a checkpoint directory, found a file", f"give {directory.parent}")
    hint = "check the path"
    if _HUB_ID.fullmatch(str(directory)):
        hint = (
            "checkpoints are local directories; if this is the name of a repository on the Hugging Face Hub, download "
            f"it first: hf download {directory} --local-dir DIR"
        )
    raise MoiieError(f"{directory}: no such directory", hint)


def _only_safetensors(directory: Path, names: list[str]) -> str | None:
    """The one safetensors file of a directory that has none of the usual names."""
    candidates = [name for name in names if name.endswith(".safetensors") and name not in _ADAPTER]
    shards = [match for match in map(_SHARD.search, names) if match and int(match[1]) > 1]
    if shards:
        kind = "model.safetensors" if any(match[2] == "safetensors" for match in shards) else "pytorch_model.bin"
        raise MoiieError(
            f"{directory}: found {len(shards)} shards ({shards[0].string}, ...) but no {kind}.index.json",
            f"fetch {kind}.index.json: it says which shard holds which tensor",
        )
    if len(candidates) > 1:
        raise MoiieError(
            f"{directory}: expected model.safetensors or one safetensors file, found {', '.join(candidates[:8])}",
            "keep the one with the model's weights in the directory, or name it model.safetensors",
        )
    return candidates[0] if candidates else None


def _refuse_without_weights(directory: Path, names: list[str], adapters: list[str]) -> NoReturn:
    if adapters:
        raise MoiieError(f"{directory}: a LoRA adapter without its base model: found {', '.join(adapters)}", MERGE)
    if _PROJECTOR in names:
        raise MoiieError(f"{directory}: a projector without a model: found only {_PROJECTOR}", TRAIN)
    if "zero_to_fp32.py" in names:
        hint = f"this is a DeepSpeed training state; gather it first: cd {directory} && python zero_to_fp32.py . DIR"
    else:
        hint = "give the directory that save_pretrained or the trainer wrote"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty directory"
    raise MoiieError(f"{directory}: no weights: expected one of {', '.join(_NAMES)}; found {shown}", hint)


def _read_index(path: Path) -> dict[str, str]:
    hint = "fetch the index again, or save the checkpoint again with save_pretrained"
    weight_map = read_json_object(path, _INDEX_LIMIT, hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MoiieError(f"{path}: weight_map: expected an object that names every tensor's shard", hint)
    suffix = ".safetensors" if path.name.startswith("model.safetensors") else ".bin"
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard) or not shard.endswith(suffix):
            raise MoiieError(
                f"{path}: weight_map: {quote(tensor)}: expected a {suffix} file in this directory, found {show(shard)}",
                hint,
            )
    return weight_map


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    plain = not any(char in name for char in "\\:\0")
    return plain and bool(parts) and not name.startswith("/") and ".." not in parts
