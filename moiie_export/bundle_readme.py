"""README.md of a bundle: what it is, how to run it, and commands of other tools that work on its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README = "README.md"
README_CODE = 1
"""Raised whenever another text would be written for the same bundle."""

_SIZES = {"images": 1, "batch": 1, "sequence": 8, "kept": 1, "texts": 1, "words": 6, "patches": 12, "adapters": 1}
"""Sizes of open dimensions in commands."""
_RANGES = {
    "past_lengths": "[0,0]",
    "logits_to_keep": "[0,0]",
    "token_modality": "[0,1]",
    "attention_mask": "[1,1]",
    "grid_size": "[3,3]",
}
"""Values of inputs that may not be arbitrary: an empty cache, the first position, patches of a grid that there is."""

Inputs = Mapping[str, Sequence[tuple[str, Sequence[int | str]]]]
"""Component -> name and shape of each input."""

_TEXT = """# {name}

A vision-language model of type `{model_type}`, exported to ONNX by moiie-export. `bundle.json` says what it was made from,
what every graph takes and gives, and the digest of every file.

    moiie run . -i picture.png -p "What is shown in the picture?"
    moiie build . --target cpu        # faster on this machine; `moiie build --help` lists other targets
    moiie inspect . --verify          # are all files whole?
    moiie parity . --checkpoint DIR   # is this the model of that checkpoint?

All graphs refer to one file of weights, `onnx/weights.safetensors`, and hold the operators of this project as functions of
standard ones, so every ONNX Runtime runs them as they are. Names of values that are handy to look at: `hidden.0`,
`hidden.1`, ... behind each decoder layer, `router_logits.N`, `expert_ids.N` and `expert_weights.N` of layer N.

## With Polygraphy

`pip install polygraphy onnx-graphsurgeon onnxruntime`, then in this folder. What is written goes to `../polygraphy`.

What a graph is made of:

```sh
{inspect}
```

Run it in ONNX Runtime on made-up inputs (`--val-range` keeps positions inside the cache; dimensions that are not named are 1).
`--save-outputs` and `--load-outputs` compare two runs, `--onnx-outputs` marks values inside as outputs:

```sh
{run}
```

Simplify a graph, or cut one out that ends behind the first decoder layer:

```sh
mkdir -p ../polygraphy
polygraphy surgeon sanitize onnx/decoder_decode.onnx -o ../polygraphy/decoder_decode.onnx --save-external-data decode.data
{extract}
```

`moiie parity . --bisect --target NAME` finds the first value of a built form that differs from ONNX Runtime's.
"""

_EXTRACT = (
    "polygraphy surgeon extract onnx/decoder_prefill.onnx -o ../polygraphy/layer.onnx --outputs hidden.0:float32 "
    "--save-external-data layer.data"
)


def write_readme(described: Mapping[str, Any], names: Sequence[str], directory: Path) -> None:
    """Write README.md beside the finished graphs.

    Args:
        described: the manifest's sections that follow from checkpoint and recipe.
        names: components of the bundle.
        directory: the bundle under construction.
    """
    import onnx

    from moiie_export.disk import write_bytes

    inputs: dict[str, list[tuple[str, list[int | str]]]] = {}
    for name in names:
        graph = onnx.load(str(directory / "onnx" / f"{name}.onnx"), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        inputs[name] = [(value.name, _sizes(value)) for value in graph.input if value.name not in weights]
    write_bytes(directory / README, readme_text(described["name"], described["model"]["model_type"], inputs).encode())


def readme_text(name: str, model_type: str, inputs: Inputs) -> str:
    """The text; its `sh` blocks are commands to be run in the bundle's folder."""
    return _TEXT.format(
        name=name,
        model_type=model_type,
        inspect="\n".join(f"polygraphy inspect model onnx/{each}.onnx --show layers" for each in inputs),
        run="\n".join(_run_command(each, values) for each, values in inputs.items()),
        extract=_EXTRACT,
    )


def _run_command(component: str, values: Sequence[tuple[str, Sequence[int | str]]]) -> str:
    shapes, ranges = [], []
    for name, dims in values:
        sizes = [dim if isinstance(dim, int) else _SIZES[dim] for dim in dims]
        if any(isinstance(dim, str) and _SIZES[dim] != 1 for dim in dims):
            shapes.append(f"{name}:[{','.join(map(str, sizes))}]")
        if name in _RANGES:
            ranges.append(f"{name}:{_RANGES[name]}")
    parts = [f"polygraphy run onnx/{component}.onnx --onnxrt"]
    parts += ["--input-shapes " + " ".join(shapes)] if shapes else []
    parts += ["--val-range " + " ".join(ranges)] if ranges else []
    return " ".join(parts)


def _sizes(value: Any) -> list[int | str]:
    return [dim.dim_param or int(dim.dim_value) for dim in value.type.tensor_type.shape.dim]
