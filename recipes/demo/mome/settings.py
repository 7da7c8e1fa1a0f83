"""Numbers of a training run of the small MoME; the defaults gave the shipped model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One field for each number."""

    seed: int = 0
    pictures: int = 4500
    pictures_per_step: int = 20
    """Of the towers' stages."""
    rows_per_step: int = 28
    questions_per_row: int = 3
    sentence_steps: int = 120
    clip_steps: int = 250
    dino_steps: int = 1400
    pix2struct_steps: int = 1600
    decoder_steps: int = 1500
    adapter_steps: int = 200
    mole_steps: int = 1100
    learning_rate: float = 1.5e-3
    entropy: float = 0.03
    """Cost of the entropy of the experts' shares, which makes the router drop the experts that a question does not need:
    left alone it has no reason to, since at this size the sum has room for all of them."""
    image_rows: float = 0.1
    """Mean square above which visual rows cost something when they enter the decoder."""
