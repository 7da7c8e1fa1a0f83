"""The whole comparison, stage after stage, in the order in which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from moiie_export.families import family_of
from moiie_export.graph.components import Component
from moiie_export.model.load import load_model
from moiie_export.parity.beams import compare_beams
from moiie_export.parity.bounds import bounds_kind, read_bounds
from moiie_export.parity.built_form import built_form
from moiie_export.parity.cases import Layout, Question, check_prompt, from_recipe, lay_out, made_up
from moiie_export.parity.data import case_data, coverage, model_data, report_data
from moiie_export.parity.decoder_stage import CHUNK, CaseRun, DecoderStage, spread
from moiie_export.parity.facts import check_manifest
from moiie_export.parity.graphs import BundleGraphs
from moiie_export.parity.interface import check_interface, load_graph
from moiie_export.parity.nodes import check_nodes
from moiie_export.parity.quantised import bounds_of, compare_quantised, quantised_bounds, stored_formats
from moiie_export.parity.reference import Inputs, Reference
from moiie_export.parity.report import Check, Report, left_out, tell
from moiie_export.parity.sight import Seen, Sight
from moiie_export.parity.stored import StoredWeights
from moiie_export.parity.text import compare_text
from moiie_export.parity.weights import check_embedding, check_weights
from moiie_export.recipe_parity import Bounds, ParityCase
from moiie_export.source import ModelSource
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import PORTABLE
from moiie_runtime.kv_cache import static_rows
from moiie_runtime.prompt import Prompt
from moiie_runtime.vlm import VLM, load

STEPS = 8
"""Decode steps of each case."""
_FORBIDDING = ("names", "shapes", "dtypes")
"""Stages after whose failure the graphs cannot be fed."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """A question that fits the bundle, as both sides see it, and what its decoders are fed."""

    question: Question
    prompt: Prompt
    layout: Layout
    seen: Seen

    def inputs(self, reference: Reference) -> Inputs:
        """Decoder input of the reference."""
        embeds = np.empty((len(self.layout.is_image), reference.model.config.text.hidden_size), np.float32)
        embeds[~self.layout.is_image] = reference.embed(self.layout.ids[self.layout.ids >= 0])
        if self.seen.features is not None:
            embeds[self.layout.is_image] = self.seen.features.reshape(-1, embeds.shape[1])
        return Inputs(embeds, self.layout.modality, 0, spread(len(embeds)), self.seen.adapters)


class Parity:
    """Compares one bundle with one checkpoint. See `moiie_export.parity.check_parity`."""

    def __init__(
        self,
        bundle: Path,
        checkpoint: Path,
        vision_tower: Path | None,
        target: str | None = None,
        gpu: int | None = None,
    ) -> None:
        self._portable = Bundle.open(bundle)
        self._target = target or PORTABLE
        self._gpu = gpu
        self._engine = built_form(self._portable, self._target, gpu)
        self._bundle = self._portable if self._engine is None else self._engine.bundle
        self._built: BundleGraphs | None = None
        self._formats = stored_formats(self._bundle)
        tight = bounds_kind(self._bundle, self._engine, self._formats)
        self._stated = read_bounds(self._bundle, [tight, *bounds_of(self._formats)])
        self._bounds: Bounds = getattr(self._stated, tight)
        self._checkpoint, self._vision_tower = checkpoint, vision_tower
        kinds = ", ".join([*self._formats, self._bundle.dtype])
        self._report = Report(self._bundle.name, checkpoint.resolve().name, kinds)

    def run(self, cases: Sequence[ParityCase] | None, progress: Progress) -> Report:
        """All stages; the report.

        Raises:
            MissingDependency: an engine cannot run on this machine.
        """
        if self._engine is None:
            return self._run(cases, progress)
        with BundleGraphs.built(self._engine) as self._built:  # before anything is loaded for nothing
            return self._run(cases, progress)

    def _run(self, cases: Sequence[ParityCase] | None, progress: Progress) -> Report:
        report, bundle = self._report, self._bundle
        report.data = report_data(self._bounds, STEPS)
        progress("files", 0, 1)
        report.checks.append(tell("files", bundle.verify()))
        progress("files", 1, 1)
        if not report:
            report.checks.append(left_out("everything else", "the bundle is damaged"))
            return report
        with (
            ModelSource.open(self._checkpoint, self._vision_tower) as source,
            StoredWeights(bundle, source) as stored,
        ):
            report.data["model"] = model_data(source.config)
            wanted = family_of(source.config).components(source.config, bundle.kv_cache.capacity)
            models = self._check_graphs(source, stored, wanted)
            self._report.checks += check_manifest(self._portable, source)
            if any(check.stage in _FORBIDDING for check in report.failures):
                report.checks.append(left_out("values", "the graphs are not those of this checkpoint's model"))
                return report
            reference = Reference(load_model(source, read=stored.read), self._bounds.tie_margin)
            report.checks.append(check_embedding(stored, bundle.embed_tokens.tensor, source, bundle.dtype))
            questions = self._questions(cases)
            with self._graphs(wanted, models) as graphs, load(bundle.root, target=self._target, gpu=self._gpu) as vlm:
                report.checks += graphs.unseen(wanted)
                self._compare(source, reference, graphs, vlm, questions, progress)
            progress("weights", 0, 1)
            report.checks += check_weights(stored, source, bundle.dtype, self._stated)
            progress("weights", 1, 1)
            del reference
            self._compare_quantised(source, stored, questions, progress)
        return report

    def _compare_quantised(
        self, source: ModelSource, stored: StoredWeights, questions: list[Question], progress: Progress
    ) -> None:
        """What quantisation costs; nothing for a bundle without quantised weights."""
        asked = [each for each in questions if each.name in {case["name"] for case in self._report.data["cases"]}]
        if not self._formats or not asked:
            return
        bounds = quantised_bounds(self._formats, self._stated)
        checks, data = compare_quantised(source, stored, asked, bounds, progress)
        self._report.checks += checks
        self._report.data["quantisation"] = {"bounds": asdict(bounds), "formats": list(self._formats), **data}

    def _graphs(self, wanted: tuple[Component, ...], models: dict[str, onnx.ModelProto]) -> BundleGraphs:
        if self._built is not None:
            return self._built
        return BundleGraphs.marked(self._bundle, wanted, models)

    def _check_graphs(
        self, source: ModelSource, stored: StoredWeights, wanted: tuple[Component, ...]
    ) -> dict[str, onnx.ModelProto]:
        """Interfaces of all graphs and their nodes' attributes; returns the parsed graphs, none for an engine."""
        if self._engine is not None:
            self._report.checks.append(left_out("names, shapes, dtypes, attributes", "a built engine has its own"))
            return {}
        models = {component.name: load_graph(self._bundle, component) for component in wanted}
        found = [check_interface(self._bundle, component, models[component.name]) for component in wanted]
        self._report.checks += [check for stage in zip(*found, strict=True) for check in stage]
        for name, model in models.items():
            self._report.checks += check_nodes(source.config, name, model, stored.parameter_schemes())
        return models

    def _questions(self, cases: Sequence[ParityCase] | None) -> list[Question]:
        """What is asked. Recipes are stored without folders, so pictures of their cases cannot be found again."""
        if cases is not None:
            return from_recipe(cases) if cases else made_up()
        stored = self._bundle.raw["recipe"]["parity"].get("cases", [])
        found: list[ParityCase] = []
        for case in stored:
            if case["images"]:
                reason = f"the picture {case['images'][0]} did not travel with the bundle; name the recipe's file"
                self._report.checks.append(left_out("case", reason, case=f"{case['prompt']!r}"))
            else:
                found.append(ParityCase(case["prompt"]))
        return [*made_up(), *from_recipe(found)] if len(found) < len(stored) or not stored else from_recipe(found)

    def _compare(
        self,
        source: ModelSource,
        reference: Reference,
        graphs: BundleGraphs,
        vlm: VLM,
        questions: list[Question],
        progress: Progress,
    ) -> None:
        """Every stage that runs something."""
        report = self._report
        sight = family_of(source.config).sight(vlm, graphs, reference, self._bounds)
        asked = [each for question in questions if (each := self._ask(question, source, sight, vlm))]
        graphs.forget([name for name in self._bundle.phases if not name.startswith("decoder_")])
        total = len(asked) * (STEPS + 2) + 2
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress("cases", done, total)

        stage = DecoderStage(self._bundle, graphs, reference, self._bounds, STEPS)
        runs: dict[str, CaseRun] = {}
        for each in asked:
            run = stage.case(each.question.name, each.inputs(reference), advance)
            report.checks += run.checks
            runs[each.question.name] = run
        report.checks += self._batch(stage, runs)
        advance()
        report.checks += self._full_cache(stage, source)
        graphs.close()  # what follows opens the graphs itself: a device may not hold them twice
        advance()
        for each in asked:
            run = runs[each.question.name]
            checks, answers = compare_text(vlm, each.question, run, source.config.eos_token_id, self._bounds)
            report.checks += checks
            report.checks += compare_beams(vlm, reference, each.question, each.prompt, run)
            data = case_data(each.question, each.prompt, run, answers)
            report.data["cases"].append({**data, **each.seen.data})
            advance()
        report.checks += coverage(source.config, list(runs.values()))
        if not asked:
            report.checks.append(tell("cases", ["no case could be run"]))

    def _ask(self, question: Question, source: ModelSource, sight: Sight, vlm: VLM) -> Asked | None:
        """Prompt and pictures of a question, compared; None when the bundle has no room for it."""
        checks = self._report.checks
        prompt = vlm.processor(question.messages)
        layout = lay_out(prompt.text, source)
        needed = len(layout.modality) + STEPS + 1
        if needed > self._bundle.kv_cache.capacity:
            reason = f"it takes {needed} positions, the bundle holds {self._bundle.kv_cache.capacity}"
            checks.append(left_out("case", reason, case=question.name))
            return None
        checks += check_prompt(question, prompt, layout, source.config)
        seen = sight.look(question, prompt)
        checks += seen.checks
        return Asked(question, prompt, layout, seen) if seen.comparable else None

    def _batch(self, stage: DecoderStage, runs: dict[str, CaseRun]) -> list[Check]:
        """A prompt with pictures and one without where there are both, else the longest and the shortest."""
        if len(runs) < 2:
            return [left_out("batch", "it takes two cases")]
        if static_rows(self._bundle) == 1:
            return [left_out("batch", "the engine was built for one prompt at a time (batch: 1 of its target)")]
        ordered = sorted(runs, key=lambda name: len(runs[name].inputs.embeds))
        pictured = [name for name in ordered if runs[name].inputs.is_vision.any()]
        plain = [name for name in ordered if name not in pictured]
        pair = [pictured[0], plain[0]] if pictured and plain else [ordered[-1], ordered[0]]
        return stage.batch("batch of " + " + ".join(pair), [runs[name] for name in pair])

    def _full_cache(self, stage: DecoderStage, source: ModelSource) -> list[Check]:
        capacity = self._bundle.kv_cache.capacity
        if capacity < 2 * CHUNK:
            return [left_out("full cache", f"a capacity of {capacity} is too small")]
        return stage.full_cache("full cache", source.config.text.visible_keys)
