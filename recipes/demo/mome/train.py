"""Trains the small MoME from nothing: python -m moiie_recipes.demo.mome.train --out DIR

First what the authors take as given: `sentence` trains the sentence encoder to tell topics of questions apart; `clip`,
`dino` and `pix2struct` train each tower on colours, shapes or letters; then these four are frozen. `decoder` trains the
decoder on questions together with the projectors, the ADTs and the router of the vision experts. The authors' two stages
follow: `adapter` adds one adapter a layer (stage 1), `mole` copies it to four and trains their routers by the
straight-through estimator (stage 2). Their decoder is frozen there; this one has not learned enough by then and goes on.
Killed at any moment, the same command goes on from the last saved state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from moiie_export.model.mome.model import MomeModel
from moiie_recipes.demo.curves import draw_curves
from moiie_recipes.demo.mome.architecture import model_config, raw_config
from moiie_recipes.demo.mome.initial import new_model, replicate_adapters
from moiie_recipes.demo.mome.pictures import Pixels, training_pictures
from moiie_recipes.demo.mome.pretraining import SentenceStage, TowerStage, tower_features
from moiie_recipes.demo.mome.questions import KINDS
from moiie_recipes.demo.mome.saving import save_checkpoint
from moiie_recipes.demo.mome.settings import Settings
from moiie_recipes.demo.mome.stages import STAGES, QuestionStage
from moiie_recipes.demo.mome.word_lists import BOS, EOS, decoder_tokenizer, sentence_tokenizer
from moiie_recipes.demo.running import check_settings, run, run_stage

SUBJECTS = {"clip": "colour", "dino": "shape", "pix2struct": "letter"}
FIGURES = {
    "towers": ("Share of cells that a tower names rightly", ["things_right"]),
    "loss": ("Cross entropy of the answers (mean over tokens)", ["answer"]),
    "accuracy": ("Share of held-out questions answered, by kind", [f"test_{kind}" for kind in KINDS]),
    **{
        f"weights-{kind}": (
            f"Weight of each vision expert for {kind} questions",
            [f"{kind}_{name}" for name in SUBJECTS],
        )
        for kind in KINDS
    },
}


def train(out: Path, settings: Settings) -> Path:
    """Train, or go on training, in `out`; returns the checkpoint directory with float16 weights."""
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out, settings)
    words = decoder_tokenizer()
    sizes = (words.get_vocab_size(), words.token_to_id(BOS), words.token_to_id(EOS))
    raw = raw_config(*sizes, sentence_tokenizer().get_vocab_size())
    model = new_model(model_config(raw), settings.seed)
    run_stage(SentenceStage(settings, model), out)
    pictures = training_pictures(out / "pictures", model.config, settings.seed, settings.pictures)
    for index, (name, subject) in enumerate(SUBJECTS.items()):
        torch.manual_seed(settings.seed + index)
        run_stage(TowerStage(name, subject, settings, model, pictures), out)
    features = _features(out / "features.pt", model, pictures)
    for index, name in enumerate(STAGES):
        torch.manual_seed(settings.seed + index)
        if name == "mole":
            replicate_adapters(model)
        run_stage(QuestionStage(name, settings, model, features), out)
    final = out / "model"
    save_checkpoint(model, raw, final)
    draw_curves(out, FIGURES)
    return final


def _features(path: Path, model: MomeModel, pictures: Mapping[str, Pixels]) -> dict[str, torch.Tensor]:
    """The frozen towers' features of all training pictures, kept in a file."""
    if not path.is_file():
        torch.save(tower_features(model, pictures), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def main() -> None:
    """Command line."""
    run(train, Settings, __doc__)


if __name__ == "__main__":
    main()
