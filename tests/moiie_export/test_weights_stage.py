"""The stage `weights` with quantised weights: values, blocks, folds, kills in its middle, a disk that fills up in it."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiie_export import weights_run, weights_stage
from moiie_export.quantize.packing import SCALES, dequantize, restore, stored_arrays
from moiie_export.quantize.rtn import rtn
from moiie_export.quantize.rules import Resolved, resolve
from moiie_export.quantize.statistics import InputStatistics
from moiie_export.recipe_quantization import QuantizationSection, QuantRule
from moiie_export.source import ModelSource
from moiie_export.weights_file import WeightsFile
from moiie_export.weights_stage import WeightsJob, write_weights
from moiie_export.weights_units import units_of
from moiie_runtime.errors import MoiieError
from moiie_runtime.tensors import TensorFile
from tests.synthetic import write_checkpoint

MIXED = (
    QuantRule(("language_experts", "lm_head"), "int8", 64),
    QuantRule(("experts", "dense"), "int4"),
    QuantRule(("attention",), "int4", 64),
)
AWQ = (QuantRule(("experts", "dense", "attention", "lm_head"), "int4", method="awq"),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a sparse layer; 64 wide, so that every decoder row has groups."""
    folder = tmp_path_factory.mktemp("stage") / "checkpoint"
    return write_checkpoint(folder, hidden=64, intermediate=128, vocab=288, backbone="llama")


@pytest.fixture
def source(checkpoint: Path) -> Iterator[ModelSource]:
    with ModelSource.open(checkpoint) as source:
        yield source


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units a tensor, and a note in the journal after each few of them."""
    monkeypatch.setattr(weights_stage, "BLOCK", 1 << 11)
    monkeypatch.setattr(weights_run, "COMMIT_BYTES", 1 << 13)


def job_of(source: ModelSource, rules: tuple[QuantRule, ...], dtype: str = "float16") -> WeightsJob:
    resolved = settled(source, rules, dtype)
    return replace(WeightsJob.of(source, resolved), fingerprint="same")


def settled(source: ModelSource, rules: tuple[QuantRule, ...], dtype: str = "float16") -> Resolved:
    resolved = resolve(QuantizationSection(rules), dtype, source.weight_map, source.config)
    source.weight_map = resolved.weight_map
    return resolved


def quiet(*_: object) -> None:
    """No progress."""


def test_stored_weights_are_the_checkpoints(source: ModelSource, tmp_path: Path, small_blocks: None) -> None:
    job = job_of(source, MIXED)
    notes = write_weights(job, tmp_path / "w", quiet)
    with TensorFile(tmp_path / "w") as file:
        assert set(file) == {*job.forms, *(name + SCALES for name in Resolved(source.weight_map, job.forms).schemes)}
        for weight in source.weight_map.weights:
            values, scheme = source.tensor(weight), job.forms[weight.name].scheme
            if scheme is None:
                np.testing.assert_array_equal(file[weight.name], values.astype(file[weight.name].dtype))
                continue
            expected = stored_arrays(rtn(values.reshape(-1, values.shape[-1]), scheme), scheme)
            np.testing.assert_array_equal(file[weight.name], expected[""].reshape(file[weight.name].shape))
            np.testing.assert_array_equal(file[weight.name + SCALES].reshape(expected[SCALES].shape), expected[SCALES])
    section = notes["quantization"]["weights"]
    assert section["decoder.lm_head.weight"] == {"format": "int8", "group_size": 64, "method": "rtn"}
    assert section["decoder.layers.1.mlp.experts.0.down_proj"]["format"] == "int4"
    assert section["decoder.layers.1.mlp.experts.3.down_proj"]["format"] == "int8"
    assert job.nbytes == sum(info.nbytes for info in TensorFile(tmp_path / "w").header.values())


def test_blocks_and_threads_change_no_byte(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(source, MIXED)
    write_weights(job, tmp_path / "whole", quiet)
    monkeypatch.setattr(weights_stage, "BLOCK", 1 << 11)
    monkeypatch.setattr(weights_run, "available_cores", lambda: 3)
    write_weights(job, tmp_path / "blocks", quiet)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_progress_goes_up_to_the_end(source: ModelSource, tmp_path: Path, small_blocks: None) -> None:
    said: list[tuple[int, int]] = []
    write_weights(job_of(source, MIXED), tmp_path / "w", lambda _, done, total: said.append((done, total)))
    assert len({total for _, total in said}) == 1
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1][0] == said[-1][1]


def _write_until(checkpoint: Path, path: Path, rules: tuple[QuantRule, ...], units: int) -> None:
    """In a process of its own: dies without a word when so many units were reported."""
    weights_stage.BLOCK, weights_run.COMMIT_BYTES = 1 << 11, 1 << 13  # type: ignore[misc]
    told = 0

    def progress(*_: object) -> None:
        nonlocal told
        told += 1
        if told == units:
            os.kill(os.getpid(), 9)

    with ModelSource.open(checkpoint) as source:
        write_weights(job_of(source, rules), path, progress)


def test_a_killed_stage_goes_on_where_it_was(
    checkpoint: Path, source: ModelSource, tmp_path: Path, small_blocks: None
) -> None:
    """SIGKILL three times, each later than the last; what was noted is not done again, and the bytes are the same."""
    job = job_of(source, MIXED)
    write_weights(job, tmp_path / "undisturbed", quiet)
    done = [0]
    for _ in range(3):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["moiie_export.quantize.rtn", "moiie_export.weights_stage", "tests.synthetic"])
        process = context.Process(target=_write_until, args=(checkpoint, tmp_path / "w", MIXED, 40))
        process.start()
        process.join()
        assert process.exitcode == -9
        assert not (tmp_path / "w").exists()
        steps = _steps(job)
        with WeightsFile(tmp_path / "w", job.specs(), job.fingerprint, steps) as file:
            done.append(file.done)
    assert done == sorted(set(done)), "each life got further"
    written: list[str] = []
    write_weights(job, tmp_path / "w", lambda *_: written.append(""))
    assert 0 < len(written) <= _steps(job) - done[-1]
    assert (tmp_path / "w").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def _steps(job: WeightsJob) -> int:
    return sum(len(list(units_of(weight, weights_stage.BLOCK))) for weight in job.source.weight_map.weights)


def test_another_recipe_starts_again(source: ModelSource, tmp_path: Path, small_blocks: None) -> None:
    job = job_of(source, MIXED)
    with pytest.raises(KeyboardInterrupt):
        write_weights(job, tmp_path / "w", _interrupt_after(60))
    write_weights(replace(job, fingerprint="another"), tmp_path / "w", quiet)
    write_weights(job, tmp_path / "fresh", quiet)
    assert (tmp_path / "w").read_bytes() == (tmp_path / "fresh").read_bytes()


def _interrupt_after(count: int) -> Callable[..., None]:
    told = iter(range(count))

    def progress(*_: object) -> None:
        if next(told, None) is None:
            raise KeyboardInterrupt

    return progress


def test_a_disk_that_fills_up_in_the_middle(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """The error names the file; with room again the stage goes on and ends with the same bytes."""
    job = job_of(source, MIXED)
    write_weights(job, tmp_path / "undisturbed", quiet)
    real, room = os.pwrite, [job.nbytes // 2]

    def limited(descriptor: int, data: Any, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr("moiie_export.weights_file.os.pwrite", limited)
    with pytest.raises(MoiieError, match=r"w\.tmp: cannot be written: No space left on device") as caught:
        write_weights(job, tmp_path / "w", quiet)
    assert "free space" in str(caught.value.hint)
    assert not (tmp_path / "w").exists()
    room[0] = 1 << 40
    said: list[int] = []
    write_weights(job, tmp_path / "w", lambda _, done, __: said.append(done))
    assert said[0] > job.nbytes // 8, "the first half was not done again"
    assert (tmp_path / "w").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def test_data_that_did_not_reach_the_disk_ends_the_stage(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """The system says so once; the note at the end of the work must not pass over it."""
    job = job_of(source, MIXED)
    monkeypatch.setattr(weights_run, "COMMIT_BYTES", int(0.6 * job.nbytes))
    real, calls = WeightsFile.commit, []

    def commit(file: WeightsFile, done: int, notes: Any) -> None:
        calls.append(done)
        if len(calls) == 1:
            raise MoiieError("input/output error")
        real(file, done, notes)

    monkeypatch.setattr(WeightsFile, "commit", commit)
    with pytest.raises(MoiieError, match="input/output error"):
        write_weights(job, tmp_path / "w", quiet)
    assert len(calls) == 1
    assert not (tmp_path / "w").exists()


class Inputs:
    """Statistics of made-up inputs in which a few channels are much larger than the rest; none for one expert."""

    starved = "decoder.layers.1.mlp.experts.2.gate_up_proj"

    def __init__(self, source: ModelSource) -> None:
        self.shapes = {name: shape for name, (_, _, shape) in source.weight_map.by_parameter().items()}

    def shortage(self, parameter: str) -> str:
        return f"calibration saw too little of {parameter}"

    def get(self, parameter: str) -> InputStatistics | None:
        if parameter == self.starved:
            return None
        rng = np.random.default_rng(sum(parameter.encode()))
        width = self.shapes[parameter][-1]
        sample = rng.standard_normal((96, width)).astype(np.float32)
        sample[:, ::9] *= 20
        return InputStatistics(len(sample), np.abs(sample).mean(0), None, sample)


def test_factors_of_awq_undo_each_other(source: ModelSource, tmp_path: Path, small_blocks: None) -> None:
    """What a fold divides and multiplies, put back, are the checkpoint's weights; outputs get better, never worse."""
    inputs = Inputs(source)
    job = replace(job_of(source, AWQ, "float32"), statistics=inputs)
    notes = write_weights(job, tmp_path / "w", quiet)["quantization"]
    assert notes["fallbacks"][Inputs.starved] == inputs.shortage(Inputs.starved)
    weights = {weight.name: weight for weight in source.weight_map.weights}
    with TensorFile(tmp_path / "w") as file:
        moved = [name for name in notes["scales"] if np.any(file[name] != 1)]
        assert len(moved) > len(notes["scales"]) // 2
        norm, gate = "decoder.layers.1.post_attention_layernorm.weight", "decoder.layers.1.mlp.gate.weight"
        factor = file[f"{norm}.awq_scale"]
        np.testing.assert_array_equal(file[norm], source.tensor(weights[norm]) / factor)
        np.testing.assert_array_equal(file[gate], source.tensor(weights[gate]) * factor)
        better = [_gain(source, file, inputs, job, name) for name in ("decoder.lm_head.weight", *_dense())]
    assert min(better) >= 0.999
    assert max(better) > 1.2


def _dense() -> tuple[str, ...]:
    return tuple(f"decoder.layers.0.mlp.{name}.weight" for name in ("gate_up_proj", "down_proj"))


def _gain(source: ModelSource, file: TensorFile, inputs: Inputs, job: WeightsJob, name: str) -> float:
    """Output error of rounding to nearest over that of what was stored, both on the inputs that were seen."""
    weight = next(weight for weight in source.weight_map.weights if weight.name == name)
    scheme, seen = job.forms[name].scheme, inputs.get(name)
    assert scheme is not None
    assert seen is not None
    values, stored = source.tensor(weight), dequantize(file[name], file[name + SCALES], scheme)
    fold, made = job.folding.reads(name), job.folding.makes(name)
    assert fold is not None
    stored = stored / file[fold.tensor]
    if made is not None:
        stored[made.width :] *= file[made.tensor][:, None]
    nearest = restore(rtn(values, scheme), scheme)
    return float(seen.output_error(nearest - values).sum() / seen.output_error(stored - values).sum())
