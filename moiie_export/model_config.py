"""A model as frozen dataclasses: everything the two backbones and five expert arrangements differ in is a field here.

They are made from a checkpoint's files in config.py; nothing else knows a model type by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moiie_export.prompts import PromptStyle

if TYPE_CHECKING:
    from typing_extensions import Self

Modality = Literal["vision", "language"]


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `sliding_window` W: a query sees itself and the W keys before it (spec 4.5)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    fused_projections: bool
    """True when the checkpoint stores qkv_proj and gate_up_proj (Phi-3), False when split (LLaMA)."""
    rotary_table: Literal["float32", "bfloat16"] = "float32"
    """Precision of the rotary cosines and sines; MoME was trained and run with tables rounded to bfloat16."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def visible_keys(self) -> int | None:
        """How many keys a query sees, itself included; None when all."""
        return None if self.sliding_window is None else self.sliding_window + 1


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP tower, optionally run on several scales (S2), and the pixels it wants (spec 1.1, 1.2, 5.1)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    select_layer: int = -2
    scales: tuple[int, ...] = ()

    @property
    def grid(self) -> int:
        """Patches along one side; pixels beyond grid * patch_size are never seen."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Rows one image takes in the decoder's input."""
        return self.grid**2

    @property
    def layers_used(self) -> int:
        """Encoder layers up to the selected hidden state (hidden_states has one more entry than layers)."""
        return self.num_hidden_layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer

    @property
    def input_size(self) -> int:
        """Side of the picture the processor makes, in pixels."""
        return max(self.scales) if self.scales else self.image_size

    @property
    def feature_size(self) -> int:
        """Channels handed to the projector."""
        return self.hidden_size * max(1, len(self.scales))


@dataclass(frozen=True)
class MoeConfig:
    """One table for all expert arrangements: which experts a modality may reach, and by which gate.

    Attributes:
        experts: checkpoint module of each expert; the index is the expert's global id.
        top_k: experts per token.
        layers: indices of the decoder layers that hold experts.
        expert_groups: modality -> ids of the experts it may be routed to, in the order of its gate's rows.
        gates: modality -> checkpoint module of its gate; empty when the modality alone decides.
    """

    experts: tuple[str, ...]
    top_k: int
    layers: tuple[int, ...]
    expert_groups: Mapping[Modality, tuple[int, ...]]
    gates: Mapping[Modality, str]

    @property
    def num_experts(self) -> int:
        """Experts in the checkpoint, dead ones included; the width of router_logits."""
        return len(self.experts)

    @property
    def reachable(self) -> tuple[int, ...]:
        """Ids some modality may be routed to, ascending."""
        return tuple(sorted(set(self.expert_groups["vision"]) | set(self.expert_groups["language"])))

    @property
    def one_gate(self) -> bool:
        """True when both modalities share one gate (vanilla mixture of experts)."""
        return bool(self.gates) and self.gates["vision"] == self.gates["language"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has: a decoder, tokens, and the strings around a question."""

    model_type: str
    text: TextConfig
    moe: MoeConfig | None
    prompt: PromptStyle
    max_context: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    last_image_token_is_language: bool = False
    """Whether the last token of each picture is routed as text (spec moiie.md, 2.1)."""

    @property
    def image_tokens(self) -> int:
        """Rows one image takes in the decoder's input."""
        raise NotImplementedError

    @property
    def reads_separate_tower(self) -> bool:
        """Whether weights come from a vision tower with a directory of its own."""
        return False

    def with_vocab(self, rows: int) -> Self:
        """The same model with embedding and head cut to the tokenizer's length (spec moiie.md, 5.4)."""
        return replace(self, text=replace(self.text, vocab_size=rows))


@dataclass(frozen=True, kw_only=True)
class MoiieConfig(ModelConfig):
    """MoIIE and its siblings: one tower, a projector, experts reached by modality."""

    vision: VisionConfig
    projector: str
    image_aspect_ratio: Literal["pad", "square"]
    vision_tower: str
    vision_weights_in_checkpoint: bool

    @property
    def projector_layers(self) -> int:
        """Linear layers of the projector, activations between them."""
        return projector_depth(self.projector)

    @property
    def image_tokens(self) -> int:
        """Rows one image takes in the decoder's input."""
        return self.vision.image_tokens

    @property
    def reads_separate_tower(self) -> bool:
        """True when the tower was not trained, so that its own files hold its exact weights (spec moiie.md, 4.3)."""
        return not self.vision_weights_in_checkpoint


def projector_depth(kind: str) -> int:
    """Linear layers of a projector: `linear` 1, `mlp{N}x_gelu` N, `identity` and unknown kinds 0 (spec 1.3)."""
    if kind == "linear":
        return 1
    digits = kind.removeprefix("mlp").removesuffix("x_gelu")
    return int(digits) if kind == f"mlp{digits}x_gelu" and digits.isdecimal() and len(digits) < 3 else 0
