"""Recipes: how a checkpoint becomes a bundle, as data. YAML -> frozen dataclasses, checked without PyTorch.

A recipe may name one parent (`extends`): maps merge, lists and scalars replace. Unknown keys, wrong types and values out
of range are errors, all reported at once with file and line. There is no interpolation and no code in a recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moiie_export.recipe_document import Node, parse_document, read_document
from moiie_export.recipe_parity import (
    CalibrationSection,
    ParitySection,
)
from moiie_export.recipe_problems import Problem, RecipeError
from moiie_export.recipe_quantization import QuantizationSection
from moiie_export.recipe_schema import Checker, Limits, json_schema, key, show
from moiie_export.recipe_targets import TargetSection, target_problems
from moiie_runtime.errors import MoiieError

SCHEMA = 1
_OWN = ("schema", "name", "description", "extends")
"""Keys that are about one file and are not inherited."""
_MAX_INT = 2**31 - 1
_AT_LEAST_ONE = Limits(minimum=1, maximum=_MAX_INT)


@dataclass(frozen=True)
class ModelSection:
    """Which checkpoint. Relative paths start at the recipe file's folder."""

    checkpoint: Path | None = key("Directory of the checkpoint; null: said on the command line.", None)
    vision_tower: Path | None = key(
        "Directory of a separate vision tower; null: looked for beside the checkpoint, where config.json says.", None
    )


@dataclass(frozen=True)
class ExportSection:
    """What the bundle holds."""

    dtype: Literal["float32", "float16"] = key(
        "How weights are stored. A CPU computes in float32 either way.", "float32"
    )
    max_context: int | None = key(
        "Longest prompt plus answer in tokens (the KV cache's capacity); null: the model's own limit.",
        None,
        limits=_AT_LEAST_ONE,
    )
    islands: tuple[str, ...] = key(
        "Linear layers that stay float32 because float16 could not hold what flows through them: auto (measured on "
        "calibration.cases), none, or names of weights with * ? [ ] as in file names.",
        (),
        limits=Limits(single=True),
    )


@dataclass(frozen=True)
class GenerationSection:
    """Defaults of `moiie run`; its options override them. null: what the checkpoint says, else plain greedy decoding."""

    max_new_tokens: int | None = key("Most tokens in an answer.", None, limits=_AT_LEAST_ONE)
    num_beams: int | None = key("Beams of beam search; 1: none.", None, limits=_AT_LEAST_ONE)
    do_sample: bool = key("false: always the most probable token (greedy).", False)
    temperature: float = key("Divides the logits before sampling.", 1.0, limits=Limits(above=0))
    top_k: int = key("Sample among the k most probable tokens; 0: all.", 0, limits=Limits(minimum=0, maximum=_MAX_INT))
    top_p: float = key(
        "Sample among the most probable tokens that together reach this probability; 1: all.",
        1.0,
        limits=Limits(above=0, maximum=1),
    )
    repetition_penalty: float | None = key(
        "Above 1 makes tokens that were used already less probable.", None, limits=Limits(above=0)
    )
    length_penalty: float | None = key("With beams: above 0 favours long answers, below 0 short ones.", None)
    seed: int = key("Seed of the sampler.", 0, limits=Limits(minimum=0, maximum=_MAX_INT))


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `path` is the file it came from."""

    schema: Literal[1] = key("Version of this format: 1.")
    name: str = key("Name; the file's when left out.", "")
    description: str = key("One sentence for `moiie recipe ls`.", "")
    extends: str | None = key("Parent: a shipped recipe's name, or a path relative to this file.", None)
    model: ModelSection = key("Which checkpoint.", factory=ModelSection)
    export: ExportSection = key("What the bundle holds.", factory=ExportSection)
    calibration: CalibrationSection = key("Pictures and prompts to measure on.", factory=CalibrationSection)
    quantization: QuantizationSection = key("Which weights are quantised.", factory=QuantizationSection)
    generation: GenerationSection = key("Defaults of `moiie run`.", factory=GenerationSection)
    parity: ParitySection = key("What `moiie parity` compares and tolerates.", factory=ParitySection)
    targets: tuple[TargetSection, ...] = key("Targets of `moiie build`, beside the built-in ones.", ())
    path: Path | None = None

    def contradictions(self) -> Iterator[tuple[str, str, str | None]]:
        """(key, what is wrong, hint) of what one key cannot show."""
        for index, name, text, hint in target_problems(self.targets):
            yield f"targets[{index}].{name}", text, hint

    def resolved(self, absolute_paths: bool = False) -> dict[str, Any]:
        """The recipe as plain data with every key present and the parent merged in.

        Paths are cut to their last part unless `absolute_paths`, so that a bundle's manifest names no local folder.
        """
        plain: dict[str, Any] = _plain(self, absolute_paths)
        return {name: value for name, value in plain.items() if name not in ("extends", "path")}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of a shipped name (`default`) or of a file (anything with a `/` or ending in .yaml or .yml).

    Raises:
        MoiieError: there is no such recipe, or it cannot be read.
        RecipeError: it is invalid; the message lists every problem with file and line.
    """
    path = find_recipe(name_or_path)
    root, problems = read_document(path)
    return _check(root, problems)


def parse_recipe(raw: bytes, path: Path) -> Recipe:
    """As `load_recipe`, for the bytes of a file that would lie at `path`."""
    root, problems = parse_document(raw, path)
    return _check(root, problems)


def find_recipe(name_or_path: str | Path) -> Path:
    """The file that `name_or_path` means; MoiieError when there is none."""
    text = str(name_or_path)
    if is_recipe_path(name_or_path):
        path = Path(text).expanduser()
        if not path.is_file():
            raise MoiieError(f"{path}: no such recipe file", "`moiie recipe ls` lists the shipped recipes")
        return path
    shipped = {path.stem: path for path in shipped_recipes()}
    if text not in shipped:
        close = difflib.get_close_matches(text, list(shipped), n=1)
        hint = (
            f"did you mean {close[0]}?" if close else "a recipe of your own is given by its path, for example ./my.yaml"
        )
        raise MoiieError(f"no shipped recipe is called {text!r} (there are: {', '.join(shipped)})", hint)
    return shipped[text]


def is_recipe_path(name_or_path: str | Path) -> bool:
    """Whether this means a file rather than a shipped recipe's name."""
    text = str(name_or_path)
    return isinstance(name_or_path, Path) or "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def shipped_recipes() -> list[Path]:
    """Files of the recipes that come with the package, by name."""
    import moiie_recipes

    return sorted(Path(str(moiie_recipes.__file__)).parent.glob("*.yaml"))


def list_recipes() -> list[Recipe]:
    """Every shipped recipe."""
    return [load_recipe(path) for path in shipped_recipes()]


def recipe_schema() -> dict[str, Any]:
    """The format of a recipe as JSON Schema, for editors that complete and check YAML."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "moiie recipe"}
    return {**head, **json_schema(Recipe)}


def _check(root: Node, problems: list[Problem]) -> Recipe:
    _check_version(root)
    merged = _with_parents(root, problems, [root.file])
    checker = Checker(Recipe)
    recipe = checker.build(Recipe, merged)
    found = problems + checker.problems
    if found or recipe is None:
        order = {
            path: position for position, path in enumerate(dict.fromkeys([root.file, *(each.file for each in found)]))
        }
        raise RecipeError(sorted(found, key=lambda each: (order[each.file], each.line)))
    return replace(recipe, name=recipe.name or root.file.stem, path=root.file)


def _check_version(root: Node) -> None:
    """Refuses other versions before anything else: their keys cannot be judged here."""
    version = root.value.get("schema") if isinstance(root.value, dict) else None
    if version is None or (type(version.value) is int and version.value == SCHEMA):
        return
    newer = type(version.value) is int and version.value > SCHEMA
    hint = "update moiie-export to a version that knows it" if newer else f"write schema: {SCHEMA}"
    text = f"expected {SCHEMA}, found {show(version.value)}"
    raise RecipeError([Problem(version.file, version.line, "schema", text, hint)])


def _with_parents(child: Node, problems: list[Problem], chain: list[Path]) -> Node:
    """`child` merged over its parent, and over the parent's parent, and so on."""
    extends = child.value.get("extends") if isinstance(child.value, dict) else None
    if extends is None or not isinstance(extends.value, str):
        return child
    try:
        path = _parent_path(extends)
    except MoiieError as error:
        problems.append(Problem(extends.file, extends.line, "extends", error.message, error.hint))
        return child
    if path.resolve() in [each.resolve() for each in chain]:
        circle = " -> ".join(each.name for each in [*chain, path])
        problems.append(Problem(extends.file, extends.line, "extends", f"a recipe cannot extend itself: {circle}"))
        return child
    parent, found = read_document(path)
    problems += found
    _check_version(parent)
    parent = _with_parents(parent, problems, [*chain, path])
    if not isinstance(parent.value, dict):
        return child
    return _merge(
        Node(parent.file, parent.line, {name: v for name, v in parent.value.items() if name not in _OWN}), child
    )


def _parent_path(extends: Node) -> Path:
    text = str(extends.value)
    return find_recipe(extends.file.parent / Path(text).expanduser() if is_recipe_path(text) else text)


def _merge(parent: Node, child: Node) -> Node:
    if not isinstance(parent.value, dict):
        return child
    if child.value is None:
        return parent
    if not isinstance(child.value, dict):
        return child
    merged = dict(parent.value)
    for name, node in child.value.items():
        merged[name] = _merge(merged[name], node) if name in merged else node
    return Node(child.file, child.line, merged)


def _plain(value: Any, absolute_paths: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name), absolute_paths) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each, absolute_paths) for each in value]
    if isinstance(value, Path):
        return str(value) if absolute_paths else value.name
    return value
