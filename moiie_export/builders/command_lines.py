"""The builder's work as command lines of NVIDIA's own tools, for readers who want to try variations."""

from __future__ import annotations

from collections.abc import Iterator

from moiie_export.builders.engine_specs import EngineSpec
from moiie_export.targets import Target
from moiie_runtime.bundle import Bundle


def command_lines(bundle: Bundle, target: Target, specs: list[EngineSpec]) -> Iterator[str]:
    """One line an engine: polygraphy for RTX, trtexec for full TensorRT.

    They read the graphs that `moiie build --keep-graphs` leaves in engines/<target>/graphs.
    """
    for spec in specs:
        shapes = [_profile_shapes(bundle, target, spec, which) for which in range(3)]
        plugins = _has_plugins(bundle, target, spec)
        if target.backend == "tensorrt_rtx" and plugins:
            yield f"# {spec.component}: Polygraphy finds none of our plugins for RTX; only `moiie build` builds it"
        elif target.backend == "tensorrt_rtx":
            yield _polygraphy(target, spec, shapes)
        else:
            yield _trtexec(target, spec, shapes, plugins)


def _has_plugins(bundle: Bundle, target: Target, spec: EngineSpec) -> bool:
    """Whether the graph has nodes that the plugin library computes: experts, and for TensorRT 10 the KV cache."""
    moe = bundle.model.moe is not None
    return target.plugins == "required" and spec.component.startswith("decoder_") and (moe or target.dialect == "trt10")


def _profile_shapes(bundle: Bundle, target: Target, spec: EngineSpec, which: int) -> list[dict[str, list[int]]]:
    """Per profile the smallest (0), best (1) or largest (2) shape of each input with an open dimension."""
    fixed = {"batch": target.batch, "kept": 1, "adapters": target.batch, "texts": 1}
    profiles = []
    for profile in spec.profiles:
        sizes = {**fixed, **{name: bounds[which] for name, bounds in profile.sizes.items()}}
        shapes = {}
        for name, tensor in bundle.components[spec.component].inputs.items():
            if any(dim in profile.sizes for dim in tensor.shape):
                shapes[name] = [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape]
        profiles.append(shapes)
    return profiles


def _polygraphy(target: Target, spec: EngineSpec, shapes: list[list[dict[str, list[int]]]]) -> str:
    words = ["POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert", f"graphs/{spec.component}.onnx", "-o", spec.file]
    words += ["--compute-capabilities", *(f"{sm / 10:.1f}" for sm in target.sms)]
    for profile in range(len(spec.profiles)):
        for option, per_profile in zip(("min", "opt", "max"), shapes, strict=True):
            if per_profile[profile]:
                given = (f"{name}:[{','.join(map(str, shape))}]" for name, shape in per_profile[profile].items())
                words += [f"--trt-{option}-shapes", *given]
    return " ".join(words)


def _trtexec(target: Target, spec: EngineSpec, shapes: list[list[dict[str, list[int]]]], plugins: bool) -> str:
    words = ["trtexec", f"--onnx=graphs/{spec.component}.onnx", f"--saveEngine={spec.file}", "--stronglyTyped"]
    words.append("--timingCacheFile=timing.cache")
    if plugins:
        words.append("--dynamicPlugins=libmoiie_plugins.so")
        words += ["--setPluginsToSerialize=libmoiie_plugins.so"] if target.embed_plugins else []
        words += ["--preview=+aliasedPluginIO1003"] if target.dialect == "trt10" else []
    for profile in range(len(spec.profiles)):
        if not shapes[0][profile]:
            continue
        if len(spec.profiles) > 1:
            words.append(f"--profile={profile}")
        for option, per_profile in zip(("min", "opt", "max"), shapes, strict=True):
            given = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in per_profile[profile].items())
            words.append(f"--{option}Shapes={given}")
    return " ".join(words)
