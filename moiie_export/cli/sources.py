"""What the arguments of `export` and `parity` mean: checkpoints, recipes and the packages that reading them takes."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moiie_runtime.errors import MissingDependency, MoiieError

if TYPE_CHECKING:
    from moiie_export.recipe import Recipe

EXTRAS = {
    "build": ("ml_dtypes", "onnx", "onnx_ir"),
    "cpu": ("onnxruntime",),
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "transformers"),
    "report": ("matplotlib",),
    "polygraphy": ("polygraphy", "onnx_graphsurgeon"),
}


def missing_modules(extra: str) -> list[str]:
    """Modules of an extra that cannot be imported."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def need_extra(extra: str) -> None:
    """MissingDependency when a module of `extra` is not installed."""
    missing = missing_modules(extra)
    if missing:
        raise MissingDependency(
            f"this needs packages that are not installed: {', '.join(missing)}",
            f"pip install 'moiie-export[{extra}]'   (in a clone of the project: pip install -e '.[{extra}]')",
        )


def export_inputs(
    source: str,
    checkpoint: Path | None = None,
    vision_tower: Path | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    max_context: int | None = None,
    *,
    again: str = "moiie export {} --checkpoint DIR ...",
) -> tuple[Path, Recipe]:
    """The checkpoint directory and the recipe that `CHECKPOINT|RECIPE` and the options of `export` mean.

    Args:
        source: a checkpoint's directory, a recipe's file or the name of a shipped one.
        checkpoint: where a recipe's checkpoint lies.
        vision_tower: where a separate vision tower lies.
        dtype: in place of the recipe's.
        max_context: in place of the recipe's.
        again: the command that names a checkpoint for the recipe {}, for the hint.

    Raises:
        MoiieError: `source` is neither, or no checkpoint is named, or a directory lacks config.json.
        RecipeError: the recipe is invalid.
    """
    recipe = _recipe_of(source)
    if recipe is None:
        from moiie_export.recipe import load_recipe

        if checkpoint is not None:
            raise MoiieError(
                f"two checkpoints: {source} and --checkpoint {checkpoint}",
                "--checkpoint goes with a recipe; leave one out",
            )
        recipe, found = load_recipe("default"), checkpoint_directory(Path(source))
    else:
        found = _recipe_checkpoint(recipe, source, checkpoint, again)
    if vision_tower is not None and not vision_tower.is_dir():
        raise MoiieError(f"--vision-tower {vision_tower}: no such directory", "give the directory of the SigLIP tower")
    export = recipe.export
    if dtype is not None:
        export = replace(export, dtype=dtype)
    if max_context is not None:
        export = replace(export, max_context=max_context)
    model = replace(recipe.model, checkpoint=found, vision_tower=vision_tower or recipe.model.vision_tower)
    return found, replace(recipe, export=export, model=model)


def checkpoint_directory(path: Path) -> Path:
    """`path` when it looks like a checkpoint; MoiieError that says what is missing otherwise."""
    if path.is_file():
        raise MoiieError(f"{path}: a checkpoint is a directory, this is a file", f"give its directory: {path.parent}")
    if not path.exists():
        raise MoiieError(
            f"{path}: no such checkpoint directory", "checkpoints are local directories; download it first"
        )
    if (path / "bundle.json").is_file():
        raise MoiieError(
            f"{path}: a checkpoint is needed, this is a bundle",
            "give the checkpoint it was made from; for a bundle, `moiie doctor` says whether it runs here, "
            "and `moiie build --dry-run` what an engine of it takes",
        )
    if not (path / "config.json").is_file():
        raise MoiieError(
            f"{path}: no checkpoint, it has no config.json", "a checkpoint holds config.json and its weights"
        )
    return path


def _recipe_of(source: str) -> Recipe | None:
    """The recipe that `source` names, or None when it is a checkpoint directory."""
    from moiie_export.recipe import is_recipe_path, load_recipe, shipped_recipes

    path = Path(source)
    shipped = [each.stem for each in shipped_recipes()]
    if (path / "config.json").is_file():
        return None
    if source.endswith((".yaml", ".yml")) or source in shipped:
        return load_recipe(source)
    if path.exists():
        checkpoint_directory(path)
    looked = [f"a checkpoint ({path / 'config.json'})", f"a shipped recipe ({', '.join(shipped)})"]
    if is_recipe_path(source):
        looked[1] = "a recipe file (*.yaml)"
    raise MoiieError(
        f"{source}: neither a checkpoint nor a recipe; looked for {' and '.join(looked)}",
        "`moiie recipe ls` lists the recipes; checkpoints are local directories",
    )


def _recipe_checkpoint(recipe: Recipe, source: str, checkpoint: Path | None, again: str) -> Path:
    found = checkpoint or recipe.model.checkpoint
    if found is None:
        raise MoiieError(
            f"recipe {source} names no checkpoint",
            f"say which: {again.format(source)}; or set model.checkpoint in a copy of the recipe",
        )
    return checkpoint_directory(found)
