"""The typed form of `bundle.json`: what a bundle says about its model, its inputs and its files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moiie_runtime.backends.session import TensorSpec
from moiie_runtime.errors import MoiieError
from moiie_runtime.fields import Fields
from moiie_runtime.instance_settings import AdapterBanks, InstanceRouter, read_adapter_banks, read_instance_router
from moiie_runtime.quantized_weights import read_quantization
from moiie_runtime.vision_settings import Encoder, read_encoders

SCHEMA = 1
_DECODER = {"decoder_prefill": "prefill", "decoder_decode": "decode"}
_DAMAGED = "the bundle is damaged or was edited: write it again with `moiie export`"


@dataclass(frozen=True)
class Moe:
    """Experts of the sparse layers. `expert_groups` maps a modality to the expert ids its tokens may reach."""

    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    expert_groups: Mapping[str, tuple[int, ...]]
    routed: bool


@dataclass(frozen=True)
class Model:
    """Sizes of the decoder; `moe` is None for a dense model."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    moe: Moe | None


@dataclass(frozen=True)
class Tokens:
    """Special ids; one `image_marker` in a prompt becomes `image_placeholder` and stands for `image_tokens` rows."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    image_marker: str
    image_placeholder: int
    image_tokens: int


@dataclass(frozen=True)
class Modality:
    """Whether the last token of each run of image tokens is routed as language (spec 2.1)."""

    last_image_token_is_language: bool


@dataclass(frozen=True)
class PromptSettings:
    """What belongs to the chat template (spec moiie.md, 5.2; mome.md, 3).

    Attributes:
        system: the default system text.
        stop_string: the string that ends an answer.
        separator: a control character that a template puts where, as at a picture, the text on both sides is encoded
            apart; None when it never does.
    """

    system: str
    stop_string: str
    separator: str | None = None


@dataclass(frozen=True)
class TensorReference:
    """A tensor inside a safetensors file of the bundle."""

    file: str
    tensor: str


@dataclass(frozen=True)
class KvSettings:
    """Layout of the static KV buffers; `capacity` is the largest context in tokens."""

    layout: str
    dtype: str
    capacity: int


@dataclass(frozen=True)
class Component:
    """One graph of the bundle."""

    file: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Residency:
    """The stored weights that one phase touches, and their bytes on disk."""

    weights: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class FileRecord:
    """Digest and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All of `bundle.json` that the runtime uses.

    Attributes:
        encoders: the vision encoders: several when `instance_router` weighs them for each request.
        generation: defaults of `GenerationConfig`.
        penalty_prompt: what the repetition penalty counts as used before the first token, the authors' rule for the
            model: the text of the prompt (`prompt`, of bundles that do not say), the start token (`bos`), or `none`.
        weights_file: the file that holds the weights which `residency` names.
        quantization: stored tensor -> its format, of those that are quantised.
        prefill_chunk: tokens of a prompt that one run of the prefill takes; None: all.
    """

    name: str
    dtype: str
    model: Model
    tokens: Tokens
    modality: Modality
    encoders: tuple[Encoder, ...]
    instance_router: InstanceRouter | None
    adapters: AdapterBanks | None
    prompt: PromptSettings
    generation: Mapping[str, Any]
    penalty_prompt: str
    embed_tokens: TensorReference
    kv_cache: KvSettings
    components: Mapping[str, Component]
    residency: Mapping[str, Residency]
    files: Mapping[str, FileRecord]
    weights_file: str
    quantization: Mapping[str, str]
    prefill_chunk: int | None

    @property
    def phases(self) -> dict[str, str]:
        """The graphs that a bundle like this one has, in the order they run, and the phase of each in `residency`."""
        router = () if self.instance_router is None else (self.instance_router.component,)
        first = (*router, *(encoder.component for encoder in self.encoders))
        return {component: component for component in first} | _DECODER


def read_manifest(data: Mapping[str, Any], file: str) -> Manifest:
    """The typed manifest.

    Args:
        data: the parsed JSON object; keys that are not known here are ignored.
        file: path of the document, for messages.

    Raises:
        MoiieError: a newer schema; a key that is missing, of the wrong type or that contradicts another.
    """
    top = Fields(data, file, hint=_DAMAGED)
    _check_schema(top, file)
    model = _model(top.child("model"))
    kv_cache = top.child("kv_cache")
    embed = top.child("embed_tokens")
    tokens = _tokens(top.child("tokens"))
    manifest = Manifest(
        name=top.string("name"),
        dtype=top.string("dtype", ("float32", "float16")),
        model=model,
        tokens=tokens,
        modality=_modality(top, model),
        encoders=read_encoders(top, tokens.image_tokens),
        instance_router=read_instance_router(top),
        adapters=read_adapter_banks(top, model.num_hidden_layers),
        prompt=_prompt(top.child("prompt")),
        generation=top.child("generation").data,
        penalty_prompt=_penalty_prompt(top.child("generation"), tokens),
        embed_tokens=TensorReference(embed.string("file"), embed.string("tensor")),
        kv_cache=KvSettings(
            kv_cache.string("layout", ("BNSH",)),
            kv_cache.string("dtype", ("float32",)),
            kv_cache.integer("capacity", 1),
        ),
        components=read_components(top),
        residency=read_residency(top),
        files=read_files(top),
        weights_file=embed.string("file"),
        quantization=read_quantization(top),
        prefill_chunk=None,
    )
    _check_complete(top, manifest)
    return manifest


def _check_schema(top: Fields, file: str) -> None:
    schema = top.integer("schema", 1)
    if schema > SCHEMA:
        writer = top.optional_child("created_by")
        version = writer.string("version") if writer is not None else None
        raise MoiieError(
            f"{file}: the bundle has schema {schema}; this version reads schema {SCHEMA}",
            f'install a newer version: pip install "moiie-export>={version}"'
            if version
            else "install a newer version: pip install --upgrade moiie-export",
        )


def _model(fields: Fields) -> Model:
    layers = fields.integer("num_hidden_layers", 1)
    moe = fields.optional_child("moe")
    return Model(
        model_type=fields.string("model_type"),
        hidden_size=fields.integer("hidden_size", 1),
        num_hidden_layers=layers,
        num_attention_heads=fields.integer("num_attention_heads", 1),
        num_key_value_heads=fields.integer("num_key_value_heads", 1),
        head_dim=fields.integer("head_dim", 1),
        vocab_size=fields.integer("vocab_size", 1),
        sliding_window=fields.optional_integer("sliding_window", 1),
        moe=None if moe is None else _moe(moe, layers),
    )


def _moe(fields: Fields, num_hidden_layers: int) -> Moe:
    experts = fields.integer("num_experts", 1)
    groups = fields.child("expert_groups")
    return Moe(
        num_experts=experts,
        top_k=fields.integer("top_k", 1, experts),
        layers=fields.integers("layers", 0, num_hidden_layers - 1),
        expert_groups={name: groups.integers(name, 0, experts - 1) for name in groups.data},
        routed=fields.boolean("routed"),
    )


def _tokens(fields: Fields) -> Tokens:
    marker = fields.string("image_marker")
    if not marker:
        raise fields.error("image_marker", "a string that is not empty")
    return Tokens(
        bos=fields.optional_integer("bos", 0),
        eos=fields.integers("eos", 0),
        pad=fields.optional_integer("pad", 0),
        image_marker=marker,
        # A placeholder that could be a token id would turn text into pictures.
        image_placeholder=fields.integer("image_placeholder", -(2**31), -1),
        image_tokens=fields.integer("image_tokens", 1),
    )


def _penalty_prompt(generation: Fields, tokens: Tokens) -> str:
    if generation.data.get("penalty_prompt") is None:
        return "prompt"
    choices = ("prompt", "bos", "none") if tokens.bos is not None else ("prompt", "none")
    return generation.string("penalty_prompt", choices)


def _modality(top: Fields, model: Model) -> Modality:
    """Only experts are chosen by modality: a bundle without any may leave the section out."""
    if model.moe is None and top.data.get("modality") is None:
        return Modality(last_image_token_is_language=False)
    return Modality(top.child("modality").boolean("last_image_token_is_language"))


def _prompt(fields: Fields) -> PromptSettings:
    separator = None if fields.data.get("separator") is None else fields.string("separator")
    # User text may not hold it, so it must be nothing that anyone would write.
    if separator is not None and (len(separator) != 1 or not _is_control(separator)):
        raise fields.error("separator", "one control character other than a line break or a tab")
    return PromptSettings(fields.string("system"), fields.string("stop_string"), separator)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\t\n\v\f\r\x85"


def read_components(top: Fields) -> dict[str, Component]:
    """The section `components` of a manifest."""
    return {
        name: Component(fields.string("file"), _specs(fields, "inputs"), _specs(fields, "outputs"))
        for name, fields in top.children("components").items()
    }


def read_residency(top: Fields) -> dict[str, Residency]:
    """The section `residency` of a manifest."""
    return {
        phase: Residency(fields.strings("weights"), fields.integer("bytes", 0))
        for phase, fields in top.children("residency").items()
    }


def read_files(top: Fields) -> dict[str, FileRecord]:
    """The section `files` of a manifest."""
    return {name: _file_record(fields) for name, fields in top.children("files").items()}


def _check_complete(top: Fields, manifest: Manifest) -> None:
    """Every graph and phase that the sections speak of is there, and the router chooses among as many as there are."""
    for component, phase in manifest.phases.items():
        top.child("components").child(component)
        top.child("residency").child(phase)
    if manifest.instance_router is None:
        return
    name = manifest.instance_router.component
    adapters = 0 if manifest.adapters is None else len(manifest.adapters.layers)
    for output, size in (("move_weights", len(manifest.encoders)), ("mole_index", adapters)):
        spec = manifest.components[name].outputs.get(output)
        if size and (spec is None or spec.shape[1:] != (size,)):
            raise top.child("components").child(name).error("outputs", f"a list with {output} [batch, {size}]")


def _specs(component: Fields, key: str) -> dict[str, TensorSpec]:
    specs = {}
    for fields in component.items(key):
        shape = fields.data.get("shape")
        if not isinstance(shape, list) or not all(_is_dimension(size) for size in shape):
            raise fields.error("shape", "a list of sizes and dimension names")
        specs[fields.string("name")] = TensorSpec(fields.string("dtype"), tuple(shape))
    return specs


def _is_dimension(size: Any) -> bool:
    return isinstance(size, str) or (isinstance(size, int) and not isinstance(size, bool) and size >= 0)


def _file_record(fields: Fields) -> FileRecord:
    digest = fields.string("sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise fields.error("sha256", "64 hexadecimal digits")
    return FileRecord(digest, fields.integer("bytes", 0))
