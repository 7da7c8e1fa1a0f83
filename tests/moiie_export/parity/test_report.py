"""Reports: truth, order, what is near, and what was left out."""

from __future__ import annotations

import json

import pytest

from moiie_export.parity.report import Check, Report, judge, left_out, tell


def report(*checks: Check) -> Report:
    return Report("bundle", "checkpoint", "float32", list(checks))


def test_a_report_is_true_when_something_ran_and_everything_passed() -> None:
    good, bad = judge("logits", "error", 1e-6, 2e-4), judge("logits", "error", 1e-3, 2e-4)
    assert report(good)
    assert report(good, left_out("case", "no room"))
    assert not report(good, bad)
    assert not report()
    assert not report(left_out("case", "no room")), "nothing was compared"


@pytest.mark.parametrize(
    ("metric", "value", "bound", "status"),
    [
        ("error", 0.0, 2e-4, "ok"),
        ("error", 1.5e-4, 2e-4, "near"),
        ("error", 2e-4, 2e-4, "near"),
        ("error", 3e-4, 2e-4, "FAIL"),
        ("error", float("nan"), 2e-4, "FAIL"),
        ("error", 0.0, 0.0, "ok"),
        ("agreement", 1.0, 1.0, "ok"),
        ("agreement", 0.995, 0.99, "near"),
        ("agreement", 0.98, 0.99, "FAIL"),
        ("tie share", 0.0, 0.01, "ok"),
        ("tie share", 0.0001, 0.01, "near"),
        ("tie share", 0.02, 0.01, "FAIL"),
        ("equal tokens", 9, 9, "ok"),
    ],
)
def test_status(metric: str, value: float, bound: float, status: str) -> None:
    assert judge("logits", metric, value, bound).status == status


def test_near_ties_of_text_pass_but_show() -> None:
    assert Check("text", "equal tokens", 5, 9, passed=True, note="a near tie").status == "near"


def test_the_first_failure_and_the_first_layer() -> None:
    manifest = tell("manifest", ["tokens.bos is 2, expected 1", "x"], where="tokens")
    hidden = judge("hidden states", "error", 0.5, 2e-4, where="layer 1", layer=1, case="picture", phase="prefill")
    later = judge("hidden states", "error", 0.9, 2e-4, where="layer 2", layer=2, case="picture", phase="prefill")
    found = report(tell("files", []), manifest, hidden, later)
    assert (found.first_failure, found.first_layer) == (manifest, hidden)
    assert found.verdict() == (
        "tokens: manifest differs: differences 2, bound 0 (tokens.bos is 2, expected 1 (and 1 more)); "
        "first in layer 1: picture: prefill hidden states differ: error 0.5, bound 0.0002"
    )
    assert report(hidden, later).verdict() == hidden.sentence()


def test_summary_puts_failures_beside_their_case_and_counts_them() -> None:
    def state(case: str, layer: int, value: float) -> Check:
        place = {"where": f"layer {layer}", "layer": layer, "case": case, "phase": "prefill"}
        return judge("hidden states", "error", value, 2e-4, **place)

    lines = (
        report(state("a", 0, 1e-6), state("a", 1, 0.5), state("a", 2, 0.7), state("b", 0, 1.5e-4))
        .summary()
        .splitlines()
    )
    assert [line.split()[0] for line in lines[1:3]] == ["near", "FAIL"]
    assert "b, layer 0" in lines[1]
    assert "a, layer 1 [2 fail]" in lines[2]
    assert "0.5" in lines[2]


def test_json_has_no_nan() -> None:
    document = report(judge("logits", "error", float("nan"), 2e-4), left_out("case", "no room")).to_dict()
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text)["checks"][0]["value"] == "NaN"
    assert [check["status"] for check in document["checks"]] == ["FAIL", "not run"]
    assert document["checks"][1]["note"] == "not run: no room"


@pytest.mark.parametrize("value", [1e-6, 0, float("nan"), float("inf"), None])
def test_a_check_comes_back_from_json(value: float | None) -> None:
    check = Check("logits", "error", value, 2e-4, False, where="layer 1", layer=1, case="a", phase="decode", note="n")
    back = Check.from_dict(json.loads(json.dumps(check.to_dict(), allow_nan=False)))
    assert back.to_dict() == check.to_dict()
    assert isinstance(back.value, type(value))
