"""What a bundle says about choices that are made once for a request, by its instruction (spec mome.md, 1.2 and 1.3)."""

from __future__ import annotations

from dataclasses import dataclass

from moiie_runtime.fields import Fields


@dataclass(frozen=True)
class InstanceRouter:
    """The router that weighs the vision encoders and picks adapters.

    Attributes:
        component: its graph.
        tokenizer: its sentence encoder's tokenizer, a file of the bundle.
        max_length: word pieces of an instruction that it reads at most.
    """

    component: str
    tokenizer: str
    max_length: int


@dataclass(frozen=True)
class AdapterBanks:
    """Where the adapters beside the feed-forward networks lie.

    Attributes:
        file: a safetensors file of the bundle; `mole.{layer}.down_proj.weight` and so on hold all adapters of a layer.
        layers: decoder layers with adapters, in the order of the router's picks.
        num_experts: adapters of a layer.
    """

    file: str
    layers: tuple[int, ...]
    num_experts: int


def read_instance_router(top: Fields) -> InstanceRouter | None:
    """The section `instance_router`; None when the bundle has none.

    Raises:
        MoiieError: a key that is missing or wrong, or several vision experts or adapters without a router for them.
    """
    fields = top.optional_child("instance_router")
    if fields is None:
        for key in ("vision_experts", "adapters"):
            if top.data.get(key) is not None:
                raise top.error("instance_router", f"an object, because `{key}` is there")
        return None
    return InstanceRouter(
        component=fields.string("component"),
        tokenizer=fields.string("tokenizer"),
        max_length=fields.integer("max_length", 3, 65536),  # two special pieces and one of text
    )


def read_adapter_banks(top: Fields, num_hidden_layers: int) -> AdapterBanks | None:
    """The section `adapters`; None when the bundle has none.

    Raises:
        MoiieError: a key that is missing or wrong.
    """
    fields = top.optional_child("adapters")
    if fields is None:
        return None
    return AdapterBanks(
        file=fields.string("file"),
        layers=fields.integers("layers", 0, num_hidden_layers - 1),
        num_experts=fields.integer("num_experts", 1),
    )
