"""`moiie run` on golden cases: the answer, the JSON document, the saved tensors, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moiie_runtime
from moiie_runtime.tensors import TensorFile
from tests.cli.conftest import Moiie
from tests.conftest import GoldenCase
from tests.runtime import instance_bundle

CASE = GoldenCase("moiie_phi3")
QUESTION = "What is shown in the picture?"
TOKENS = [int(each) for each in CASE.expected["generated_ids"]]


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("moiie_phi3")


def ask(bundle: Path, *more: object, prompt: str = QUESTION) -> list[object]:
    return ["run", bundle, "-i", CASE.images[0], "-p", prompt, "--max-new-tokens", len(TOKENS), *more]


def test_json_is_one_document_with_the_golden_tokens(moiie: Moiie, bundle: Path) -> None:
    result = moiie(*ask(bundle, "--json"))
    assert result.code == 0
    document = result.document
    assert document["token_ids"] == TOKENS
    assert (document["prompt_tokens"], document["image_tokens"]) == (len(CASE.expected["token_type_ids"]), 729)
    assert document["finish_reason"] == "length"
    assert document["prefill_seconds"] > 0
    assert document["decode_tokens_per_second"] > 0
    assert set(document) == {
        "text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason", "prefill_seconds",
        "decode_tokens_per_second",
    }  # fmt: skip


def test_stdout_holds_the_text_alone(moiie: Moiie, bundle: Path) -> None:
    text = moiie(*ask(bundle, "--json")).document["text"]
    streamed = moiie(*ask(bundle))
    assert (streamed.code, streamed.out) == (0, text + "\n")
    assert "predicted memory: " in streamed.err
    assert f"{len(TOKENS)} new tokens" in streamed.err
    assert moiie(*ask(bundle, "--routing")).out == text + "\n"


@pytest.mark.parametrize("prompt", [f"<image>\n{QUESTION}", QUESTION])
def test_a_marker_in_the_question_is_honoured_else_the_picture_comes_first(
    moiie: Moiie, bundle: Path, prompt: str
) -> None:
    assert moiie(*ask(bundle, "--json", prompt=prompt)).document["token_ids"] == TOKENS


def test_a_raw_prompt_is_used_as_it_is(moiie: Moiie, bundle: Path) -> None:
    whole = (CASE.path / "inputs" / "prompt.txt").read_bytes()
    assert moiie(*ask(bundle, "--json", "--raw", prompt=whole.decode())).document["token_ids"] == TOKENS
    assert moiie(*ask(bundle, "--json", "--raw", prompt="-"), stdin=whole).document["token_ids"] == TOKENS


def test_the_question_from_standard_input_loses_its_last_line_end(moiie: Moiie, bundle: Path) -> None:
    for end in ("", "\n", "\r\n"):
        result = moiie(*ask(bundle, "--json", prompt="-"), stdin=(QUESTION + end).encode())
        assert result.document["token_ids"] == TOKENS


def test_saved_outputs_are_the_golden_numbers(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert moiie(*ask(bundle, "--json", "--save-outputs", path, "--all-logits", "--routing")).code == 0
    saved = TensorFile(path)
    expected, length = CASE.expected, len(CASE.expected["token_type_ids"])
    assert saved["prefill_logits"].shape[0] == length
    np.testing.assert_allclose(saved["prefill_logits"][-8:], expected["prefill_logits"], **CASE.tolerance)
    np.testing.assert_allclose(saved["step_logits"], expected["step_logits"], **CASE.tolerance)
    for layer in (1, 3):
        np.testing.assert_array_equal(saved[f"expert_ids.{layer}"][:length], expected[f"moe.{layer}.experts"])
        np.testing.assert_allclose(
            saved[f"expert_weights.{layer}"][:length], expected[f"moe.{layer}.weights"], **CASE.tolerance
        )
        assert saved[f"expert_ids.{layer}"].shape == (length + len(TOKENS) - 1, 2)


def test_without_all_logits_only_the_last_position_is_saved(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    moiie(*ask(bundle, "--save-outputs", path))
    saved = TensorFile(path)
    assert sorted(saved) == ["prefill_logits", "step_logits"]
    assert saved["prefill_logits"].shape == (1, saved["step_logits"].shape[1])
    np.testing.assert_array_equal(saved["prefill_logits"][0], saved["step_logits"][0])


def test_routing_statistics_count_every_choice(moiie: Moiie, bundle: Path) -> None:
    rows = moiie(*ask(bundle, "--json", "--routing")).document["routing"]
    experts = CASE.expected["moe.1.experts"]
    vision = CASE.expected["vision_mask"].astype(bool)
    found = {row["expert"]: row["tokens"] for row in rows if (row["layer"], row["modality"]) == (1, "vision")}
    assert found == {expert: int((experts[vision] == expert).sum()) for expert in range(4)}
    language = [row for row in rows if row["modality"] == "language"]
    assert all(row["tokens"] == 0 for row in language if row["expert"] == 0)


def test_sampling_repeats_with_its_seed(moiie: Moiie, bundle: Path) -> None:
    def tokens(*more: object) -> list[int]:
        found: list[int] = moiie(*ask(bundle, "--json", "--temperature", 1.5, *more)).document["token_ids"]
        return found

    assert tokens("--seed", 1) == tokens("--seed", 1)
    assert tokens("--seed", 1) != tokens("--seed", 2)
    assert tokens("--top-k", 1) == TOKENS


def test_beams_answer_as_the_runtime_does(moiie: Moiie, bundle: Path) -> None:
    options = ("--num-beams", 3, "--repetition-penalty", 1.5, "--length-penalty", -1)
    with moiie_runtime.load(bundle, threads=1) as vlm:
        expected = vlm.generate(
            [{"role": "user", "content": [CASE.images[0], QUESTION]}],
            max_new_tokens=len(TOKENS),
            num_beams=3,
            repetition_penalty=1.5,
            length_penalty=-1.0,
        )
    result = moiie(*ask(bundle, "--json", *options))
    assert result.document["token_ids"] == list(expected.token_ids) != TOKENS
    assert "step_logits" not in result.document
    assert moiie(*ask(bundle, *options)).out == expected.text + "\n"


def test_steps_of_beams_are_not_saved(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert moiie(*ask(bundle, "--num-beams", 2, "--save-outputs", path)).code == 0
    assert sorted(TensorFile(path)) == ["prefill_logits"]


def test_beams_and_one_beam_as_the_bundle_and_the_options_say(moiie: Moiie, bundle: Path, tmp_path: Path) -> None:
    root = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
    manifest["generation"] |= {"num_beams": 4, "repetition_penalty": 1.5}
    (root / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    given = moiie(*ask(bundle, "--json", "--num-beams", 4, "--repetition-penalty", 1.5)).document["token_ids"]
    assert moiie(*ask(root, "--json")).document["token_ids"] == given
    greedy = ("--num-beams", 1, "--repetition-penalty", "1.0")
    assert moiie(*ask(root, "--json", *greedy)).document["token_ids"] == TOKENS


def test_predicted_memory_counts_beams(moiie: Moiie, bundle: Path) -> None:
    def cache(*more: object) -> str:
        return moiie(*ask(bundle, *more)).err.split("kv cache ")[1].split(",")[0]

    assert cache("--num-beams", 2) != cache()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--num-beams", 3, "--temperature", 0.5], "num_beams=3 and do_sample=True exclude each other"),
        (["--num-beams", 3, "--routing"], "routing cannot be recorded with num_beams=3"),
        (["--length-penalty", 2], "length_penalty=2.0 has no effect with num_beams=1"),
        (["--num-beams", 2, "--length-penalty", "nan"], "length_penalty must be a number from -10 to 10"),
    ],
)
def test_beams_refuse_what_does_not_go_with_them(moiie: Moiie, bundle: Path, options: list[object], error: str) -> None:
    result = moiie(*ask(bundle, *options))
    assert (result.code, result.out) == (1, "")
    assert error in result.error


def test_stop_ends_before_its_text(moiie: Moiie, bundle: Path) -> None:
    text = moiie(*ask(bundle, "--json")).document["text"]
    stop = text[len(text) // 2 :][:2]
    document = moiie(*ask(bundle, "--json", "--stop", stop)).document
    assert document["finish_reason"] == "stop_string"
    assert document["text"] == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-p", ""], "-p: the prompt is empty"),
        (["-p", " \n"], "-p: the prompt is empty"),
        (["-p", "-"], "standard input: the prompt is empty"),
        (["-p", "a \udcff"], "-p: the prompt is not UTF-8 text"),
        (["-p", "what <image>?"], "`<image>`"),
        (["-p", "<image> a", "-i", "IMAGE", "-i", "IMAGE"], "2 pictures"),
        (["-p", "a", "-i", "nowhere.png"], "nowhere.png"),
        (["-p", "a", "-i", "TEXT"], "is not a picture"),
        (["-p", "a", "--max-new-tokens", "5000"], "4096"),
        (["-p", "a", "--save-outputs", "nowhere/x.safetensors"], "there is no directory nowhere"),
        (["-p", "a", "--raw", "--instruction", "a"], "no instance router reads an instruction"),
    ],
)
def test_refusals_before_anything_runs(
    moiie: Moiie, bundle: Path, tmp_path: Path, arguments: list[str], error: str
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture", encoding="utf-8")
    replaced = [{"IMAGE": str(CASE.images[0]), "TEXT": str(text)}.get(each, each) for each in arguments]
    result = moiie("run", bundle, *replaced, "--json")
    assert (result.code, result.out) == (1, "")
    assert error in result.error
    assert result.hint


def test_a_memory_limit_is_obeyed_before_anything_loads(moiie: Moiie, bundle: Path) -> None:
    result = moiie(*ask(bundle, "--memory-limit", "1MiB"))
    assert (result.code, result.out) == (4, "")
    assert "exceeds the limit of 1.0 MiB" in result.error


def test_no_bundle(moiie: Moiie, tmp_path: Path) -> None:
    result = moiie("run", tmp_path / "none", "-p", "a")
    assert (result.code, result.error) == (1, f"{tmp_path / 'none'}: no such bundle")
    assert "moiie export" in result.hint


RAW_MOME = "USER: <Img><image></Img>\x1eWhat is this? ASSISTANT: "


@pytest.mark.parametrize(
    "words",
    [["-p", "What is this?"], ["-p", RAW_MOME, "--raw", "--instruction", "What is this?"]],
    ids=["question", "raw prompt"],
)
def test_json_tells_what_the_instruction_chose(
    moiie: Moiie, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    root, graphs = instance_bundle.write(tmp_path / "bundle"), instance_bundle.Graphs()
    monkeypatch.setattr("moiie_runtime.vlm.get_backend", lambda _: lambda *_, component, **__: graphs(component))
    document = moiie("run", root, "-i", CASE.images[0], "--json", *words).document
    with moiie_runtime.load(root) as vlm:
        expected = vlm.generate([{"role": "user", "content": [CASE.images[0], "What is this?"]}])
    assert expected.move_weights is not None
    assert expected.mole_index is not None
    assert document["token_ids"] == list(expected.token_ids)
    assert document["move_weights"] == expected.move_weights.tolist()
    assert document["mole_index"] == expected.mole_index.tolist()


def test_a_raw_prompt_alone_does_not_tell_the_instruction(moiie: Moiie, tmp_path: Path) -> None:
    root = instance_bundle.write(tmp_path / "bundle")
    result = moiie("run", root, "-i", CASE.images[0], "-p", RAW_MOME, "--raw")
    assert (result.code, result.out) == (1, "")
    assert "chooses its experts by the instruction" in result.error
    assert "--instruction" in result.hint


def test_json_of_other_bundles_has_no_such_keys(moiie: Moiie, bundle: Path) -> None:
    assert not {"move_weights", "mole_index"} & set(moiie(*ask(bundle, "--json", "--max-new-tokens", 1)).document)
