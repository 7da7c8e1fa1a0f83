"""Workspaces with trivial stages: what is run again, what is never touched, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from moiie_export.disk import write_json
from moiie_export.stages import Progress, Stage, StagePlan, Workspace, file_record
from moiie_runtime.errors import MoiieError
from tests.trivial_pipeline import Pipeline, assert_complete, finished, names_of, silent, tree


def _become_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def test_a_first_run_writes_the_bundle_and_nothing_else(output: Path) -> None:
    pipeline = Pipeline(output)
    pipeline.export()
    assert tree(output.parent) == finished("1")
    assert pipeline.runs == {"weights": 1, "graph": 1, "files": 1}
    assert_complete(output)


def test_a_stage_that_fails_is_the_only_one_run_again(output: Path) -> None:
    def fail(directory: Path, _: Progress) -> Mapping[str, Any]:
        (directory / "onnx" / "graph").write_text("half", encoding="utf-8")
        raise RuntimeError("stopped")

    first = Pipeline(output)
    stages = [stage if stage.name != "graph" else _with(stage, fail) for stage in first.stages()]
    workspace = Workspace.look(output)
    with workspace.locked(), pytest.raises(RuntimeError, match="stopped"):
        workspace.execute(stages, silent)
    assert not output.exists()
    again = Pipeline(output)
    again.export()
    assert again.runs == {"graph": 1, "files": 1}
    assert tree(output.parent) == finished("1")


def test_a_changed_fingerprint_runs_only_its_stage(output: Path) -> None:
    Pipeline(output).export()
    changed = Pipeline(output, "2")
    assert Workspace.look(output).plan(changed.stages()) == [
        StagePlan("weights", "cached", "unchanged"),
        StagePlan("graph", "run", "its inputs changed"),
        StagePlan("files", "cached", "unchanged"),
    ]
    changed.export()
    assert changed.runs == {"graph": 1}
    assert tree(output.parent) == finished("2")


def test_force_runs_everything(output: Path) -> None:
    Pipeline(output).export()
    forced = Pipeline(output)
    assert {plan.reason for plan in Workspace.look(output).plan(forced.stages(), force=True)} == {"forced"}
    forced.export(force=True)
    assert forced.runs == {"weights": 1, "graph": 1, "files": 1}


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda p: p.write_text("longer than it was", encoding="utf-8"), _become_link]
)
def test_a_missing_cut_or_linked_file_runs_its_stage_again(output: Path, spoil: Callable[[Path], object]) -> None:
    Pipeline(output).export()
    spoil(output / "onnx" / "graph")
    again = Pipeline(output)
    plan = Workspace.look(output).plan(again.stages())[1]
    assert (plan.action, plan.reason) == ("run", "onnx/graph is missing or has another size")
    again.export()
    assert again.runs == {"graph": 1}
    assert tree(output.parent) == finished("1")


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"stages": []}',
        '{"stages": {"weights": 3}}',
        '{"stages": {"weights": {"fingerprint": "x", "files": [], "notes": {}}}}',
        '{"stages": {"weights": {"fingerprint": "x", "files": {"onnx/weights": {}}, "notes": {}}}}',
        '{"stages": {"weights": {"fingerprint": "x", "files": {"a": {"bytes": "1", "sha256": 2}}, "notes": {}}}}',
        '{"stages": ' + "[" * 100_000,
    ],
)
def test_a_damaged_state_starts_over(output: Path, state: str) -> None:
    partial = output.with_name("bundle.partial")
    partial.mkdir()
    (partial / "stages.json").write_text(state, encoding="utf-8")
    (partial / "stray").touch()
    pipeline = Pipeline(output)
    pipeline.export()
    assert pipeline.runs == {"weights": 1, "graph": 1, "files": 1}
    assert tree(output.parent) == finished("1")


def test_a_record_that_names_other_files_does_not_count(output: Path) -> None:
    """Else a state could make an export link files from anywhere into the bundle."""
    (output.parent / "secret").write_text("s", encoding="utf-8")
    Pipeline(output).export()
    manifest = json.loads((output / "bundle.json").read_text(encoding="utf-8"))
    manifest["stages"]["graph"]["files"] = {"../secret": file_record(output.parent / "secret")}
    write_json(output / "bundle.json", manifest)
    again = Pipeline(output)
    again.export()
    assert again.runs == {"graph": 1}
    assert tree(output.parent) == {**finished("1"), "secret": "s"}


def test_what_is_cached_is_linked_and_the_old_bundle_stays_until_the_end(output: Path) -> None:
    Pipeline(output).export()
    before, inode = tree(output), (output / "onnx" / "weights").stat().st_ino
    changed = Pipeline(output, "2")
    workspace = Workspace.look(output)
    with workspace.locked():
        workspace.execute(changed.stages(), silent)
        assert (workspace.partial / "onnx" / "weights").stat().st_ino == inode
        assert (workspace.partial / "onnx" / "graph").stat().st_ino != (output / "onnx" / "graph").stat().st_ino
    assert tree(output) == before
    assert_complete(output)


def test_without_hard_links_files_are_copied(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    Pipeline(output).export()
    monkeypatch.setattr(os, "link", refuse)
    Pipeline(output, "2").export()
    assert tree(output.parent) == finished("2")
    assert_complete(output)


def test_an_abandoned_change_does_not_cost_the_finished_stages(output: Path) -> None:
    """Version 2 is begun over version 1 and given up: going back to 1 runs nothing."""
    Pipeline(output).export()
    abandoned = Pipeline(output, "2")
    workspace = Workspace.look(output)
    with workspace.locked():
        workspace.execute(abandoned.stages(), silent)
    back = Pipeline(output)
    back.export()
    assert back.runs == {}
    assert tree(output.parent) == finished("1")


def test_finish_removes_what_no_stage_owns(output: Path) -> None:
    pipeline = Pipeline(output)
    workspace = Workspace.look(output)
    with workspace.locked():
        records = workspace.execute(pipeline.stages(), silent)
        (workspace.partial / "onnx" / "old.onnx").touch()
        (workspace.partial / "onnx" / "weights.tmp").touch()
        (workspace.partial / "empty" / "deep").mkdir(parents=True)
        (workspace.partial / "link").symlink_to(workspace.partial / "onnx", target_is_directory=True)
        workspace.finish({"files": {}}, [name for record in records.values() for name in record.files])
    assert set(tree(output)) == {"bundle.json", "a.json", "b.json", "onnx/weights", "onnx/graph"}


def test_looking_and_planning_write_nothing(tmp_path: Path) -> None:
    output = tmp_path / "no" / "such" / "bundle"
    workspace = Workspace.look(output)
    plans = workspace.plan(Pipeline(output).stages())
    assert [plan.reason for plan in plans] == ["not done yet"] * 3
    assert workspace.finished(Pipeline(output).stages()) is None
    assert list(tmp_path.iterdir()) == []


def _file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine", encoding="utf-8")


def _foreign_manifest(path: Path) -> None:
    path.mkdir()
    (path / "bundle.json").write_text('{"name": "of a web page", "files": []}', encoding="utf-8")


def _broken_manifest(path: Path) -> None:
    path.mkdir()
    (path / "bundle.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("make", [_file, _folder, _foreign_manifest, _broken_manifest])
@pytest.mark.parametrize(
    ("suffix", "kind"), [("", "a bundle"), (".partial", "an unfinished"), (".replaced", "a bundle")]
)
def test_what_is_not_ours_is_refused_and_kept(
    output: Path, make: Callable[[Path], None], suffix: str, kind: str
) -> None:
    make(output.with_name(f"bundle{suffix}"))
    before = tree(output.parent)
    with pytest.raises(MoiieError, match=f"bundle{suffix}: exists and is not {kind}") as caught:
        Pipeline(output).export()
    assert caught.value.hint is not None
    assert tree(output.parent) == before


def test_an_empty_folder_is_taken(output: Path) -> None:
    for suffix in ("", ".partial", ".replaced"):
        output.with_name(f"bundle{suffix}").mkdir()
    Pipeline(output).export()
    assert tree(output.parent) == finished("1")


@pytest.mark.parametrize("suffix", [".partial", ".replaced", ".lock"])
def test_a_name_that_marks_unfinished_work_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(MoiieError, match=f"names ending in {suffix} mark unfinished work"):
        Workspace.look(tmp_path / f"bundle{suffix}")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "bundle"
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    Pipeline(link).export()
    Pipeline(link, "2").export()
    assert link.is_symlink()
    assert_complete(link)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["real"]


@pytest.mark.parametrize("name", ["/", "/dev/null/bundle", "/dev/null", "x" * 255, "x" * 300, "loop"])
def test_an_output_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(MoiieError) as caught:
        Pipeline(tmp_path / name).export()
    assert caught.value.hint is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop"]


def test_a_second_export_of_the_same_output_is_refused(output: Path) -> None:
    first = Workspace.look(output)
    with first.locked():
        with pytest.raises(MoiieError, match="another export is writing here"):
            Pipeline(output).export()
        first.execute(Pipeline(output).stages(), silent)
    Pipeline(output).export()
    assert tree(output.parent) == finished("1")


def test_who_looked_before_another_export_finished_looks_again(output: Path) -> None:
    late, pipeline = Workspace.look(output), Pipeline(output)
    Pipeline(output).export()
    with late.locked():
        records = late.execute(pipeline.stages(), silent)
        late.finish({"files": {}, "stages": {}}, [name for record in records.values() for name in record.files])
    assert pipeline.runs == {}
    assert set(tree(output)) == set(names_of("1"))


def test_a_finished_bundle_is_known_by_its_manifest(output: Path) -> None:
    pipeline = Pipeline(output)
    pipeline.export()
    workspace = Workspace.look(output)
    assert workspace.finished(pipeline.stages()) is not None
    assert workspace.finished(Pipeline(output, "2").stages()) is None
    manifest = json.loads((output / "bundle.json").read_text(encoding="utf-8"))
    assert workspace.says(manifest)
    assert not workspace.says({**manifest, "name": "new"})
    write_json(output / "bundle.json", {**manifest, "added": "by another tool"})
    assert workspace.says(manifest)


def test_clear_removes_what_a_killed_export_left_beside_the_bundle(output: Path) -> None:
    Pipeline(output).export()
    Pipeline(output.with_name("other")).export()
    output.with_name("other").rename(output.with_name("bundle.replaced"))
    begun = Workspace.look(output)
    with begun.locked():
        begun.execute(Pipeline(output, "2").stages(), silent)
    workspace = Workspace.look(output)
    assert workspace.littered
    with workspace.locked():
        workspace.clear()
    assert not Workspace.look(output).littered
    assert tree(output.parent) == finished("1")


def _with(stage: Stage, run: Callable[[Path, Progress], Mapping[str, Any]]) -> Stage:
    return Stage(stage.name, stage.fingerprint, stage.files, run)
