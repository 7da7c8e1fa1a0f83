"""The TensorRT backend on an emulated GPU: the answers are those of the bundle's own graphs, and nothing is left behind."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moiie_runtime as mr
from moiie_runtime.backends import tensorrt
from moiie_runtime.backends.device import on_host, stored
from moiie_runtime.backends.expert_banks import ExpertBanks
from moiie_runtime.backends.onnxruntime import OnnxRuntimeSession
from moiie_runtime.backends.tensorrt_context import Execution
from moiie_runtime.errors import MissingDependency, MoiieError, Unsound
from moiie_runtime.strict_files import sha256_file
from tests.runtime.backends.engine_bundle import edit, write_plans

PICTURE = Path(__file__).parents[2] / "golden" / "moiie_phi3" / "inputs" / "image_0.png"
TEXT = [{"role": "user", "content": "How many corners does a square have?"}]
SHORT = [{"role": "user", "content": "Describe."}]
PICTURED = [{"role": "user", "content": [PICTURE, "What is shown in the picture?"]}]
RECORD = mr.Record(prefill_logits="last", step_logits=True, routing=True)


PRECISION = {"rtx": ("float16", 256), "small": ("float16", 256), "four": ("bfloat16", 256), "copying": ("float16", 64)}
"""Target -> what it stores numbers in, and the tokens that go through at once."""


class Rounded(OnnxRuntimeSession):
    """The bundle's own graph, with what an engine takes, gives and keeps rounded to half precision."""

    dtype = "float16"

    def run(self, feeds, outputs=None):
        found = super().run({name: self._rounded(array) for name, array in feeds.items()}, outputs)
        for name, array in self._bound.items():
            if name.startswith("present."):
                array[:] = self._rounded(array)
        return {name: self._rounded(array) if name == "image_features" else array for name, array in found.items()}

    def _rounded(self, array):
        if array.dtype.kind != "f":
            return array
        return on_host(stored(array, self.dtype), self.dtype).astype(np.float32)


@pytest.fixture(scope="module")
def answers(engine_bundle):
    """What the bundle's own graphs answer when numbers are rounded as a target does it."""
    known = {}
    bundle = mr.Bundle.open(engine_bundle)

    def opened(dtype, chunk):
        kind = type("Kind", (Rounded,), {"dtype": dtype})

        def open_session(component):
            return kind(bundle.path(bundle.components[component].file), component=component, threads=1)

        return mr.VLM(replace(bundle, prefill_chunk=chunk), open_session)

    models = {key: opened(*key) for key in set(PRECISION.values())}

    def answer(target, messages, **settings):
        key = (PRECISION[target], str(messages), *settings.items())
        if key not in known:
            record = RECORD if settings.get("num_beams", 1) == 1 else mr.Record()
            known[key] = models[PRECISION[target]].generate(messages, record=record, **settings)
        return known[key]

    yield answer
    for model in models.values():
        model.close()


def load(bundle: Path, target: str, **options):
    return mr.load(bundle, target=target, threads=1, **options)


def close_to(found: mr.Generation, wanted: mr.Generation) -> None:
    """The same tokens, from the same numbers but for the order of sums."""
    assert found.token_ids == wanted.token_ids
    np.testing.assert_allclose(found.step_logits, wanted.step_logits, atol=1e-3)
    np.testing.assert_array_equal(found.prefill_logits[-1], found.step_logits[0])


@pytest.mark.parametrize("target", ["rtx", "copying"])
def test_answers_are_those_of_the_portable_graphs(trt, engine_bundle, answers, target):
    """Pictures, texts, several requests; KV buffers updated in place and not."""
    with load(engine_bundle, target) as vlm:
        for messages in (PICTURED, TEXT, SHORT):
            close_to(
                vlm.generate(messages, max_new_tokens=6, record=RECORD), answers(target, messages, max_new_tokens=6)
            )
    assert not any(trt.cuda.left.values())


def test_routing_is_that_of_the_portable_graphs(trt, engine_bundle, answers):
    with load(engine_bundle, "rtx") as vlm:
        found = vlm.generate(PICTURED, max_new_tokens=3, record=RECORD).routing
    wanted = answers("rtx", PICTURED, max_new_tokens=3).routing
    for layer, routing in wanted.prefill.items():
        np.testing.assert_array_equal(found.prefill[layer].expert_ids, routing.expert_ids)
        np.testing.assert_array_equal(found.decode[layer].expert_ids, wanted.decode[layer].expert_ids)


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65, 256, 257, 300])
def test_a_prefill_runs_in_the_smallest_profile_that_holds_it(trt, engine_bundle, tokens):
    with load(engine_bundle, "rtx") as vlm:
        prompt = vlm.processor.from_text("x" * 400, ())
        prompt = _cut(prompt, tokens)
        vlm.generate_prompt(prompt, max_new_tokens=1)
    whole, rest = divmod(tokens, 256)
    smallest = next(index for index, size in enumerate((8, 64, 256)) if rest <= size)
    assert trt.chosen == [2] * whole + [smallest] * bool(rest)


def _cut(prompt, length):
    assert prompt.length >= length
    return replace(
        prompt, input_ids=prompt.input_ids[:length], token_modality=prompt.token_modality[:length], length=length
    )


def test_decode_is_recorded_once_a_request_and_launched(trt, engine_bundle, answers):
    with load(engine_bundle, "rtx") as vlm:
        for request in (1, 2):
            close_to(vlm.generate(TEXT, max_new_tokens=6, record=RECORD), answers("rtx", TEXT, max_new_tokens=6))
            assert trt.cuda.calls["cuStreamBeginCapture"] == request
            assert trt.cuda.calls["cuGraphLaunch"] == 4 * request  # five steps; the first of new addresses is not


def test_a_recording_outlives_requests_whose_buffers_lie_alike(trt, engine_bundle, answers):
    trt.cuda.reuse = True
    with load(engine_bundle, "rtx") as vlm:
        for _ in range(3):
            close_to(vlm.generate(TEXT, max_new_tokens=6, record=RECORD), answers("rtx", TEXT, max_new_tokens=6))
    assert trt.cuda.calls["cuStreamBeginCapture"] <= 3
    assert not any(trt.cuda.left.values())


@pytest.mark.parametrize("reason", ["foretold", "found"])
def test_without_a_recording_it_goes_on(trt, engine_bundle, answers, caplog, reason):
    if reason == "foretold":
        trt.capturable = False
    else:
        trt.capture_fails = True
    with load(engine_bundle, "rtx") as vlm, caplog.at_level(logging.WARNING):
        for _ in range(2):
            close_to(vlm.generate(TEXT, max_new_tokens=6, record=RECORD), answers("rtx", TEXT, max_new_tokens=6))
    assert [record.message.count("no CUDA graph") for record in caplog.records] == [1]
    assert not trt.cuda.calls["cuGraphLaunch"]


def test_two_answers_taking_turns_are_both_right(trt, engine_bundle, answers):
    with load(engine_bundle, "rtx") as vlm:
        streams = [vlm.stream(messages, max_new_tokens=6) for messages in (TEXT, SHORT)]
        pieces = list(zip(*streams, strict=True))
    for index, messages in enumerate((TEXT, SHORT)):
        found = tuple(chunk[index].token_ids[0] for chunk in pieces)
        assert found == answers("rtx", messages, max_new_tokens=6).token_ids


def test_a_prefill_between_two_steps_moves_what_steps_work_in(trt, engine_bundle, answers):
    with load(engine_bundle, "small") as vlm:
        steps = vlm.stream(TEXT, max_new_tokens=6)
        tokens = [next(steps).token_ids[0] for _ in range(4)]
        assert trt.cuda.calls["cuGraphLaunch"] == 2
        vlm.generate(SHORT, max_new_tokens=1)
        tokens += [chunk.token_ids[0] for chunk in steps]
    assert tuple(tokens) == answers("small", TEXT, max_new_tokens=6).token_ids


def test_vision_leaves_the_device_after_the_prefill(trt, engine_bundle, answers):
    with load(engine_bundle, "small") as vlm:
        sessions, banks = vlm._decoder._sessions, vlm._options.shared.banks
        for messages in (PICTURED, PICTURED, TEXT):
            steps = vlm.stream(messages, max_new_tokens=3)
            next(steps)
            assert "vision_encoder" not in sessions.opened
            while_decoding = banks.nbytes
            list(steps)
            close_to(
                vlm.generate(messages, max_new_tokens=6, record=RECORD), answers("small", messages, max_new_tokens=6)
            )
    with load(engine_bundle, "rtx") as vlm:
        vlm.generate(TEXT, max_new_tokens=2)
        assert vlm._options.shared.banks.nbytes == while_decoding * 4 // 3  # four experts, one of them vision
    assert not any(trt.cuda.left.values())


def test_several_requests_and_beams_share_the_rows(trt, engine_bundle, answers):
    with load(engine_bundle, "four") as vlm:
        found = vlm.generate_batch([PICTURED, SHORT, TEXT], max_new_tokens=3, record=RECORD)
        for each, messages in zip(found, (PICTURED, SHORT, TEXT), strict=True):
            close_to(each, answers("four", messages, max_new_tokens=3))
        for beams in (2, 4):
            beam = vlm.generate(TEXT, max_new_tokens=4, num_beams=beams)
            assert beam.token_ids == answers("four", TEXT, max_new_tokens=4, num_beams=beams).token_ids
        with pytest.raises(MoiieError, match="2 requests with 3 beams each take 6 rows") as caught:
            vlm.generate_batch([TEXT, SHORT], num_beams=3)
        assert "batch: 6" in caught.value.hint
    assert not any(trt.cuda.left.values())


def test_shape_inputs_are_read_from_the_host(trt, copied, answers):
    write_plans(copied, "rtx", host=["past_lengths"])
    with load(copied, "rtx") as vlm:
        close_to(vlm.generate(SHORT, max_new_tokens=2, record=RECORD), answers("rtx", SHORT, max_new_tokens=2))


def test_requests_leave_nothing_behind(trt, engine_bundle):
    """Answers that end, are given up, or were never begun: the device holds as much after each as before it."""
    random = np.random.default_rng(5)
    with load(engine_bundle, "small", feature_cache=0) as vlm:
        vlm.generate(PICTURED, max_new_tokens=3)
        held = trt.cuda.left
        for index, wanted in enumerate(random.permutation([0, 1, 2, 9] * 2)):
            steps = vlm.stream((TEXT, SHORT, SHORT, PICTURED)[index % 4], max_new_tokens=4)
            for _ in zip(range(wanted), steps, strict=False):
                pass
            steps.close()
            found = trt.cuda.left
            assert found["device"] <= held["device"]
            assert {**found, "device": 0, "graphs": 0} == {**held, "device": 0, "graphs": 0}
    assert not any(trt.cuda.left.values())
    vlm.close()


def test_a_model_may_be_closed_while_it_answers(trt, engine_bundle):
    vlm = load(engine_bundle, "rtx")
    steps = vlm.stream(TEXT, max_new_tokens=6)
    next(steps)
    vlm.close()
    with pytest.raises(MoiieError, match="the model is closed"):
        list(steps)
    assert not any(trt.cuda.left.values())


@pytest.mark.parametrize("missing", ["engine", "experts", "KV", "results"])
def test_no_room_says_for_what_and_gives_everything_back(trt, engine_bundle, missing):
    with load(engine_bundle, "rtx") as vlm:
        vlm.generate(SHORT, max_new_tokens=2)
        everything = trt.cuda.used
    cuda, says = (
        trt.cuda,
        {
            "engine": (1 << 19, "TensorRT cannot load the engine: Cuda failure: CUDA_ERROR_OUT_OF_MEMORY"),
            "KV": ((1 << 20) + (1 << 16), "no room for the KV cache: 256.0 KiB were asked for"),
            "experts": ((1 << 20) + (1 << 21) + 30000, "no room for the experts"),
            "results": (0, "no room for intermediate results"),
        },
    )
    cuda.total, text = says[missing]
    if missing == "results":
        cuda.total = everything
    with load(engine_bundle, "rtx", memory_limit="1GiB") as vlm:
        if missing == "results":
            vlm._decoder.load("decoder_prefill")
            vlm._decoder.load("decoder_decode")
            cuda.total = cuda.used + (1 << 21) + 74496 + 30000
        with pytest.raises(MissingDependency, match=text) as caught:
            vlm.generate(SHORT, max_new_tokens=2)
        assert "are free" in caught.value.message
    assert not any(cuda.left.values())


def test_plugins_are_loaded_before_an_engine(trt, copied):
    library = copied / "engines" / "rtx" / "libmoiie_plugins.so"
    library.write_bytes(b"plugins")
    beside = {"sha256": sha256_file(library), "file": library.name, "embedded": False}
    for plugins, loaded, allowed in (
        (beside, [str(library)], False),
        ({**beside, "file": None, "embedded": True}, [], True),
    ):
        edit(copied, "rtx", plugins=plugins)
        trt.libraries.clear()
        with load(copied, "rtx") as vlm:
            assert trt.libraries == loaded
            assert vlm._options.shared._runtime.engine_host_code_allowed is allowed


@pytest.fixture
def copied(engine_bundle, tmp_path):
    """A copy that may be harmed."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


def test_a_damaged_engine_is_refused_before_it_is_loaded(trt, copied):
    path = copied / "engines" / "rtx" / "decoder_prefill.engine"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with load(copied, "rtx") as vlm, pytest.raises(Unsound, match="decoder_prefill.engine: the engine is damaged"):
        vlm.generate(SHORT, max_new_tokens=1)
    path.write_bytes(data[:-1])
    with pytest.raises(Unsound, match="decoder_prefill.engine: has"):
        load(copied, "rtx")
    assert not any(trt.cuda.left.values())


def test_an_engine_that_is_not_what_its_document_says_is_refused(trt, copied):
    write_plans(copied, "rtx", outputs=[])
    with load(copied, "rtx") as vlm, pytest.raises(Unsound, match="the engine has logits None, engine.json says"):
        vlm.generate(SHORT, max_new_tokens=1)


def test_logits_of_all_positions_are_refused(trt, engine_bundle):
    with load(engine_bundle, "rtx") as vlm, pytest.raises(MoiieError, match="last position only"):
        vlm.generate(SHORT, max_new_tokens=1, record=mr.Record(prefill_logits="all"))


def test_it_runs_no_portable_graphs(engine_bundle):
    with pytest.raises(MoiieError, match="not its own graphs"):
        tensorrt.TensorRtSession(engine_bundle / "onnx" / "decoder_decode.onnx", component="decoder_decode")


def test_the_emulation_notices_a_wrong_profile(trt, engine_bundle, monkeypatch):
    monkeypatch.setattr(tensorrt, "choose_profile", lambda *_: 2)
    with load(engine_bundle, "rtx") as vlm, pytest.raises(MoiieError, match=r"is not within \[65, 256\]"):
        vlm.generate_prompt(_cut(vlm.processor.from_text("x" * 40, ()), 9), max_new_tokens=1)


def test_the_emulation_notices_a_stale_recording(trt, engine_bundle, monkeypatch):
    changed = Execution._changed

    def keeps(self):
        if self._context is None:
            changed(self)

    monkeypatch.setattr(Execution, "_changed", keeps)
    with load(engine_bundle, "rtx") as vlm:
        vlm.generate(SHORT, max_new_tokens=4)
        with pytest.raises(MoiieError, match="ILLEGAL_ADDRESS"):
            vlm.generate(SHORT, max_new_tokens=4)
        trt.cuda._streams[vlm._options.device.stream].queue.clear()


def test_the_emulation_notices_experts_that_are_missing_or_others(trt, engine_bundle, answers, monkeypatch):
    buffers = ExpertBanks.buffers
    name = "experts.1.language.down"
    monkeypatch.setattr(
        ExpertBanks, "buffers", lambda self, part: {k: v for k, v in buffers(self, part).items() if k != name}
    )
    with load(engine_bundle, "rtx") as vlm, pytest.raises(MoiieError, match=f"{name}: no address was set"):
        vlm.generate(SHORT, max_new_tokens=1)

    def exchanged(self, part):
        found = buffers(self, part)
        return found | {name: found["experts.3.language.down"]}

    monkeypatch.setattr(ExpertBanks, "buffers", exchanged)
    with load(engine_bundle, "rtx") as vlm, pytest.raises(MoiieError, match="logits are not finite"):
        vlm.generate(SHORT, max_new_tokens=1)
