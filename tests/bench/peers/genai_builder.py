"""onnxruntime-genai's model builder for Llama, and for Mixtral, which it does not know but has all parts of."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_OPTIONS = (
    "int4_block_size=32",
    "int4_is_symmetric=true",
    "int4_accuracy_level=4",
    "qmoe_block_size=32",
    "hf_remote=false",
)


def build(checkpoint: Path, target: Path) -> None:
    """Write an int4 model for the CPU into `target`."""
    package = find_spec("onnxruntime_genai")
    assert package is not None
    assert package.origin is not None
    sys.path.insert(0, str(Path(package.origin).parent / "models"))  # the builder imports its parts from there
    import builder

    cache = str(target / "cache")
    name, arguments = str(checkpoint), ("int4", "cpu", cache)
    options = builder.parse_extra_options(name, name, str(target), *arguments, list(_OPTIONS))
    details = options.get("hf_details", {}).get("hf_config")
    if details is not None and details.model_type == "mixtral":
        # The builder chooses by architecture; as a Llama with another class it also gets a known type in genai_config.
        details.architectures = ["LlamaForCausalLM"]
        builder.LlamaModel = _mixtral(builder.LlamaModel)
    builder.create_model(name, name, str(target), *arguments, **options)


def _mixtral(base: Any) -> Any:
    """The builder's Llama with experts in place of its feed-forwards."""

    class Mixtral(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.moe_attrs |= {"activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": True}
            self.moe_intermediate_size = self.intermediate_size

        def get_moe_module(self, layer_id: int, layer: Any) -> Any:
            return getattr(layer, "block_sparse_moe", None) or layer.mlp

        def make_moe_preprocessing(self, layer_id: int, moe: Any, root_input: str) -> None:
            moe.gate.exclude_from_quantization = True
            self.make_interleaved_swiglu_moe_preprocessing(layer_id, moe)

        def make_moe_router(self, layer_id: int, moe: Any, root_input: str) -> None:
            place = f"/model/layers.{layer_id}/moe/router"
            product = self.make_matmul(moe.gate, f"{place}/MatMul", root_input)
            rows = f"/model/constants/INT64/{[-1, self.moe_attrs['num_experts']]}"
            inputs = [f"{product}/output_0", rows]
            self.make_reshape(f"{place}/Reshape", inputs, dtype=self.io_dtype, shape=self.make_moe_router_shape())

        def make_moe_subgraph(self, layer_id: int, moe: Any, root_input: str, *_: Any) -> None:
            place, names = f"/model/layers.{layer_id}/moe", self.make_moe_expert_names(layer_id)
            self.make_moe_op(
                f"{place}/QMoE",
                root_input=root_input,
                router_probs=f"{place}/router/Reshape/output_0",
                weight1=names["gate_up_weight"],
                scales1=names["gate_up_scales"],
                weight2=names["down_weight"],
                scales2=names["down_scales"],
            )
            self.layernorm_attrs["skip_input"] = f"{place}/QMoE/output_0"

        def make_node(self, op_type: str, *arguments: Any, **attributes: Any) -> Any:
            """With the accuracy level that the builder sets on MatMulNBits only: int8 activations."""
            more = {"accuracy_level": 4} if op_type == "QMoE" else {}
            return super().make_node(op_type, *arguments, **attributes, **more)

    return Mixtral
