"""The decoder with adapters: against the authors' small LLaMA, and against a dense sum over all adapters."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from moiie_export.model.decoder import Decoder, DecoderOutput
from moiie_export.model.layers import Adapter
from moiie_export.model.mome.mole import Mole
from moiie_export.model.mome.router import MoleRouters
from moiie_export.mome_config import MoleConfig, MomeConfig
from tests import mome_official as official

STEPS, LAYERS = 8, (0, 1)


@dataclass
class Small:
    """The case's parts."""

    case: Any
    config: MomeConfig
    decoder: Decoder
    mole: Mole
    routers: MoleRouters
    table: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @property
    def embeds(self) -> torch.Tensor:
        """inputs_embeds [3, 15, H]: extra rows, then tokens."""
        return torch.cat([self.inputs["extra_embeds"], self.table[self.inputs["input_ids"].long()]], dim=1)

    def cache(self, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        text = self.config.text
        shape = (rows, text.num_key_value_heads, 15 + STEPS, text.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in LAYERS]

    def prompt(self, rows: torch.Tensor, adapters: list[Adapter | None] | None) -> DecoderOutput:
        past = torch.zeros(len(rows), dtype=torch.int64)
        output: DecoderOutput = self.decoder(rows, None, past, None, self.cache(len(rows)), adapters)
        return output

    @property
    def index(self) -> torch.Tensor:
        """Chosen adapters [3, 2]."""
        return self.routers(self.inputs["sentence_embedding"]).argmax(dim=-1)


@pytest.fixture(scope="module")
def small(mome_case: Any, golden_mome: Any) -> Small:
    case = mome_case("mole_llama")
    llm = json.loads((case.path / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    # this case's model was made in float32, its rotary tables too
    text = replace(golden_mome.config.text, **{name: llm[name] for name in names}, rotary_table="float32")
    about = case.about["arguments"]
    mole = MoleConfig(about["num_adapters"], about["bottleneck"], 384, LAYERS)
    config = replace(golden_mome.config, text=text, mole=mole)
    state = case.tensors("state_dict.safetensors")
    decoder, banks = Decoder(config), Mole(config)
    routers = MoleRouters(384, 384, len(LAYERS), mole.num_experts)
    official.fill(decoder, official.decoder(state))
    official.fill(banks, official.mole(state, LAYERS, mole.num_experts))
    official.fill(routers, official.mole_routers(state, LAYERS))
    table = state["model.embed_tokens.weight"]
    return Small(case, config, decoder, banks, routers, table, case.tensors("inputs.safetensors"))


def test_routes_equal_the_authors(small: Small) -> None:
    logits = small.routers(small.inputs["sentence_embedding"])
    for layer in LAYERS:
        small.case.close(logits[:, layer], f"mole.{layer}.router_logits")
        assert small.index[:, layer].tolist() == small.case.expected[f"mole.{layer}.expert"].tolist()
    assert small.index.tolist() == small.case.about["routes_sample_by_layer"]


def test_three_samples_with_their_own_adapters_equal_the_authors(small: Small) -> None:
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in small.decoder.layers
    ]
    output = small.prompt(small.embeds, small.mole.choose(small.index))
    for hook in hooks:
        hook.remove()
    for layer in LAYERS:
        small.case.close(seen[layer].view(3, 15, -1), f"mole.{layer}.input")
        small.case.close(output.adapted[layer], f"mole.{layer}.adapter_output")
        small.case.close(output.hidden[layer].view(3, 15, -1), f"hidden.{layer}")
    small.case.close(output.logits, "logits")


def test_greedy_ids_and_logits_of_every_step(small: Small) -> None:
    adapters = small.mole.choose(small.index)
    output = small.prompt(small.embeds, adapters)
    ids, taken = [], []
    for step in range(STEPS):
        taken.append(output.logits[:, -1])
        ids.append(taken[-1].argmax(dim=-1))
        past = torch.full((3,), 15 + step)
        output = small.decoder(small.table[ids[-1]].unsqueeze(1), None, past, None, output.present, adapters)
    assert torch.stack(ids, dim=1).tolist() == small.case.expected["greedy_ids"].tolist()
    small.case.close(torch.stack(taken, dim=1), "step_logits")


def test_rows_repeated_as_for_beams_keep_their_samples_adapters(small: Small) -> None:
    rows = small.embeds.repeat_interleave(2, dim=0)
    output = small.prompt(rows, small.mole.choose(small.index.repeat_interleave(2, dim=0)))
    small.case.close(output.logits[:, -1], "logits_rows_repeated_twice")


def test_one_adapter_shared_by_all_rows_of_a_request(small: Small) -> None:
    """What a runtime does with one request's beams: A = 1, any number of rows."""
    for sample in range(3):
        rows = small.embeds[sample : sample + 1].expand(4, -1, -1)
        output = small.prompt(rows, small.mole.choose(small.index[sample : sample + 1]))
        for row in output.logits:
            torch.testing.assert_close(row, small.case.expected["logits"][sample], atol=2e-4, rtol=1e-4)


def test_chosen_adapters_equal_the_one_hot_sum_over_all(small: Small) -> None:
    """Equation (9) as the authors run it: every adapter, times a one-hot of the argmax, with gain 1."""
    output = small.prompt(small.embeds, small.mole.choose(small.index))
    for layer in LAYERS:
        x, bank = small.case.expected[f"mole.{layer}.input"], small.mole[str(layer)]
        assert isinstance(bank, torch.nn.Module)
        one_hot = F.one_hot(small.index[:, layer], small.config.mole.num_experts).float()
        dense = torch.zeros_like(x)
        for expert in range(small.config.mole.num_experts):
            inner = F.relu(F.linear(x, bank.down_proj.weight[expert], bank.down_proj.bias[expert]))
            outer = F.linear(inner, bank.up_proj.weight[expert], bank.up_proj.bias[expert])
            dense += one_hot[:, expert, None, None] * bank.scale[expert] * outer
        torch.testing.assert_close(output.adapted[layer], dense, atol=1e-4, rtol=1e-4)


def test_layers_without_an_adapter_add_nothing(small: Small) -> None:
    config = replace(small.config, mole=replace(small.config.mole, layers=(1,)))
    mole = Mole(config)
    official.fill(mole, {f"1.{name}": value for name, value in small.mole["1"].state_dict().items()})
    first, second = mole.choose(small.index[:, 1:])
    assert first is None
    assert second is not None
    output = small.prompt(small.embeds, [first, second])
    assert len(output.adapted) == 1
    plain = small.prompt(small.embeds, None)
    assert plain.adapted == []
    assert torch.equal(plain.hidden[0], output.hidden[0])
    assert not torch.allclose(plain.hidden[1], output.hidden[1], atol=1e-2)


def test_a_list_of_the_wrong_length_is_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="shorter"):
        small.prompt(small.embeds, small.mole.choose(small.index)[:1])


def test_a_float32_residual_stream_behind_weights_in_half_precision(small: Small) -> None:
    """Spec 3, precision: embeddings or adapters in float32 keep the stream in float32, and nearer to the truth."""
    half, adapters = copy.deepcopy(small.decoder).to(torch.bfloat16), small.mole.choose(small.index)
    low = [adapter and Adapter(*(leaf.to(torch.bfloat16) for leaf in adapter)) for adapter in adapters]
    exact = small.prompt(small.embeds, adapters)
    past = torch.zeros(3, dtype=torch.int64)
    cache = [(key.to(torch.bfloat16), value.to(torch.bfloat16)) for key, value in small.cache(3)]

    def run(rows: torch.Tensor, chosen: Any, kind: torch.dtype) -> float:
        output = half(rows, None, past, None, cache, chosen)
        assert output.hidden[-1].dtype == kind
        assert output.logits.dtype == torch.bfloat16
        return float((output.hidden[-1].float() - exact.hidden[-1]).pow(2).mean().sqrt())

    wide = run(small.embeds, adapters, torch.float32)
    official_flow = run(small.embeds.to(torch.bfloat16), adapters, torch.float32)
    narrow = run(small.embeds.to(torch.bfloat16), low, torch.bfloat16)
    assert wide < narrow
    assert official_flow < narrow
    assert narrow < 0.1
