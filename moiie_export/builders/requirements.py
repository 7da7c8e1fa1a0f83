"""What a bundle's weights ask of a TensorRT target, and of the plugin library: told before anything is built."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from moiie_export.builders import BuildRequest
from moiie_export.builders.plugin_kernels import Kernels, library_kernels
from moiie_export.builders.shared_library import library_problem
from moiie_export.targets import DIALECT_SMS, OLDEST_SMS, Target
from moiie_runtime.backends.gpu_info import runs_kernels
from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MissingDependency

_LOOKED_UP = "getCreators"
"""What TensorRT calls to learn a library's plugins."""


def check_sms(target: Target, builder: str = "", found: Collection[int] | None = None) -> None:
    """Refuse GPUs that the target's library does not build for.

    Args:
        target: what for.
        builder: the library as it is installed; empty: whichever will be.
        found: the GPUs that this one knows; None where it was not loaded.

    Raises:
        MissingDependency: naming one, and those there are.
    """
    known = DIALECT_SMS[target.dialect] if found is None else DIALECT_SMS[target.dialect].intersection(found)
    unknown = [sm for sm in target.sms if sm not in known]
    if unknown:
        raise MissingDependency(
            f"target {target.name}: {builder or target.backend} does not build for SM {unknown[0]} "
            f"(it does for {', '.join(map(str, sorted(known)))})",
            "choose others with --sm"
            + ("" if target.expected else ", or a target of full TensorRT, which builds on the device itself"),
        )


def check_formats(bundle: Bundle, target: Target) -> None:
    """Refuse what a GPU of the target has no arithmetic for; the library would say so of a node, after minutes.

    Raises:
        MissingDependency: an SM is too old.
    """
    for form in sorted({*bundle.quantization.values()}):
        older = [sm for sm in target.sms if sm < OLDEST_SMS.get(form, 0)]
        if older:
            raise MissingDependency(
                f"target {target.name}: the bundle holds {form} weights, which need SM {OLDEST_SMS[form]} or above, "
                f"not SM {older[0]}",
                "leave the older GPUs out with --sm, or export with int8 or int4 in the recipe's rules",
            )


def plugin_library(request: BuildRequest, bundle: Bundle) -> Path | None:
    """The plugin library, when the target uses one and the bundle has something for it.

    Raises:
        MissingDependency: there is none, the file is damaged or something else, or it has no kernels for a GPU of the
            target.
    """
    target, given = request.target, request.plugin_library
    if target.plugins == "off" or (target.plugins == "optional" and given is None):
        return None
    if given is not None:
        if not given.is_file():
            raise MissingDependency(f"{given}: no such plugin library", "moiie plugins build")
        kernels = library_kernels(given)
        problem = library_problem(given, _LOOKED_UP)
        if problem is not None:
            raise MissingDependency(f"{given}: no plugin library: the file {problem}", "moiie plugins build")
        _check_kernels(given, kernels, target)
        return given
    if bundle.model.moe is None and target.dialect != "trt10":
        return None
    raise MissingDependency(
        f"target {target.name}: needs the plugin library",
        "build it with `moiie plugins build`, then give it with --plugins; or use a target with plugins: off",
    )


def _check_kernels(library: Path, kernels: Kernels | None, target: Target) -> None:
    """What `moiie plugins build` wrote beside a library says which GPUs it has kernels for; without that nothing is known."""
    if kernels is None:
        return
    lost = [sm for sm in target.sms if not runs_kernels(sm, kernels.sms, kernels.portable)]
    if lost:
        raise MissingDependency(
            f"{library}: holds kernels for SM {', '.join(map(str, kernels.sms))}, target {target.name} wants {lost[0]}",
            f"moiie plugins build --sm {','.join(map(str, sorted({*kernels.sms, *lost})))}",
        )
