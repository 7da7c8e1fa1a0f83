"""The safetensors header: every malformed file is refused by file, tensor and byte; well-formed ones read as written."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_runtime.errors import MoiieError
from moiie_runtime.tensor_header import ITEM_SIZES, TensorInfo, build_header, read_header, read_metadata

GOLDEN = Path(__file__).parents[1] / "golden"


def encode(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"b": entry("BF16", [2, 1], [8, 12]), "a": entry(), "scalar": entry("I64", [], [12, 20])}
    path.write_bytes(encode({"__metadata__": {"format": "pt"}, **header}, bytes(20)))
    start = path.stat().st_size - 20
    assert list(read_header(path).values()) == [
        TensorInfo("a", "F32", (2,), start, 8),
        TensorInfo("b", "BF16", (2, 1), start + 8, 4),
        TensorInfo("scalar", "I64", (), start + 12, 8),
    ]
    assert read_metadata(path) == {"format": "pt"}


def test_empty_tensors_may_lie_between_others_and_a_file_may_hold_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"full": entry(), "before": entry("F32", [0, 3], [0, 0]), "after": entry("F16", [3, 0], [8, 8])}
    path.write_bytes(encode(header, bytes(8)))
    assert list(read_header(path)) == ["before", "full", "after"]
    path.write_bytes(encode({}))
    assert read_header(path) == {}
    assert read_metadata(path) == {}


GOOD = entry()
HUGE = 2**62


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "expected at least 8 bytes (the header length), found 0"),
        (b"\x02\0\0\0\0\0\0", "found 7"),
        ((2**63).to_bytes(8, "little") + b"{}", f"claims {2**63} bytes, the format allows 100000000"),
        ((2**64 - 1).to_bytes(8, "little"), "the format allows"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "the format allows"),
        ((3).to_bytes(8, "little") + b"{}", "expected a header of 3 bytes, found 2 bytes after the length"),
        (encode(b""), "claims 0 bytes"),
        (encode(b"{"), "claims 1 bytes"),
        (encode(b" {}"), "expected '{' at byte 8, found b' '"),
        (encode(b"[]"), "expected '{' at byte 8"),
        (encode(b"{}x"), "header: not valid JSON: Extra data"),
        (encode(b'{"a\xff": 1}'), "can't decode byte 0xff"),
        (encode(b'{"a":' * 100_000), "nested too deeply"),
        (encode(b'{"a": {"dtype": "F32", "shape": ' + b"[" * 700 + b"]" * 700 + b', "data_offsets": [0, 0]}}'), "'a'"),
        (encode(b'{"a": 1, "a": 2}'), "key 'a' appears twice"),
        (encode({"__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
        (encode({"__metadata__": ["a"]}), "__metadata__: expected an object of strings"),
        (encode({"a": 1}), "tensor 'a': expected an object with keys"),
        (encode({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "found ['dtype', 'shape']"),
        (encode({"a": {**GOOD, "stride": [1]}}, bytes(8)), "expected an object with keys"),
        (encode({"a": entry("F31")}, bytes(8)), "dtype 'F31' is unknown; known are BOOL"),
        (encode({"a": entry(4)}, bytes(8)), "dtype 4 is unknown"),
        (encode({"a": entry(shape=[-2])}, bytes(8)), "shape: expected at most 32 sizes, found [-2]"),
        (encode({"a": entry(shape=[True, 2])}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=[2.0])}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=["2"])}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=2)}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=None)}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=[1] * 33)}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=[HUGE, HUGE])}, bytes(8)), "too large for any machine"),
        (encode({"a": entry(shape=[0, HUGE], offsets=[0, 0])}), "too large for any machine"),
        (encode({"a": entry(shape=[2**64])}, bytes(8)), "shape: expected"),
        (encode({"a": entry(shape=[3])}, bytes(8)), "expected 12 bytes for F32 3, found 8"),
        (encode({"a": entry(shape=[])}, bytes(8)), "expected 4 bytes for F32 a scalar, found 8"),
        (encode({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets are reversed: [8, 0]"),
        (encode({"a": entry(offsets=[0, 8, 16])}, bytes(8)), "data_offsets: expected two sizes"),
        (encode({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets: expected two sizes"),
        (encode({"a": entry(offsets=[False, 8])}, bytes(8)), "data_offsets: expected two sizes"),
        (encode({"a": entry(offsets="08")}, bytes(8)), "data_offsets: expected two sizes"),
        (encode({"a": GOOD, "b": entry(offsets=[4, 12])}, bytes(12)), "'b': overlaps the tensor before it"),
        (encode({"a": GOOD, "b": GOOD}, bytes(8)), "overlaps the tensor before it"),
        (encode({"a": entry(offsets=[4, 12])}, bytes(12)), "leaves a hole before it"),
        (encode({"a": GOOD, "b": entry(offsets=[12, 20])}, bytes(20)), "'b': leaves a hole before it"),
        (encode({"a": entry(offsets=[HUGE, HUGE + 8])}, bytes(8)), "leaves a hole before it"),
        (encode({"a": GOOD}, bytes(9)), "1 bytes belong to no tensor"),
        (encode({}, bytes(3)), "3 bytes belong to no tensor"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(MoiieError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert reason in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 600


def test_truncated_data_names_the_tensor_and_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = encode({"a": GOOD, "b": entry(offsets=[8, 16])}, bytes(16))
    path.write_bytes(whole[:-1])
    with pytest.raises(MoiieError) as caught:
        read_header(path)
    assert caught.value.message == (
        f"{path}: tensor 'b': expected to end at byte {len(whole)}, found {len(whole) - 1} bytes"
    )
    assert caught.value.hint == "the file is incomplete or damaged: copy or download it again"


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = encode({"a": GOOD, "b": entry(offsets=[8, 16])}, bytes(16))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(MoiieError):
            read_header(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(MoiieError, match="git lfs pull"):
        read_header(path)


@pytest.mark.parametrize("path", ["missing", "."])
def test_what_is_not_a_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(MoiieError, match=r"no such file|found a directory"):
        read_header(tmp_path / path)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(length=st.none() | st.integers(0, 2**64 - 1), raw=st.binary(max_size=120))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, length: int | None, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    prefix = len(raw) if length is None else length
    path.write_bytes(prefix.to_bytes(8, "little") + raw)
    check_read_or_refused(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
DIMS = st.lists(st.integers(0, 4) | st.sampled_from([2**31, 2**62, -1]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_SIZES, "F4"]) | JSON_VALUES,
        "shape": DIMS | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), min_size=1, max_size=3) | JSON_VALUES,
    }
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON_VALUES, max_size=4),
    data=st.binary(max_size=40),
    pad=st.integers(0, 9),
)
def test_any_header_structure_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes, pad: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "structure.safetensors"
    path.write_bytes(encode(json.dumps(header).encode() + b" " * pad, data))
    check_read_or_refused(path)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_a_changed_byte_in_a_real_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = GOLDEN / "moiie_llama3" / "checkpoint" / "model-00002-of-00004.safetensors"
    content = bytearray(source.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content)
    check_read_or_refused(path)


def check_read_or_refused(path: Path) -> None:
    """Whatever is accepted fills the data section exactly; whatever is not raises MoiieError and nothing else."""
    try:
        header = read_header(path)
    except MoiieError:
        return
    size = path.stat().st_size
    assert sum(info.nbytes for info in header.values()) <= size
    assert max((info.offset + info.nbytes for info in header.values()), default=size) == size
    for info in header.values():
        info.name.encode()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    specs=st.dictionaries(
        st.text(max_size=4).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(list(ITEM_SIZES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text("ab é", max_size=3), st.text("ab é", max_size=3), max_size=3),
)
def test_a_built_header_reads_back(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, Any], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "built.safetensors"
    head, infos = build_header(path, specs, metadata)
    assert len(head) % 64 == 0
    path.write_bytes(head + bytes(sum(info.nbytes for info in infos.values())))
    assert read_header(path) == infos
    assert read_metadata(path) == metadata
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == specs


@pytest.mark.parametrize(
    ("specs", "metadata", "reason"),
    [
        ({"a": ("F31", (1,))}, None, "dtype 'F31' is unknown"),
        ({"a": ("F32", (-1,))}, None, "shape: expected"),
        ({"a": ("F32", (HUGE, HUGE))}, None, "too large"),
        ({"__metadata__": ("F32", (1,))}, None, "the format keeps this name"),
        ({"\ud800": ("F32", (1,))}, None, "not valid Unicode"),
        ({"a": ("F32", (1,))}, {"k": 1}, "__metadata__: expected an object of strings"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(specs: Any, metadata: Any, reason: str) -> None:
    with pytest.raises(MoiieError, match=reason):
        build_header(Path("out.safetensors"), specs, metadata)
