"""The decoder's part of a config.json: sizes under the names of Phi-3 and LLaMA, and what of them is not implemented."""

from __future__ import annotations

from typing import Literal

from moiie_export.config_reader import ConfigReader
from moiie_export.model_config import TextConfig


def parse_text(reader: ConfigReader, *, fused: bool, window: bool) -> TextConfig:
    """The decoder that `reader`'s keys describe.

    Args:
        reader: config.json, or its section for the decoder.
        fused: whether the checkpoint stores qkv_proj and gate_up_proj (Phi-3) or split projections (LLaMA).
        window: whether the architecture has a sliding window.

    Raises:
        MoiieError: a missing or ill-typed key, numbers that do not fit each other, or a value that is not implemented.
    """
    _refuse_unimplemented(reader)
    heads = reader.integer("num_attention_heads")
    text = TextConfig(
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        vocab_size=reader.integer("vocab_size"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope_theta=reader.number("rope_theta", 10000.0),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        sliding_window=reader.optional_integer("sliding_window") if window else None,
        fused_projections=fused,
        rotary_table=_rotary_table(reader),
    )
    reader.divides("num_attention_heads", heads, "hidden_size", text.hidden_size)
    reader.divides("num_key_value_heads", text.num_key_value_heads, "num_attention_heads", heads)
    reader.divides("2", 2, "hidden_size / num_attention_heads", text.head_dim)
    reader.only("head_dim", text.head_dim)
    return text


def _rotary_table(reader: ConfigReader) -> Literal["float32", "bfloat16"]:
    reader.one_of("rotary_table", ("float32", "bfloat16"))
    return "bfloat16" if reader.text("rotary_table", "float32") == "bfloat16" else "float32"


def _refuse_unimplemented(reader: ConfigReader) -> None:
    reader.only("rope_scaling", None)
    reader.only("rope_parameters", None)
    reader.only("hidden_act", "silu")
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    reader.only("pretraining_tp", 1)
    reader.only("tie_word_embeddings", False)
    reader.only("partial_rotary_factor", 1.0)
    reader.only("quantization_config", None)
