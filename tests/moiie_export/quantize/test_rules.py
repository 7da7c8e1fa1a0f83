"""Rules against weights: order, splitting of stacks, and every mistake at once with what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import pytest

from moiie_export.quantize.rules import Form, Resolved, resolve
from moiie_export.quantize.scheme import Scheme
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_runtime.errors import Unsound
from tests.conftest import GoldenCase

INT4, INT8 = (Form(name, Scheme(name, 32), "rtn") for name in ("int4", "int8"))
GATE_UP, DOWN = "decoder.layers.1.mlp.experts.gate_up_proj", "decoder.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def source() -> Iterator[ModelSource]:
    """MoIIE of 4 layers: rows of 32, of 48 in down_proj, of 16 and fewer in the tower."""
    with ModelSource.open(GoldenCase("moiie_phi3").checkpoint) as source:
        yield source


def resolved(source: ModelSource, *rules: QuantRule, dtype: str = "float32") -> Resolved:
    return resolve(QuantizationSection(rules), dtype, source.weight_map, source.config)


def rule(match: str | tuple[str, ...], kind: str = "int4", **settings: object) -> QuantRule:
    patterns = (match,) if isinstance(match, str) else match
    return QuantRule(patterns, kind, **settings)  # type: ignore[arg-type]


def test_without_rules_everything_is_as_export_dtype_says(source: ModelSource) -> None:
    found = resolved(source, dtype="float16")
    assert found.weight_map == source.weight_map
    assert {form.format for form in found.forms.values()} == {"float16", "float32"}
    kept = {weight.name for weight in source.weight_map.weights if weight.keep_float32}
    assert {name for name, form in found.forms.items() if form.format == "float32"} == kept


def test_the_first_match_decides(source: ModelSource) -> None:
    found = resolved(
        source, rule("*.layers.2.self_attn.o_proj.weight", "float16"), rule("*qkv*", "int8"), rule("attention")
    )
    forms = {name.partition("self_attn.")[2]: [] for name in found.forms if "decoder" in name and "self_attn" in name}
    for name, form in found.forms.items():
        if name.startswith("decoder") and "self_attn" in name:
            forms[name.partition("self_attn.")[2]].append(form)
    assert forms == {"qkv_proj.weight": [INT8] * 4, "o_proj.weight": [INT4, INT4, Form("float16"), INT4]}
    assert set(found.schemes.values()) == {INT4.scheme, INT8.scheme}


def test_a_stack_whose_experts_agree_stays_one_tensor(source: ModelSource) -> None:
    found = resolved(source, rule("*gate_up_proj"))
    assert found.forms[GATE_UP] == INT4
    assert found.weight_map == source.weight_map


def test_a_stack_whose_experts_differ_is_taken_apart(source: ModelSource) -> None:
    """One after another in its place, with the same parameters, parts and numbers in all."""
    names = [f"decoder.layers.1.mlp.experts.{expert}.gate_up_proj" for expert in range(4)]
    rules = [rule("*.layers.1.*.1.gate_up_proj", "float32"), rule("*.layers.1.*.2.gate_up_proj", "int8")]
    found = resolved(source, *rules, rule("*.layers.1.*gate_up_proj"), dtype="float16")
    order = [weight.name for weight in found.weight_map.weights]
    at = order.index(names[0])
    assert order[at : at + 4] == names
    assert GATE_UP not in order
    assert [found.forms[name] for name in names] == [INT4, Form("float32"), INT8, INT4]
    assert found.forms[DOWN] == Form("float16")
    before, after = source.weight_map.by_parameter(), found.weight_map.by_parameter()
    assert {name: shape for name, (_, _, shape) in before.items()} == {name: each[2] for name, each in after.items()}
    stack = next(weight for weight in source.weight_map.weights if weight.name == GATE_UP)
    split = [weight for weight in found.weight_map.weights if weight.name in names]
    assert tuple(part for weight in split for part in weight.parts) == stack.parts
    assert all(sum(prod(part.used_shape) for part in weight.parts) == prod(weight.shape) for weight in split)


def test_experts_have_no_form_that_rounds_activations(source: ModelSource) -> None:
    with pytest.raises(
        Unsound, match=r"match '\*': decoder\..*\.experts\..*: experts have no w8a8 form; put a rule for"
    ):
        resolved(source, rule("*", "w8a8"))
    assert resolved(source, rule("experts", "float16"), rule("*", "w8a8")).forms[GATE_UP] == Form("float16")
    assert resolved(source, rule("experts", "fp8")).forms[GATE_UP] == Form("fp8", Scheme("fp8"), "rtn")


def test_what_cannot_be_quantised_is_passed_over(source: ModelSource) -> None:
    """So that a rule for everything can stand last."""
    found = resolved(source, rule(("*down_proj*", "vision_*"), "float16"), rule("*"), rule("embed_tokens", "float16"))
    quantized = {name for name, form in found.forms.items() if form.scheme is not None}
    assert quantized == {name for name in found.forms if name.startswith("decoder") and _is_matrix(name)}
    assert found.forms["embed_tokens.weight"] == Form("float16")
    assert found.forms["decoder.norm.weight"] == Form("float32")


def _is_matrix(name: str) -> bool:
    return any(part in name for part in ("qkv_proj", "o_proj", "gate_up_proj", "lm_head"))


def test_a_rule_that_matches_nothing(source: ModelSource) -> None:
    with pytest.raises(Unsound) as caught:
        resolved(source, rule("decoder.layers.*.self_atn.*"), rule("decoder.lm_haed.weight"))
    assert caught.value.message.splitlines()[1].startswith(
        "quantization.rules[1]: match 'decoder.lm_haed.weight': no weight; nearest names: decoder.lm_head.weight, "
    )
    assert "banks of this model: vision_experts, shared_experts, language_experts, dense, attention" in str(
        caught.value
    )


def test_a_bank_that_this_model_lacks(source: ModelSource) -> None:
    with pytest.raises(Unsound, match=r"rules\[0\]: match 'adt': no weight"):
        resolved(source, rule("adt"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule("*norm*")], "match '*norm*': only what is never quantised (17 weights: biases, norms)"),
        ([rule("decoder.layers.1.mlp.gate*.weight")], "only what is never quantised (2 weights: gates)"),
        ([rule("embed_tokens.*")], "only what is never quantised (1 weights: embed_tokens)"),
        ([rule("*position_embedding*", "float16")], "only what is always float32 (1 weights: vision_tower)"),
        (
            [rule("attention"), rule("*.o_proj.*", "int8")],
            "rules[1]: match '*.o_proj.*': earlier rules decide about all",
        ),
        (
            [rule("attention", group_size=64)],
            "group_size 64 does not divide the rows of 32 of decoder.layers.0.self_attn",
        ),
        ([rule("attention", group_size=64)], "and 7 more; groups that do: 32"),
        ([rule("*down_proj")], "rows of 48 of decoder.layers.1.mlp.experts.0.down_proj and 7 more; no group does"),
    ],
)
def test_a_rule_that_cannot_be(source: ModelSource, rules: list[QuantRule], message: str) -> None:
    with pytest.raises(Unsound) as caught:
        resolved(source, *rules)
    assert message in caught.value.message


def test_all_mistakes_are_reported_at_once(source: ModelSource) -> None:
    with pytest.raises(Unsound) as caught:
        resolved(source, rule("no.such"), rule("gates*", "int8"), rule("dense", group_size=128))
    lines = caught.value.message.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"quantization.rules[{i}]" for i in (0, 1, 2, 2)]
