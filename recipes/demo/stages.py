"""The stages of training: what each one learns, on what, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from tokenizers import Tokenizer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moiie_export.model.moe import MoeBlock
from moiie_export.model.vlm import VlmModel
from moiie_export.model_config import Modality
from moiie_recipes.demo.batches import (
    Batch,
    ask_batch,
    labels_of,
    make_layout,
    normalise,
    pack,
    small_picture,
    training_scene,
)
from moiie_recipes.demo.differentiable import Forward, Layout, forward, rms_norm, topk_route
from moiie_recipes.demo.losses import answer_loss, balance_loss
from moiie_recipes.demo.questions import CAPTION, KINDS, ONE_THING, Kind
from moiie_recipes.demo.scenes import COLOURS, SHAPES, Scene


@dataclass(frozen=True)
class Settings:
    """Numbers of a training run; the defaults gave the shipped model."""

    seed: int = 0
    scenes: int = 24_000
    pictures_per_step: int = 16
    questions_per_picture: int = 8
    perception_steps: int = 500
    dense_steps: int = 1400
    align_steps: int = 200
    sparse_steps: int = 1200
    specialise_steps: int = 500
    learning_rate: float = 1.5e-3
    balance: float = 0.001
    """Coefficient of each load-balancing loss, the authors' (spec moiie.md, 1.9)."""
    idle_work: float = 3.0
    """Cost of what dense layers and shared experts do to image tokens. So small a task is done by any one layer; this
    makes it the vision experts' task, so that their absence shows."""
    language_work: float = 1.0
    """In the last stage, cost of what experts of the language side would do to image tokens if they were sent there.
    Upcycled experts begin as copies that can all see; these forget it."""
    image_rows: float = 0.1
    """Mean square above which image rows cost something when they enter the decoder. Left alone, the projector makes
    them so large that nothing the decoder's layers add to them matters, and then no expert has anything to do there."""


PERCEPTION_DEPTH = 4
"""Layers of the decoder that learn to see before they learn to read: all but the last, which no image token is read from."""
STAGES = ("perception", "dense", "align", "sparse", "specialise")


@dataclass
class Stage:
    """One stage: its name, its settings, the model and the tokenizer."""

    name: str
    settings: Settings
    model: VlmModel
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.head = (
            nn.Linear(self.model.config.text.hidden_size, sum(self._head_sizes()))
            if self.name == "perception"
            else None
        )
        self.peak = self.settings.learning_rate
        self.floor = (
            0.02 if self.name in ("sparse", "specialise") else 0.25
        )  # stages before the last go on where they stopped

    @property
    def steps(self) -> int:
        """How many steps the stage takes."""
        return int(getattr(self.settings, f"{self.name}_steps"))

    @cached_property
    def layout(self) -> Layout:
        """The layout of its rows."""
        return make_layout(self.tokenizer, self.settings.questions_per_picture)

    def trained(self) -> dict[float, list[nn.Parameter]]:
        """What the stage changes, by the share of the learning rate it gets.

        The tower moves slowly once it sees: at the decoder's rate, the noise of a new stage's first gradients wipes out
        what it has learned.
        """
        vision = self.model.vision_encoder
        tower, projector = list(vision.tower.parameters()), list(vision.projector.parameters())
        decoder = [*projector, *self.model.embed_tokens.parameters(), *self.model.decoder.parameters()]
        if self.head is not None:
            return {1.0: [*tower, *decoder, *self.head.parameters()]}
        if self.name == "align":
            return {2.0: projector}
        if self.name == "specialise":
            experts = self._language_experts()
            taught = {id(parameter) for parameter in experts}
            return {0.6: experts, 0.05: [each for each in decoder if id(each) not in taught]}
        return {1.0: decoder, 0.1: tower} if self.name == "dense" else {0.6: decoder, 0.06: tower}

    def _language_experts(self) -> list[nn.Parameter]:
        """Parameters of the experts that text may reach."""
        blocks = [layer.mlp for layer in self.model.decoder.layers if isinstance(layer.mlp, MoeBlock)]
        return [
            parameter
            for block in blocks
            for expert in block.moe.expert_groups["language"]
            for parameter in block.experts[str(expert)].parameters()
        ]

    def orthogonal(self) -> frozenset[int]:
        """Ids of the parameters that learn by Muon: the decoder's matrices, in stages that answer questions."""
        if self.name not in ("dense", "sparse", "specialise"):
            return frozenset()
        return frozenset(
            id(parameter)
            for layer in self.model.decoder.layers
            for name, parameter in layer.named_parameters()
            if parameter.dim() > 1 and not name.endswith(("gate.weight", "gate_vis.weight"))
        )

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of step number `step`, and numbers for the log."""
        most, kinds = self._lesson(step)
        scenes = [training_scene(self.settings.seed, i, most) for i in self._indices(step)]
        if self.head is not None:
            return self._perception_loss(self.head, scenes)
        asked = ask_batch(scenes, self.settings.questions_per_picture, kinds, salt=f"{self.name}/{step}")
        batch = pack(self.tokenizer, scenes, asked)
        logits, found = answer_logits(self.model, self.layout, batch, torch.bfloat16)
        labels = batch.labels[batch.labels >= 0]
        loss = answer_loss(logits, labels)
        numbers = {"answer": loss.item()}
        rows = found.embeds[len(self.layout.prefix) :].unflatten(0, (len(batch.ids), -1))
        size = rows[:, : self.layout.image_tokens].float().square().mean()
        numbers["image_rows"] = size.item()
        loss = loss + 0.1 * F.relu(size - self.settings.image_rows) + self.settings.idle_work * found.idle_work
        numbers |= {"idle_work": found.idle_work.item(), "language_work": found.language_work.item()}
        if self.name == "specialise":
            loss = loss + self.settings.language_work * found.language_work
        if found.router_logits:
            balances, shares = self._routing(found, batch)
            numbers |= shares
            for name, value in balances.items():
                loss = loss + self.settings.balance * value
                numbers[f"balance_{name}"] = value.item()
        return loss, numbers

    def measure(self) -> dict[str, float]:
        """Accuracy on held-out questions, in stages that answer some."""
        from moiie_recipes.demo.watching import teacher_forced_accuracy

        return {} if self.head is not None else teacher_forced_accuracy(self.model, self.tokenizer, self.layout)

    def _indices(self, step: int) -> list[int]:
        size = self.settings.pictures_per_step
        offset = STAGES.index(self.name) * 7919  # stages begin at different scenes
        return [(offset + step * size + i) % self.settings.scenes for i in range(size)]

    def _lesson(self, step: int) -> tuple[int, tuple[Kind, ...]]:
        """How many things at most, and which kinds of questions.

        The dense stage begins with few things, captions and questions about one thing: to find the thing that has a
        property is what everything else builds on, it is hard to learn among many, and in a caption it is one step.
        """
        done = step / self.steps
        if self.name != "dense" or done >= 0.6:
            return 5, KINDS
        return (2 if done < 0.1 else 3), (CAPTION, CAPTION, CAPTION, *ONE_THING)

    def _perception_loss(self, head: nn.Linear, scenes: list[Scene]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the shape and the colour in each patch, and of the patch's row and column."""
        pixels = normalise(torch.from_numpy(np.stack([small_picture(scene) for scene in scenes])))
        labels = torch.from_numpy(np.stack([labels_of(scene) for scene in scenes])).long().reshape(-1)
        layout = make_layout(self.tokenizer, 0)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            rows = self.model.vision_encoder(pixels)[0].flatten(0, 1)
            embeds = torch.cat((self.model.embed_tokens(layout.prefix), rows))
            found = forward(self.model, embeds, len(scenes), layout, PERCEPTION_DEPTH)
            hidden = found.hidden[len(layout.prefix) :]
            logits = head(F.layer_norm(hidden, hidden.shape[1:])).float()
        colours, grid = len(COLOURS), self.model.config.vision.grid
        place = torch.arange(grid * grid).repeat(len(scenes))
        shape = torch.where(labels > 0, 1 + (labels - 1) // colours, 0)
        colour = torch.where(labels > 0, 1 + (labels - 1) % colours, 0)
        targets = (shape, colour, place // grid, place % grid)
        parts = logits.split(self._head_sizes(), dim=1)
        loss = torch.stack([F.cross_entropy(part, target) for part, target in zip(parts, targets, strict=True)]).sum()
        right = ((parts[0].argmax(1) == shape) & (parts[1].argmax(1) == colour))[labels > 0].float().mean().item()
        where = ((parts[2].argmax(1) == targets[2]) & (parts[3].argmax(1) == targets[3])).float().mean().item()
        size = rows.float().square().mean()
        loss = loss + 0.1 * F.relu(size - self.settings.image_rows) + self.settings.idle_work * found.idle_work
        numbers = {"image_rows": size.item(), "idle_work": found.idle_work.item()}
        return loss, {"things_right": right, "places_right": where, **numbers}

    def _head_sizes(self) -> list[int]:
        grid = self.model.config.vision.grid
        return [1 + len(SHAPES), 1 + len(COLOURS), grid, grid]

    def _routing(self, found: Forward, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Both load-balancing losses, and the share of each modality's tokens that go to each expert."""
        moe = self.model.config.moe
        assert moe is not None
        losses: dict[str, torch.Tensor] = {}
        shares: dict[str, float] = {}
        for name, which in self._modalities(batch).items():
            losses[name] = balance_loss(found.router_logits, which, moe.expert_groups[name], moe.top_k)
            chosen = torch.cat([topk_route(layer[which], moe.top_k)[0] for layer in found.router_logits])
            counts = chosen.flatten().bincount(minlength=moe.num_experts).float() / len(chosen)
            shares |= {f"share_{name}_{expert}": counts[expert].item() for expert in moe.expert_groups[name]}
        return losses, shares

    def _modalities(self, batch: Batch) -> dict[Modality, torch.Tensor]:
        """[N] bool of each modality's tokens, padding left out."""
        rows, prefix = len(batch.ids), torch.zeros(len(self.layout.prefix), dtype=torch.bool)
        modality = self.layout.token_modality.repeat(rows, 1)
        valid = torch.cat((torch.ones(rows, self.layout.image_tokens, dtype=torch.bool), batch.valid), dim=1)
        vision = torch.cat((prefix, (modality == 1).reshape(-1)))
        language = torch.cat((~prefix, ((modality != 1) & valid).reshape(-1)))
        return {"vision": vision, "language": language}


class _Answers(nn.Module):
    """A module around the model, so that it can be called with parameters in another type."""

    def __init__(self, model: VlmModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, layout: Layout, batch: Batch) -> tuple[torch.Tensor, Forward]:
        model, rows = self.model, len(batch.ids)
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has a slow backward pass on a CPU
            features, _ = model.vision_encoder(batch.pixel_values.to(model.embed_tokens.weight.dtype))
        embeds = torch.cat((features, model.embed_tokens(batch.ids)), dim=1)
        flat = torch.cat((model.embed_tokens(layout.prefix), embeds.flatten(0, 1)))
        found = forward(model, flat, rows, layout)
        labels = torch.cat((torch.full((rows, layout.image_tokens), -100), batch.labels), dim=1).reshape(-1)
        hidden = found.hidden[len(layout.prefix) :][labels >= 0]
        return model.decoder.lm_head(rms_norm(model.decoder.norm, hidden)), found


def answer_logits(
    model: VlmModel, layout: Layout, batch: Batch, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Forward]:
    """Logits [n, V] at every position with a label, in order, and the whole forward, computed in `dtype`.

    The parameters stay float32 and get float32 gradients.
    """
    answers = _Answers(model)
    if dtype == torch.float32:
        found: tuple[torch.Tensor, Forward] = answers(layout, batch)
        return found
    cast = {
        name: p if ".gate" in name and "proj" not in name else p.to(dtype) for name, p in answers.named_parameters()
    }
    return torch.func.functional_call(answers, cast, (layout, batch))
