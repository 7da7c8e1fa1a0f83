from __future__ import annotations

import numpy as np
import pytest

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError
from moiie_runtime.instance_routing import InstanceRouting
from moiie_runtime.sessions import Sessions
from tests.runtime import instance_bundle as made


@pytest.fixture
def routing(tmp_path):
    bundle = Bundle.open(made.write(tmp_path / "bundle"))
    graphs = made.Graphs()
    return InstanceRouting(bundle, bundle.instance_router, Sessions(bundle, graphs)), graphs


def test_a_batch_is_one_run_and_each_row_what_it_is_alone(routing):
    route, graphs = routing
    texts = ["What is this?", "Where is it", ""]
    together = route(texts)
    assert graphs.runs == {"router": 1}
    for text, found in zip(texts, together, strict=True):
        [alone] = route([text])
        np.testing.assert_array_equal(found.move_weights, alone.move_weights)
        np.testing.assert_array_equal(found.mole_index, alone.mole_index)
    assert found.move_weights.shape == (3,)
    assert found.mole_index.shape == (2,)
    assert found.contributions is None
    assert len({tuple(each.move_weights) for each in together}) == 3


def test_the_router_reads_the_beginning_of_a_long_question(routing):
    route, graphs = routing
    route(["what is this where it is what"])
    fed = graphs.fed["router"][-1]
    assert fed["input_ids"].tolist() == [[2, 4, 5, 6, 7, 3]]
    assert fed["attention_mask"].tolist() == [[1] * 6]


@pytest.mark.parametrize(
    ("name", "value"), [("move_weights", np.nan), ("mole_index", -1), ("mole_index", made.ADAPTERS)]
)
def test_choices_that_do_not_exist_are_refused(routing, monkeypatch, name, value):
    def broken(**feeds):
        outputs = real(**feeds)
        outputs[name][0, 0] = value
        return outputs

    real = made.route
    monkeypatch.setattr(made, "route", broken)
    with pytest.raises(MoiieError, match="router: gives weights .* and adapters .* 3 adapters in a layer"):
        routing[0](["What?"])


def test_a_missing_tokenizer_of_the_sentence_encoder_is_named(tmp_path):
    root = made.write(tmp_path / "bundle")
    (root / "sentence_encoder" / "tokenizer.json").unlink()
    bundle = Bundle.open(root)
    with pytest.raises(MoiieError, match=r"sentence_encoder/tokenizer\.json: cannot be read"):
        InstanceRouting(bundle, bundle.instance_router, Sessions(bundle, made.Graphs()))
