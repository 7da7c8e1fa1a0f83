"""Engines of TensorRT for RTX, built without a GPU: they hold what was asked for, twice the same, or say what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from moiie_export.builders import BuildRequest, BuildResult, plan
from moiie_export.builders.compile_engine import EngineJob
from moiie_export.builders.engine_process import run_job
from moiie_export.builders.engine_specs import Profile
from moiie_export.builders.plan_file import accelerators, causal_masks, plan_text, profile_bounds, read_header
from moiie_export.builders.tensorrt import build_engines
from moiie_export.targets import Target
from moiie_runtime.bundle import Bundle
from moiie_runtime.engines import open_engine
from moiie_runtime.errors import MissingDependency, MoiieError, Unsound
from moiie_runtime.tensors import TensorFile
from tests.exports import SMALLEST, exported
from tests.rtx import need_rtx
from tests.trt_graphs import target

SMS, BUCKETS = (86, 89, 120), (8, 64)
GRAPHS = ("vision_encoder", "decoder_prefill", "decoder_decode")


@pytest.fixture(scope="module", autouse=True)
def _rtx() -> None:
    need_rtx()


@dataclass(frozen=True)
class Built:
    """A copy of a bundle with its engines."""

    bundle: Path
    target: Target
    result: BuildResult
    stages: list[str]

    @property
    def document(self) -> dict[str, Any]:
        """engine.json."""
        document: dict[str, Any] = json.loads((self.result.path / "engine.json").read_text(encoding="utf-8"))
        return document


def request(bundle: Path, **changes: Any) -> BuildRequest:
    settings = {"sms": SMS, "prefill": BUCKETS, **changes}
    return BuildRequest(bundle, target("rtx", **settings))


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that engines may be written into."""
    return Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path_factory.mktemp("rtx") / "bundle"))


@pytest.fixture(scope="module")
def built(copied: Path) -> Built:
    """Every graph for three GPUs together, two prefill profiles, experts as inputs."""
    stages: list[str] = []
    asked = request(copied)
    result = build_engines(asked, lambda stage, *_: stages.append(stage) if stage not in stages else None)
    return Built(copied, asked.target, result, stages)


def test_every_graph_becomes_an_engine_for_all_gpus_together(built: Built) -> None:
    assert set(built.result.files) == {"banks.safetensors", *(f"{name}.engine" for name in GRAPHS)}
    for name in GRAPHS:
        path = built.result.path / f"{name}.engine"
        header = read_header(path)
        assert header.sms == SMS
        assert accelerators(plan_text(path.read_bytes())) == {SMS}
        assert ".".join(map(str, header.version)) == built.document["library"]["version"]
    assert [name for name in built.stages if name.endswith("engine")] == [f"{name}: engine" for name in GRAPHS]


def test_the_plan_checks_the_bounds_of_its_profiles(built: Built) -> None:
    text = plan_text((built.result.path / "decoder_prefill.engine").read_bytes())
    assert {(1, 8), (9, 64)} <= set(profile_bounds(text))
    decode = plan_text((built.result.path / "decoder_decode.engine").read_bytes())
    assert not profile_bounds(decode)


def test_the_plan_computes_a_causal_mask_from_the_newest_key(built: Built) -> None:
    assert causal_masks(plan_text((built.result.path / "decoder_prefill.engine").read_bytes())) >= 1
    assert causal_masks(plan_text((built.result.path / "vision_encoder.engine").read_bytes())) == 0


def test_engine_json_says_what_is_there_and_what_it_needs(built: Built) -> None:
    document = built.document
    assert document["sms"] == list(SMS)
    assert document["needs"] == {"tensorrt_rtx": document["library"]["version"]}
    assert document["floor"].items() >= {"cuda": "13.0", "driver": "580.65.06"}.items()
    assert "not tried" in document["floor"]["basis"]
    assert document["plugins"] is None
    assert document["kv_cache"] == {"dtype": "float16", "in_place": True}
    prefill = document["components"]["decoder_prefill"]
    assert [each["name"] for each in prefill["profiles"]] == ["prefill_8", "prefill_64"]
    assert prefill["attention"] == "lower_right"
    banks = {tuple(bank["inputs"]): (bank["experts"], bank["components"]) for bank in document["banks"]}
    assert banks[("experts.0.vision.down", "experts.0.vision.gate_up")] == ([0], ["decoder_prefill"])
    assert banks[("experts.0.language.down", "experts.0.language.gate_up")][0] == [1, 2, 3]
    bound = {name for bank in document["banks"] for name in bank["inputs"]}
    assert set(TensorFile(built.result.path / "banks.safetensors").header) == bound


def test_the_runtime_reads_it(built: Built) -> None:
    engine = open_engine(Bundle.open(built.bundle), "rtx")
    assert engine.backend == "tensorrt_rtx"
    decode = engine.bundle.components["decoder_decode"]
    assert decode.file == "engines/rtx/decoder_decode.engine"
    assert decode.inputs["past_key_values.0.key"].dtype == "float16"
    assert engine.bundle.kv_cache.dtype == "float16"


def test_the_same_build_is_up_to_date(built: Built) -> None:
    again = build_engines(request(built.bundle), quiet)
    assert again.cached
    assert plan(request(built.bundle)).cached
    assert not plan(replace(request(built.bundle), force=True)).cached
    assert not plan(request(built.bundle, prefill=(32,))).cached


def test_a_second_build_has_the_same_bytes(built: Built, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported(SMALLEST).bundle, tmp_path / "the same bundle in another place"))
    again = build_engines(request(other), quiet)
    engines = {f"{graph}.engine" for graph in GRAPHS}
    assert engines < {*again.files}
    assert {name: again.files[name] for name in engines} == {name: built.result.files[name] for name in engines}


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda data: b"", "is no TensorRT engine"),
        (lambda data: b"ELF" + data[3:], "is no TensorRT engine"),
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data[:40], "is no TensorRT engine"),
    ],
)
def test_a_damaged_plan_is_found(built: Built, tmp_path: Path, harm: Any, says: str) -> None:
    path = tmp_path / "damaged.engine"
    path.write_bytes(harm((built.result.path / "decoder_decode.engine").read_bytes()))
    with pytest.raises(Unsound, match=says):
        read_header(path)


def test_an_sm_that_is_not_supported_names_those_that_are(copied: Path) -> None:
    with pytest.raises(MissingDependency, match=r"does not build for SM 87 \(it does for 80, 86, 89, 120, 121\)") as e:
        build_engines(request(copied, sms=(87, 89)), quiet)
    assert e.value.exit_code == 4
    assert e.value.hint


def test_a_missing_plugin_library_is_named(copied: Path) -> None:
    with pytest.raises(MissingDependency, match="needs the plugin library") as e:
        build_engines(request(copied, plugins="required"), quiet)
    assert "moiie plugins build" in str(e.value.hint)
    with pytest.raises(MissingDependency, match="no such plugin library"):
        build_engines(replace(request(copied, plugins="required"), plugin_library=copied / "none.so"), quiet)
    library = copied.parent / "not-a-library.so"
    library.write_bytes(b"nothing")
    with pytest.raises(MissingDependency, match="not-a-library.so"):
        build_engines(replace(request(copied, plugins="required"), plugin_library=library), quiet)
    assert not (copied / "engines" / "rtx.partial").exists()


def test_predicted_memory_is_obeyed(copied: Path) -> None:
    asked = request(copied, precision="bfloat16")
    predicted = plan(asked).peak_bytes
    with pytest.raises(MissingDependency, match="building is predicted to take"):
        build_engines(replace(asked, memory_limit=predicted - 1), quiet)


def test_float32_is_refused_before_anything_is_built(copied: Path) -> None:
    with pytest.raises(MoiieError, match="precision float32"):
        build_engines(request(copied, precision="float32"), quiet)


def test_a_graph_that_tensorrt_refuses_says_why(tmp_path: Path) -> None:
    """Plugin missing; an input that would be dropped without an error: both end the build, without the driver's noise."""
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
    shaped = [helper.make_tensor_value_info(name, half, [1, 2, 4, 64]) for name in "qkvy"]
    lengths = helper.make_tensor_value_info("lengths", whole, [1])
    cases = {
        "plugin": ([helper.make_node("Nowhere", ["q"], ["y"], domain="moiie")], shaped[:1], "Plugin not found"),
        "dropped": (
            [helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"])],
            [*shaped[:3], lengths],
            "would ignore an input",
        ),
    }
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("moiie", 1)]
    for name, (nodes, inputs, says) in cases.items():
        graph = helper.make_graph(nodes, name, inputs, shaped[3:])
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / f"{name}.onnx")
        job = EngineJob(name, tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", (Profile("one", {}),), (89,))
        with pytest.raises(MoiieError, match=says) as e:
            run_job("tensorrt_rtx", job, quiet)
        assert "cudaError" not in e.value.message
        assert e.value.hint


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    job = EngineJob("dies", tmp_path / "x.onnx", tmp_path / "x.engine", (), (89,))
    with pytest.raises(MoiieError, match="the process that built the engine ended"):
        run_job("tensorrt_rtx", job, quiet)


def test_an_interrupted_build_leaves_nothing(copied: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "vision_encoder: engine" and done:
            raise KeyboardInterrupt

    asked = request(copied, images=2)
    asked = replace(asked, target=replace(asked.target, name="stopped"))
    with pytest.raises(KeyboardInterrupt):
        build_engines(asked, stop)
    assert not list((copied / "engines").glob("stopped*"))


def test_full_tensorrt_builds_on_its_device_only(copied: Path) -> None:
    with pytest.raises(MissingDependency) as e:
        build_engines(BuildRequest(copied, target("orin")), quiet)
    assert e.value.exit_code == 4


def test_a_plugin_node_becomes_a_custom_layer_in_a_process_of_its_own(built: Built, tmp_path: Path) -> None:
    """In the wheel as it is, the parser ends the process here: it looks for a library under a name that is not there."""
    script = Path(__file__).parent / "plugin_process.py"
    done = subprocess.run(
        [sys.executable, script, built.bundle, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"configured": 2, "experts": [[1, 2, 3], [0]], "layers": 2}
