"""`moiie recipe`: list, show, copy and validate recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note, table
from moiie_runtime.errors import MoiieError, Unsound

if TYPE_CHECKING:
    from moiie_export.recipe import Recipe
    from moiie_export.recipe_problems import Problem

EPILOG = """\b
Examples:
  moiie recipe ls
  moiie recipe cp moiie-phi3 my.yaml
  moiie recipe validate my.yaml
"""


@click.group(context_settings=CONTEXT, epilog=EPILOG)
@VERBOSE_OPTION
def command() -> None:
    """List, show, copy and validate recipes."""


@command.command("ls", context_settings=CONTEXT, epilog="\b\nExample:\n  moiie recipe ls")
@JSON_OPTION
@VERBOSE_OPTION
def ls(as_json: bool) -> None:
    """List the shipped recipes."""
    from moiie_export.recipe import list_recipes

    recipes = list_recipes()
    if as_json:
        emit_json(
            {"recipes": [{"name": each.name, "description": each.description, "path": each.path} for each in recipes]}
        )
    else:
        click.echo(table([[each.name, each.description] for each in recipes]))


@command.command(
    "show",
    context_settings=CONTEXT,
    epilog="\b\nExamples:\n  moiie recipe show moiie-phi3 --resolved\n  moiie recipe show --schema > recipe.schema.json",
)
@click.argument("recipe", required=False)
@click.option("--resolved", is_flag=True, help="The checked recipe with every key, its parent merged in.")
@click.option("--schema", is_flag=True, help="The format of recipes as JSON Schema, for editors.")
@JSON_OPTION
@VERBOSE_OPTION
def show(recipe: str | None, resolved: bool, schema: bool, as_json: bool) -> None:
    """Print a recipe. RECIPE is a shipped name or a YAML file."""
    from moiie_export.recipe import find_recipe, load_recipe, recipe_schema

    if schema:
        if recipe or resolved:
            raise click.UsageError("--schema takes no recipe and no --resolved")
        emit_json(recipe_schema())
        return
    if recipe is None:
        raise click.UsageError("say which recipe; `moiie recipe ls` lists them")
    if as_json:
        emit_json(load_recipe(recipe).resolved(absolute_paths=True))
    elif resolved:
        import yaml

        plain = load_recipe(recipe).resolved(absolute_paths=True)
        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(_text(find_recipe(recipe)), nl=False)


@command.command("cp", context_settings=CONTEXT, epilog="\b\nExample:\n  moiie recipe cp moiie-phi3 my.yaml")
@click.argument("recipe")
@click.argument("target", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@VERBOSE_OPTION
def cp(recipe: str, target: Path, force: bool) -> None:
    """Copy a recipe to a file or into a directory."""
    from moiie_export.recipe import find_recipe

    source = find_recipe(recipe)
    path = target / source.name if target.is_dir() else target
    if path.suffix not in (".yaml", ".yml"):
        raise MoiieError(f"{path}: a recipe's file name ends in .yaml", f"moiie recipe cp {recipe} {path}.yaml")
    if path.exists() and not force:
        raise MoiieError(f"{path}: exists already", "choose another name, or overwrite it with --force")
    if not path.parent.is_dir():
        raise MoiieError(f"{path}: there is no directory {path.parent}", f"mkdir -p {path.parent}")
    shutil.copyfile(source, path)
    note(f"edit it, then: moiie recipe validate {path}")
    click.echo(str(path))


@command.command(
    "validate",
    context_settings=CONTEXT,
    epilog="\b\nExamples:\n  moiie recipe validate my.yaml\n  moiie recipe validate my.yaml --checkpoint path/to/checkpoint",
)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Check quantisation rules against this checkpoint.  [default: the recipe's, where it exists]",
)
@JSON_OPTION
@VERBOSE_OPTION
def validate(recipes: tuple[str, ...], checkpoint: Path | None, as_json: bool) -> None:
    """Check recipes; every problem is listed with file and line. Exits 3 when there is one."""
    from moiie_export.recipe import load_recipe
    from moiie_export.recipe_problems import RecipeError

    problems: list[Problem] = []
    valid: list[Recipe] = []
    for name in recipes:
        try:
            recipe = load_recipe(name)
            problems += _rule_problems(recipe, checkpoint)
            valid.append(recipe)
        except RecipeError as error:  # noqa: PERF203 - every recipe is to be judged
            problems += error.problems
    if as_json:
        listed = [
            {"file": each.file, "line": each.line, "key": each.key, "problem": each.text, "hint": each.hint}
            for each in problems
        ]
        emit_json({"valid": not problems, "problems": listed})
    elif valid and not problems:
        click.echo("\n".join(f"{each.path}: valid" for each in valid))
    if problems:
        raise RecipeError(problems)


def _rule_problems(recipe: Recipe, checkpoint: Path | None) -> list[Problem]:
    """What is wrong with a recipe's quantisation rules for a checkpoint; nothing where there is no checkpoint."""
    from moiie_export.recipe_problems import Problem

    named = recipe.model.checkpoint
    directory = checkpoint or (named if named is not None and named.is_dir() else None)
    if directory is None or not recipe.quantization.rules:
        return []
    from moiie_export.quantize.rules import resolve
    from moiie_export.source import ModelSource

    with ModelSource.open(directory, recipe.model.vision_tower) as source:
        try:
            resolve(recipe.quantization, recipe.export.dtype, source.weight_map, source.config)
        except Unsound as error:
            found = [line.partition(": ") for line in error.message.splitlines()]
            return [Problem(recipe.path or Path(recipe.name), 1, key, text) for key, _, text in found]
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MoiieError(f"{path}: not UTF-8 text", "recipes are UTF-8 YAML") from error
