"""`moiie convert`: the authors' layout of MoME -> checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiie_export.cli.common import CONTEXT, JSON_OPTION, VERBOSE_OPTION, emit_json, note
from moiie_runtime.sizes import readable

EPILOG = """\b
Example:
  moiie convert MoME_ckpt.pth --vicuna vicuna-7b-v1.5 --eva eva_vit_g.pth \\
    --dino dinov2_vitl14_pretrain.pth --pix2struct pix2struct-base \\
    --sentence all-MiniLM-L6-v2 -o mome
  moiie export mome -o mome.bundle

\b
Models of other sizes than the published one name them in a JSON file for --config, with the
keys of config.json; what it leaves out stays as published. Files of weights do not say how
many attention heads a model has. For example
  {"vision_experts": [{"name": "dino", "hidden_size": 768, "num_attention_heads": 12,
                       "num_hidden_layers": 12, "intermediate_size": 3072}]}
A first-stage checkpoint (one adapter a layer) becomes a model whose adapters are all equal.
Pickles (.pth, .bin) are read as weights only: one that wants to run code is refused.
"""

_FILE: dict[str, Any] = {"required": True, "type": click.Path(path_type=Path), "metavar": "FILE"}
_DIRECTORY: dict[str, Any] = {"required": True, "type": click.Path(path_type=Path), "metavar": "DIR"}


@click.command(context_settings=CONTEXT, epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="MOME_CKPT")
@click.option("--vicuna", help="Vicuna-7B v1.5, with tokenizer.json.", **_DIRECTORY)
@click.option("--eva", help="EVA ViT-g of BLIP-2: eva_vit_g.pth, or the same as .safetensors.", **_FILE)
@click.option("--dino", help="DINOv2 ViT-L/14 without registers: dinov2_vitl14_pretrain.pth, or .safetensors.", **_FILE)
@click.option("--pix2struct", help="google/pix2struct-base; the decoder is left out.", **_DIRECTORY)
@click.option("--sentence", help="sentence-transformers/all-MiniLM-L6-v2.", **_DIRECTORY)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON with what differs from the published model, as in config.json.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write."
)
@JSON_OPTION
@VERBOSE_OPTION
def command(checkpoint: Path, output: Path, config: Path | None, as_json: bool, **sources: Path) -> None:
    """Gather a MoME checkpoint from its authors' files.

    MOME_CKPT (.pth or .safetensors) holds what was trained; the frozen encoders and the language model come from where
    their own authors publish them. The result is one directory that `moiie export` takes.
    """
    from moiie_export.cli.progress import Progress
    from moiie_export.convert import Originals, convert, summary

    progress = Progress()
    result = convert(Originals(checkpoint, **sources), output, config, progress)
    progress.finish()
    if as_json:
        emit_json(summary(result))
        return
    note(f"wrote {readable(result.bytes)}, {result.trainable_values} trained values among them")
    if result.stage == 1:
        note("a first-stage checkpoint: all adapters of a layer are equal, and the first is always taken")
    click.echo(str(result.path))
