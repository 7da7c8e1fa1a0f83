"""MoME as frozen dataclasses: three vision experts, the instance router, the adapters (spec mome.md, 1 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

from moiie_export.model_config import ModelConfig


@dataclass(frozen=True)
class AdtConfig:
    """An adaptive deformable transformation: layers of self-attention, deformable sampling and a ReLU network (1.1)."""

    num_layers: int
    num_heads: int
    num_points: int
    ffn_dim: int


@dataclass(frozen=True)
class _SquareTower:
    """A transformer over the patches of a square picture and a class token."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class EvaConfig(_SquareTower):
    """EVA ViT without its last layer and final norm; the class token is kept (section 2)."""

    projector_norm_eps: float


@dataclass(frozen=True)
class DinoConfig(_SquareTower):
    """DINOv2 with its final norm; the class token is dropped, positions are baked for `image_size` (section 2)."""


@dataclass(frozen=True)
class Pix2StructConfig:
    """Pix2Struct's vision encoder; positions come from row and column tables of `seq_len` entries (section 2)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    d_kv: int
    d_ff: int
    seq_len: int
    max_patches: int
    patch_size: int
    layer_norm_eps: float


Tower = EvaConfig | DinoConfig | Pix2StructConfig


@dataclass(frozen=True)
class VisionExpert:
    """One of the encoders that the instruction weighs: its name, tower, and ADT (None: the grid is used as it is)."""

    name: str
    tower: Tower
    adt: AdtConfig | None

    @property
    def component(self) -> str:
        """Its graph's name, and its module's in the model."""
        return f"vision_{self.name}"

    @property
    def keeps_class_token(self) -> bool:
        """Whether its features begin with a class token: EVA's, which no ADT follows (section 1.2)."""
        return isinstance(self.tower, EvaConfig)


@dataclass(frozen=True)
class MoleConfig:
    """Adapters beside the feed-forward networks of `layers`; a router in each picks one per request (1.3)."""

    num_experts: int
    bottleneck: int
    router_hidden: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class SentenceConfig:
    """A BERT encoder whose masked mean, scaled to length 1, is the sentence embedding (section 3)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    max_length: int


@dataclass(frozen=True, kw_only=True)
class MomeConfig(ModelConfig):
    """A whole MoME.

    Attributes:
        experts: the vision experts in the order of the router's weights.
        query_grid: rows and columns that every expert's features are brought to.
        move_router_hidden: width of the instance router between its two layers.
        mole: the adapters.
        sentence: the encoder of the instruction.
        generation: the checkpoint's own generation settings, in the recipe's names.
    """

    experts: tuple[VisionExpert, ...]
    query_grid: tuple[int, int]
    move_router_hidden: int
    mole: MoleConfig
    sentence: SentenceConfig
    num_beams: int
    repetition_penalty: float
    length_penalty: float
    max_new_tokens: int

    @property
    def queries(self) -> int:
        """Rows every expert contributes to."""
        return self.query_grid[0] * self.query_grid[1]

    @property
    def image_tokens(self) -> int:
        """Rows one image takes in the decoder's input: the class token and the weighted sum."""
        return self.queries + 1
