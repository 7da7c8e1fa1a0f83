"""config.json of a conversion: the published sizes, what --config changes, and what the originals' own configs say."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moiie_export.checkpoint import Checkpoint
from moiie_export.checkpoint_files import CONFIG, CONFIG_LIMIT
from moiie_export.config_reader import ConfigReader
from moiie_export.mome_config import MomeConfig, Pix2StructConfig
from moiie_export.mome_parser import parse_mome, parse_pix2struct, parse_sentence
from moiie_export.mome_published import PUBLISHED
from moiie_export.text_parser import parse_text
from moiie_runtime.errors import MoiieError
from moiie_runtime.strict_files import read_json_object, show

_OVERRIDE = "sizes other than the published ones go into a JSON file for --config, with the keys of config.json"


def load_settings(override: Path | None) -> tuple[dict[str, Any], MomeConfig]:
    """The config.json to write and what it means.

    Args:
        override: a JSON object with keys of config.json whose values replace the published ones; an entry of
            vision_experts needs its name and the keys that differ. None: the published model.

    Raises:
        MoiieError: no such file, a key that config.json lacks, or values that do not fit each other or are not
            implemented.
    """
    raw, where = copy.deepcopy(dict(PUBLISHED)), "the published sizes"
    if override is not None:
        where = str(override)
        raw = _merged(raw, read_json_object(override, CONFIG_LIMIT, _OVERRIDE), where)
    ConfigReader(raw, where).only("model_type", PUBLISHED["model_type"])
    return raw, parse_mome(ConfigReader(raw, where))


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if key not in base:
            raise _unknown(where, key, base)
        if key == "vision_experts":
            merged[key] = _merged_experts(base[key], value, f"{where}: {key}")
        elif isinstance(base[key], dict) and value is not None:
            if not isinstance(value, dict):
                raise MoiieError(f"{where}: {key}: expected an object, found {show(value)}", _OVERRIDE)
            merged[key] = _merged(base[key], value, f"{where}: {key}")
        else:
            merged[key] = value
    return merged


def _merged_experts(base: list[dict[str, Any]], changes: Any, where: str) -> list[dict[str, Any]]:
    """Entries are matched by name."""
    names = [expert["name"] for expert in base]
    if not isinstance(changes, list) or not all(isinstance(change, dict) for change in changes):
        raise MoiieError(f"{where}: expected a list of objects, found {show(changes)}", _OVERRIDE)
    given = [change.get("name") for change in changes]
    for index, name in enumerate(given):
        if name not in names or name in given[:index]:
            raise MoiieError(f"{where}[{index}]: name: expected each of {', '.join(names)} once, found {show(name)}")
    by_name = dict(zip(given, changes, strict=True))
    return [_merged(each, by_name.get(each["name"], {}), f"{where}: {each['name']}") for each in base]


def _unknown(where: str, key: str, base: Mapping[str, Any]) -> MoiieError:
    close = difflib.get_close_matches(key, base, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(base)}"
    return MoiieError(f"{where}: {show(key)} is no key of a MoME's config.json here", known)


def check_language_model(vicuna: Checkpoint, config: MomeConfig) -> None:
    """Refuse a decoder of other sizes than the config's.

    Raises:
        MoiieError: naming every size that differs.
    """
    where = str(vicuna.path / CONFIG)
    reader = ConfigReader(vicuna.config, where)
    reader.only("model_type", "llama")
    # the precision of the tables is MoME's choice, not Vicuna's
    found = replace(parse_text(reader, fused=False, window=False), rotary_table=config.text.rotary_table)
    _compare(where, asdict(config.text), asdict(found), "give Vicuna-7B v1.5")
    for key, expected in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_id)):
        ids = reader.int_list(key)
        if ids and ids != expected:
            raise MoiieError(f"{where}: {key}: expected {list(expected)}, found {list(ids)}", _OVERRIDE)


def check_pix2struct(directory: Checkpoint, config: MomeConfig) -> None:
    """Refuse a Pix2Struct of other sizes than the config's; a whole model's config.json has them in vision_config."""
    where, raw = str(directory.path / CONFIG), directory.config
    published = next(each for each in PUBLISHED["vision_experts"] if each["name"] == "pix2struct")
    tower = next(expert.tower for expert in config.experts if isinstance(expert.tower, Pix2StructConfig))
    reader = ConfigReader(raw, where)
    reader.one_of("model_type", ("pix2struct", "pix2struct_vision_model"))
    if raw.get("model_type") == "pix2struct":
        raw, where = reader.get("vision_config"), f"{where}: vision_config"
        if not isinstance(raw, dict):
            raise reader.error("vision_config", "an object")
    # transformers leaves out values that are its defaults, which are the published ones
    ours = {"max_patches": tower.max_patches, "patch_size": tower.patch_size}
    found = parse_pix2struct(ConfigReader({**published, **raw, **ours}, where))
    _compare(where, asdict(tower), asdict(found), "give google/pix2struct-base")


def check_sentence_encoder(directory: Checkpoint, config: MomeConfig) -> None:
    """Refuse a sentence encoder of other sizes, pooling or length than the config's."""
    where, hint = str(directory.path / CONFIG), "give sentence-transformers/all-MiniLM-L6-v2"
    length = {"max_length": config.sentence.max_length}
    found = parse_sentence(ConfigReader({**directory.config, **length}, where))
    _compare(where, asdict(config.sentence), asdict(found), hint)
    settings = directory.path / "sentence_bert_config.json"
    if settings.is_file():
        said = read_json_object(settings, CONFIG_LIMIT, hint).get("max_seq_length")
        if said is not None and said != config.sentence.max_length:
            raise MoiieError(
                f"{settings}: max_seq_length: expected {config.sentence.max_length}, found {show(said)}", hint
            )
    pooling = directory.path / "1_Pooling" / CONFIG
    if pooling.is_file():
        modes = read_json_object(pooling, CONFIG_LIMIT, hint)
        wanted = "pooling_mode_mean_tokens"
        on = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value is True]
        if on != [wanted]:
            raise MoiieError(f"{pooling}: expected {wanted} alone, found {', '.join(on) or 'none'}", hint)


def _compare(where: str, expected: Mapping[str, Any], found: Mapping[str, Any], hint: str) -> None:
    differences = [
        f"{key}: expected {expected[key]}, found {found[key]}" for key in expected if expected[key] != found[key]
    ]
    if differences:
        raise MoiieError(f"{where}: another model: {'; '.join(differences)}", f"{hint}; {_OVERRIDE}")


def pretrained_positions(raw: Mapping[str, Any]) -> int:
    """Rows of DINOv2's position table as its authors store it: a square of patches and the class token."""
    dino = next(expert for expert in raw["vision_experts"] if expert["name"] == "dino")
    reader = ConfigReader(dino, "vision_experts: dino")
    size, patch = reader.integer("pretrained_image_size"), reader.integer("patch_size")
    reader.divides("patch_size", patch, "pretrained_image_size", size)
    return int((size // patch) ** 2 + 1)
