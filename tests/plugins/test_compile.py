"""The compiler: images for several SMs and the launch table that goes with them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moiie_plugins.compile import SUPPORTED_SMS, Selection, compile_kernels, fallback_sm
from moiie_plugins.images import PTX_VERSION, Image, Job, ptx_parameters
from moiie_plugins.launch import BLOCK_M, SPLIT, plans
from moiie_plugins.tiles import SHARED_KIB
from moiie_runtime.errors import MissingDependency, MoiieError
from tests.plugins.interpreter import needs_triton

SELECTION = Selection(ops=("KVCacheUpdate", "DeformableSample"), dtypes=("float16",))
SMS = (87, 90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels")
    compile_kernels(path, SMS, select=SELECTION)
    return path


@pytest.fixture(scope="module")
def table(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "launch_table.json").read_text())
    return found


@needs_triton
def test_images_are_cubins_for_each_sm_and_portable_ptx(folder: Path, table: dict[str, Any]) -> None:
    code = (folder / "kernels.bin").read_bytes()
    assert set(table["kernels"]) == {
        f"{name}.float16{sizes}" for name in ("kv_cache_update", "deformable_sample") for sizes in ("", ".any")
    }
    for kernel in table["kernels"].values():
        assert [(image["sm"], image["kind"]) for image in kernel["images"]] == [
            (87, "cubin"),
            (87, "ptx"),
            (90, "cubin"),
        ]
        for image in kernel["images"]:
            assert image["offset"] % 64 == 0
            content = code[image["offset"] : image["offset"] + image["size"]]
            if image["kind"] == "cubin":
                assert content.startswith(b"\x7fELF")
                # e_flags of a CUDA ELF: the SM, in the second byte since CUDA 13, in the first before.
                assert image["sm"] in (content[48], content[49])
            else:
                text = content.rstrip(b"\0").decode()
                assert f".target sm_{image['sm']}\n" in text
                assert f".version {image['ptx_version'] // 10}.{image['ptx_version'] % 10}\n" in text
                assert re.findall(r"\.entry (\w+)\(", text) == [kernel["entry"]]


@needs_triton
def test_parameters_are_those_of_the_compiled_kernel(folder: Path, table: dict[str, Any]) -> None:
    code = (folder / "kernels.bin").read_bytes()
    kinds = {"pointer": "u64", "null": "u64", "int32": "u32", "int64": "u64", "float32": "f32"}
    for kernel in table["kernels"].values():
        ptx = next(image for image in kernel["images"] if image["kind"] == "ptx")
        text = code[ptx["offset"] : ptx["offset"] + ptx["size"]].decode()
        assert [kinds[kind] for _, kind in kernel["parameters"]] == ptx_parameters(text)
        assert len(kernel["parameters"]) == len(kernel["names"]) == len(kernel["types"])
        warps = {image["num_warps"] for image in kernel["images"]}
        assert re.search(rf"\.reqntid {32 * warps.pop()}\b", text)


@needs_triton
def test_images_hold_no_paths_of_the_machine(folder: Path) -> None:
    code = (folder / "kernels.bin").read_bytes()
    for path in (Path(__file__).parents[2], Path.home()):
        assert str(path).encode() not in code


@needs_triton
def test_a_second_call_compiles_nothing_and_writes_the_same(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("launch_table.json", "kernels.bin")}
    steps: list[str] = []
    compile_kernels(folder, SMS, select=SELECTION, progress=lambda _done, _all, name: steps.append(name))
    assert steps == []
    assert before == {name: (folder / name).read_bytes() for name in before}


@needs_triton
def test_a_newer_ptx_version_on_request_and_ptx_where_only_newer_sms_are_asked_for(tmp_path: Path) -> None:
    select = Selection(ops=("KVCacheUpdate",))
    table = compile_kernels(tmp_path, [90], select=select, ptx_versions={80: 83})
    images = table["kernels"]["kv_cache_update.float16"]["images"]
    assert [(i["sm"], i["kind"], i["ptx_version"]) for i in images] == [(80, "ptx", 83), (90, "cubin", PTX_VERSION[90])]


@needs_triton
def test_a_ptx_version_older_than_the_sm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match=r"kv_cache_update.float16 .*for SM (80|100), PTX ISA 8\.0"):
        compile_kernels(tmp_path, [100], select=Selection(ops=("KVCacheUpdate",)), ptx_versions={100: 80})
    assert not (tmp_path / "launch_table.json").exists()


@needs_triton
def test_an_unknown_sm_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="SM 75, 130") as caught:
        compile_kernels(tmp_path, [130, 87, 75])
    assert caught.value.hint == "there are kernels for SM 80, 86, 87, 89, 90, 100, 110, 120"
    assert caught.value.exit_code == 4
    with pytest.raises(MoiieError, match="no SM"):
        compile_kernels(tmp_path, [])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that say what they were asked for, and nothing else."""

    def images(jobs: Sequence[Job], *_: object) -> dict[Job, list[Image]]:
        return {
            job: [Image(job.sm, kind, "entry", 0, 4, 0, job.ptx_version, repr(job).encode()) for kind in job.kinds]
            for job in jobs
        }

    monkeypatch.setattr("moiie_plugins.compile._compile_all", images)


FP8 = Selection(ops=("ExpertDispatch", "Fp8ExpertDispatch"), dtypes=("float16",))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("sms", "expected"),
    [
        ((80, 87), None),
        ((86, 89), [(89, "cubin", 81), (89, "ptx", 81)]),
        ((87, 90, 110), [(89, "ptx", 81), (90, "cubin", 81), (110, "cubin", PTX_VERSION[110])]),
    ],
    ids=["too old", "one of them", "no 89 among them"],
)
def test_fp8_kernels_are_made_for_gpus_that_have_the_type(
    tmp_path: Path, sms: tuple[int, ...], expected: list[tuple[int, str, int]] | None
) -> None:
    table = compile_kernels(tmp_path, sms, select=FP8, ptx_versions={89: 80})
    found = {name: kernel for name, kernel in table["kernels"].items() if "fp8" in name}
    assert {plan["weights"] for plan in table["plans"]} == ({"float16"} if expected is None else {"float16", "fp8"})
    assert len(found) == (0 if expected is None else 8)
    for kernel in found.values():
        assert kernel["oldest_sm"] == 89
        assert [(image["sm"], image["kind"], image["ptx_version"]) for image in kernel["images"]] == expected
    plain = table["kernels"]["expert_decode_gate_up.float16.float16"]
    assert plain["oldest_sm"] == 0
    assert {image["sm"] for image in plain["images"]} >= set(sms)


def test_fp8_kernels_alone_for_older_gpus_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match="fp8 weights need SM 89 or above, not 80, 87") as caught:
        compile_kernels(tmp_path, [80, 87], select=Selection(weights=("fp8",)))
    assert "int8 or int4" in str(caught.value.hint)


def test_without_triton_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("moiie_plugins.compile.version", missing)
    with pytest.raises(MissingDependency, match="triton") as caught:
        compile_kernels(tmp_path, [87])
    assert caught.value.hint.startswith("pip install triton")


@pytest.mark.parametrize(
    ("sms", "expected"), [((80, 87, 120), 87), ((86, 89), 89), ((110,), 80)], ids=["orin", "desktop", "thor-alone"]
)
def test_fallback_ptx_is_of_the_newest_sm_whose_ptx_other_gpus_run(sms: tuple[int, ...], expected: int) -> None:
    assert fallback_sm(sms) == expected


def test_plans_agree_with_tiles_on_every_sm() -> None:
    """Sizes that workspaces depend on are one number on all GPUs; block names of grids are blocks of the kernels."""
    assert set(PTX_VERSION) == set(SHARED_KIB) == set(SUPPORTED_SMS)
    for plan in plans():
        for launch in plan.launches:
            for sm in SUPPORTED_SMS:
                blocks = launch.kernel.tile(sm).blocks
                assert all(block in blocks for _, block in launch.grid if isinstance(block, str))
                if launch.kernel.name.startswith(("expert_route", "expert_prefill")):
                    assert blocks["BLOCK_M"] == BLOCK_M
                assert blocks.get("SPLIT", SPLIT) == SPLIT


def test_a_kernel_name_means_one_kernel() -> None:
    kernels: dict[str, Any] = {}
    for plan in plans():
        for launch in plan.launches:
            assert kernels.setdefault(launch.kernel.name, launch.kernel) == launch.kernel
