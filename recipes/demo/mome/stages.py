"""The stages in which the decoder, the vision experts' weights and the adapters learn, all on questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import nn

from moiie_export.model.mome.encoders import visual_tokens
from moiie_export.model.mome.model import MomeModel
from moiie_recipes.demo.differentiable import rms_norm
from moiie_recipes.demo.losses import answer_loss
from moiie_recipes.demo.mome.batches import Batch, ask_batch, make_layout, pack
from moiie_recipes.demo.mome.differentiable import Layout, decode, straight_through, vision_features
from moiie_recipes.demo.mome.pictures import training_scene
from moiie_recipes.demo.mome.settings import Settings
from moiie_recipes.demo.mome.word_lists import decoder_tokenizer, sentence_tokenizer

STAGES = ("decoder", "adapter", "mole")
Features = dict[str, torch.Tensor]


@dataclass
class QuestionStage:
    """One of STAGES; `features` are the frozen towers' of all training pictures."""

    name: str
    settings: Settings
    model: MomeModel
    features: Features
    head: None = None

    def __post_init__(self) -> None:
        self.tokenizers = (decoder_tokenizer(), sentence_tokenizer())
        self.layout = make_layout(self.tokenizers[0], self.model.config.image_tokens, self.settings.questions_per_row)
        self.peak = self.settings.learning_rate
        self.floor = 0.02 if self.name == "mole" else 0.1

    @property
    def steps(self) -> int:
        """How many steps the stage takes."""
        return int(getattr(self.settings, f"{self.name}_steps"))

    def trained(self) -> dict[float, list[nn.Parameter]]:
        """What the stage changes, by the share of the learning rate it gets.

        The router is slow, above all at first: at the decoder's rate it settles on whichever expert is useful first, and
        then what else a topic needs is never found.
        """
        model = self.model
        sight = [
            parameter
            for expert in model.config.experts
            for name, parameter in model.get_submodule(expert.component).named_parameters()
            if not name.startswith("tower.")
        ]
        router = list(model.router.move.parameters())
        learned = [*sight, *model.embed_tokens.parameters(), *model.decoder.parameters()]
        if self.name == "decoder":
            return {1.0: learned, 0.1: router}
        shares = {0.7: [*learned, *model.mole.parameters()], 0.4: router}
        return shares if self.name == "adapter" else {**shares, 1.0: list(model.router.mole.parameters())}

    def orthogonal(self) -> frozenset[int]:
        """The matrices of the decoder's layers."""
        return frozenset(id(p) for layer in self.model.decoder.layers for p in layer.parameters() if p.dim() > 1)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of step number `step`, and numbers for the log."""
        settings, most = self.settings, self.settings.questions_per_row
        indices = self._indices(step)
        scenes = [training_scene(settings.seed, int(index)) for index in indices]
        batch = pack(self.tokenizers, ask_batch(scenes, most, f"{self.name}/{step}"), most)
        towers = {name: values[indices].float() for name, values in self.features.items()}
        found = answer(self.model, self.layout, batch, towers, self.adapters, torch.bfloat16)
        loss = answer_loss(found.logits, batch.labels[batch.labels >= 0])
        size = found.rows.square().mean()
        numbers = {"answer": loss.item(), "image_rows": size.item(), "entropy": found.entropy.item()}
        for index, expert in enumerate(self.model.config.experts):
            numbers[f"weight_{expert.name}"] = found.weights[:, index].mean().item()
        # only what answers already can lose weight without loss: before, the router would drop experts that are needed
        ramp = max(0.0, 4 * step / self.steps - 3) if self.name == "decoder" else 1.0
        loss = loss + 0.1 * F.relu(size - settings.image_rows) + ramp * settings.entropy * found.entropy
        return loss, numbers

    def _indices(self, step: int) -> np.ndarray:
        """Which pictures; the decoder stage begins with those of few things, which are every third."""
        stride = 3 if self.name == "decoder" and step < 0.2 * self.steps else 1
        rng = np.random.default_rng([self.settings.seed, STAGES.index(self.name), step])
        return stride * rng.choice(self.settings.pictures // stride, self.settings.rows_per_step, replace=False)

    @property
    def adapters(self) -> int | None:
        """What `answer` takes."""
        return {"decoder": 0, "adapter": 1, "mole": None}[self.name]

    def measure(self) -> dict[str, float]:
        """Accuracy on held-out questions."""
        from moiie_recipes.demo.mome.watching import teacher_forced_accuracy

        return teacher_forced_accuracy(self)

    @cached_property
    def held_out_features(self) -> Features:
        """The towers' features of the held-out scenes that `measure` asks about."""
        from moiie_recipes.demo.mome.watching import held_out_features

        return held_out_features(self.model)


@dataclass
class Found:
    """Of a batch.

    Attributes:
        logits: [n, V] at every position with a label.
        rows: [B, image_tokens, H] of the pictures.
        weights: [B, E] of the experts.
        entropy: of the experts' shares in the rows, in nats, mean over the batch.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


class _Answers(nn.Module):
    """A module around the model, so that it can be called with parameters in another type."""

    def __init__(self, model: MomeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, layout: Layout, batch: Batch, towers: Features, adapters: int | None) -> Found:
        model = self.model
        embedding = model.router.sentence_encoder(*batch.sentence).detach()
        decided = model.router.decide(embedding)
        experts = vision_features(model, towers)
        queries = model.config.queries
        rows = visual_tokens(decided.move_weights, experts, queries)
        sizes = torch.stack([each[:, -queries:].detach().abs().mean() for each in experts])
        shares = (decided.move_logits + sizes.log()).softmax(dim=-1)
        entropy = -(shares * shares.clamp(min=1e-9).log()).sum(dim=-1).mean()
        table = model.embed_tokens
        edges = [table(ids).expand(len(rows), -1, -1) for ids in (layout.prefix, layout.suffix)]
        embeds = torch.cat((edges[0], rows.to(edges[0].dtype), edges[1], table(batch.ids)), dim=1)
        hidden = decode(model, embeds, layout, adapter_shares(decided.mole_logits, adapters))
        kept = hidden[:, layout.shared :][batch.labels >= 0]
        return Found(model.decoder.lm_head(rms_norm(model.decoder.norm, kept)), rows, decided.move_weights, entropy)


def adapter_shares(logits: torch.Tensor, adapters: int | None) -> torch.Tensor | None:
    """Shares [B, layers, K] from router logits: of no adapter (0), of the first alone (1), or of the routers' choice."""
    if adapters == 0:
        return None
    if adapters == 1:
        return F.one_hot(torch.zeros_like(logits[..., 0], dtype=torch.int64), logits.shape[-1]).float()
    return straight_through(logits)


def answer(
    model: MomeModel,
    layout: Layout,
    batch: Batch,
    towers: Features,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Found:
    """The forward of a batch, the decoder in `dtype`, experts and routers in float32.

    Args:
        model: the model.
        layout: of the rows.
        batch: the questions.
        towers: expert -> what its tower gives for the pictures [B, P, C].
        adapters: 0: none; 1: the first of every layer; None: those that the routers choose.
        dtype: of the decoder. Parameters stay float32 and get float32 gradients.
    """
    answers = _Answers(model)
    cast = {
        name: parameter.to(dtype)
        for name, parameter in answers.named_parameters()
        if name.startswith(("model.decoder.", "model.mole.", "model.embed_tokens."))
    }
    found: Found = torch.func.functional_call(answers, cast, (layout, batch, towers, adapters))
    return found
