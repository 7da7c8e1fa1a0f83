from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_runtime.bundle import Bundle
from moiie_runtime.errors import MoiieError, Unsound
from moiie_runtime.manifest import read_manifest

SLOW_FIXTURES = [HealthCheck.function_scoped_fixture]


def test_open_gives_typed_fields_and_keeps_unknown_keys(manifest, write_bundle):
    bundle = Bundle.open(write_bundle(manifest))
    assert bundle.model.moe is not None
    assert bundle.model.moe.expert_groups == {"vision": (0, 1, 2), "language": (1, 2, 3)}
    assert bundle.tokens.eos == (3,)
    assert bundle.components["decoder_decode"].inputs["x"].shape == ("batch", 4)
    assert bundle.modality.last_image_token_is_language is True
    assert bundle.raw["a_later_key"] == {"is": "kept"}


def test_a_dense_model_has_no_experts(manifest):
    manifest["model"]["moe"] = None
    manifest["model"]["sliding_window"] = None
    model = read_manifest(manifest, "bundle.json").model
    assert model.moe is None
    assert model.sliding_window is None


def test_a_newer_schema_names_the_version_to_install(manifest, write_bundle):
    manifest |= {"schema": 2, "created_by": {"tool": "moiie-export", "version": "3.1.0"}}
    del manifest["model"]  # whatever else the newer schema changed
    with pytest.raises(MoiieError, match="schema 2; this version reads schema 1") as caught:
        Bundle.open(write_bundle(manifest))
    assert 'pip install "moiie-export>=3.1.0"' in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hidden_size", 0, "integer >= 1"),
        ("model.hidden_size", True, "integer >= 1"),
        ("model.hidden_size", "32", "integer >= 1"),
        ("model.head_dim", None, "integer >= 1"),
        ("model.moe.top_k", 5, "integer from 1 to 4"),
        ("model.moe.layers", [1, 4], "integers from 0 to 3"),
        ("model.moe.expert_groups.vision", [0, 4], "integers from 0 to 3"),
        ("model.moe.routed", 1, "true or false"),
        ("tokens.eos", 3, "list of integers"),
        ("tokens.image_placeholder", 5, "integer from"),
        ("tokens.image_marker", "", "not empty"),
        ("processor.aspect_ratio", "anyres", '"pad" or "square"'),
        ("processor.std", [0.5, 0.5, 0], "above 0"),
        ("processor.mean", [0.5, 0.5], "3 finite numbers"),
        ("processor.image_size", 10**9, "integer from 1 to"),
        ("dtype", "bfloat16", '"float32" or "float16"'),
        ("kv_cache.layout", "BSNH", '"BNSH"'),
        ("components.decoder_decode", "onnx/x.onnx", "an object"),
        ("residency.decode", None, "an object"),
        ("files", [], "an object"),
        ("generation.penalty_prompt", "all", '"prompt" or "bos" or "none"'),
    ],
)
def test_a_wrong_value_is_named(manifest, key, value, expected):
    *parents, last = key.split(".")
    place = manifest
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(MoiieError) as caught:
        read_manifest(manifest, "x/bundle.json")
    assert key in caught.value.message
    assert expected in caught.value.message


@pytest.mark.parametrize("key", ["name", "model", "tokens", "kv_cache", "embed_tokens", "files", "residency", "prompt"])
def test_a_missing_key_is_named(manifest, key):
    del manifest[key]
    with pytest.raises(MoiieError, match=rf"x/bundle\.json: key '{key}' is missing"):
        read_manifest(manifest, "x/bundle.json")


def test_the_penalty_sees_the_prompt_unless_the_bundle_says_otherwise(manifest):
    assert read_manifest(manifest, "x").penalty_prompt == "prompt"
    for rule in ("prompt", "bos", "none"):
        manifest["generation"]["penalty_prompt"] = rule
        assert read_manifest(manifest, "x").penalty_prompt == rule
    manifest["generation"]["penalty_prompt"] = "bos"
    manifest["tokens"]["bos"] = None
    with pytest.raises(MoiieError, match='penalty_prompt.* must be "prompt" or "none", got'):
        read_manifest(manifest, "x")


def test_components_name_the_entry_with_the_fault(manifest):
    manifest["components"]["decoder_decode"] = {**manifest["components"]["decoder_decode"], "inputs": [{"name": "x"}]}
    with pytest.raises(MoiieError, match=r"components\.decoder_decode\.inputs\[0\]\.shape"):
        read_manifest(manifest, "bundle.json")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../other/x", "onnx/../../x", "C:/x", "c:x", "onnx\\x", "", "onnx//x", "./x", "x\0y", "x" * 5000],
)
def test_paths_that_leave_the_bundle_are_refused(manifest, write_bundle, path):
    manifest["files"][path] = {"sha256": "0" * 64, "bytes": 0}
    with pytest.raises(MoiieError, match=r"path .* (must be|cannot be followed)"):
        Bundle.open(write_bundle(manifest))


def test_a_link_out_of_the_bundle_is_refused_and_one_inside_is_not(manifest, write_bundle, tmp_path):
    root = write_bundle(manifest)
    (root / "onnx").mkdir()
    (root / "real.onnx").touch()
    (root / "onnx" / "graph.onnx").symlink_to("../real.onnx")
    Bundle.open(root)
    (tmp_path / "outside").touch()
    (root / "onnx" / "weights.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(MoiieError, match="link that leaves the bundle"):
        Bundle.open(root)


def test_a_bundle_may_itself_be_reached_through_a_link(manifest, write_bundle, tmp_path):
    (tmp_path / "link").symlink_to(write_bundle(manifest))
    assert Bundle.open(tmp_path / "link").name == "by-hand"


def test_files_in_use_must_be_listed(manifest, write_bundle):
    del manifest["files"]["onnx/graph.onnx"]
    with pytest.raises(MoiieError, match=r"onnx/graph\.onnx. is used but .files. does not list it"):
        Bundle.open(write_bundle(manifest))


def test_what_is_no_bundle_says_why(tmp_path):
    with pytest.raises(MoiieError, match="no such bundle"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(MoiieError, match="is a directory, this is a file"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(MoiieError, match=r"it has no bundle\.json"):
        Bundle.open(tmp_path)


def test_an_unfinished_export_is_told_from_a_missing_one(tmp_path):
    (tmp_path / "b.partial").mkdir()
    for path in (tmp_path / "b", tmp_path / "b.partial"):
        with pytest.raises(MoiieError, match="did not finish") as caught:
            Bundle.open(path)
        assert "moiie export" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"schema": NaN}', "[" * 100000, "\ufeff{}", '{"schema": 1, "schema": 1}']
)
def test_what_is_not_a_json_object_is_refused(tmp_path, text):
    (tmp_path / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(MoiieError, match=r"bundle\.json"):
        Bundle.open(tmp_path)


def test_an_oversized_manifest_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("moiie_runtime.bundle.MAX_MANIFEST_BYTES", 10)
    (tmp_path / "bundle.json").write_text(" " * 20)
    with pytest.raises(MoiieError, match="at most 10 bytes"):
        Bundle.open(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _places(value, prefix=()):
    """Every place in a JSON document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*prefix, key)
            yield from _places(inner, (*prefix, key))


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW_FIXTURES)
@given(data=st.data())
def test_any_change_of_the_manifest_is_accepted_or_a_clear_error(manifest, data):
    changed = json.loads(json.dumps(manifest))
    for place in data.draw(st.lists(st.sampled_from(list(_places(manifest))), min_size=1, max_size=2)):
        inner = changed
        for key in place[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[place[-1]] = data.draw(JSON)
    refusal = None
    try:
        read_manifest(changed, "bundle.json")
    except MoiieError as error:
        refusal = error.message
    assert refusal is None or refusal.startswith("bundle.json: ")


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW_FIXTURES)
@given(path=st.text(max_size=20))
def test_any_path_stays_inside_or_is_refused(manifest, write_bundle, path):
    bundle = Bundle.open(write_bundle(manifest))
    try:
        found = bundle.path(path)
    except MoiieError:
        return
    assert found.resolve().is_relative_to(bundle.root)


@pytest.fixture
def sound(manifest, write_bundle) -> Path:
    root = write_bundle(manifest)
    (root / "onnx").mkdir()
    for name, content in (("graph.onnx", b"graph"), ("weights.safetensors", b"weights")):
        (root / "onnx" / name).write_bytes(content)
        manifest["files"][f"onnx/{name}"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return write_bundle(manifest)


def test_a_sound_bundle_verifies(sound):
    Bundle.open(sound).check_files()
    assert Bundle.open(sound).verify() == []


def test_verify_names_every_damaged_file(sound):
    (sound / "onnx" / "graph.onnx").write_bytes(b"grapH")
    (sound / "onnx" / "weights.safetensors").unlink()
    (sound / "onnx" / "extra.onnx").touch()
    (sound / "onnx" / "README").touch()  # neither a graph nor weights
    problems = Bundle.open(sound).verify()
    assert [problem.split(":")[0] for problem in problems] == [
        "onnx/graph.onnx",
        "onnx/weights.safetensors",
        "onnx/extra.onnx",
    ]
    assert "sha256" in problems[0]
    assert "missing" in problems[1]
    assert "not listed" in problems[2]


def test_check_files_finds_truncation_without_reading(sound):
    (sound / "onnx" / "weights.safetensors").write_bytes(b"weight")
    with pytest.raises(Unsound, match=r"weights\.safetensors: has 6 bytes, bundle\.json says 7") as caught:
        Bundle.open(sound).check_files()
    assert caught.value.exit_code == 3
    shutil.rmtree(sound / "onnx")
    with pytest.raises(Unsound, match=r"graph\.onnx: is missing; .*weights\.safetensors: is missing"):
        Bundle.open(sound).check_files()


def test_text_files_are_utf8(sound):
    (sound / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(MoiieError, match="is not UTF-8 text"):
        Bundle.open(sound).read_text("chat_template.jinja")
