"""Which of TensorRT's headers the library is compiled with."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_plugins import headers
from moiie_plugins.headers import find_headers
from moiie_runtime.errors import MissingDependency

PLAIN = "#define NV_TENSORRT_MAJOR {}\n#define NV_TENSORRT_MINOR {}\n#define NV_TENSORRT_PATCH {}\n"
INDIRECT = """#define TRT_MAJOR_{0} {1}
#define TRT_MINOR_{0} {2}
#define TRT_PATCH_{0} {3}
#define NV_TENSORRT_MAJOR TRT_MAJOR_{0} //!< TensorRT major version.
#define NV_TENSORRT_MINOR TRT_MINOR_{0}
#define NV_TENSORRT_PATCH TRT_PATCH_{0}
"""


def _folder(path: Path, version: str) -> Path:
    path.mkdir()
    (path / "NvInferRuntime.h").write_text("", encoding="utf-8")
    (path / "NvInferVersion.h").write_text(version, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (PLAIN.format(10, 3, 0), "10.3.0"),
        (INDIRECT.format("ENTERPRISE", 10, 14, 1), "10.14.1"),
        (INDIRECT.format("ENTERPRISE", 11, 4, 0), "11.4.0"),
        (INDIRECT.format("RTX", 1, 7, 1), "1.7.1"),
    ],
)
def test_versions(tmp_path: Path, text: str, version: str) -> None:
    folder = _folder(tmp_path / "include", text)
    found = find_headers({headers.VARIABLE: str(folder)}, ())
    assert (found.version, found.path, found.origin) == (version, folder, headers.VARIABLE)


def test_the_variable_goes_before_the_system_and_that_before_the_package(tmp_path: Path) -> None:
    told = _folder(tmp_path / "told", PLAIN.format(10, 5, 0))
    system = _folder(tmp_path / "system", PLAIN.format(10, 6, 0))
    assert find_headers({headers.VARIABLE: str(told)}, (system,)).path == told
    assert find_headers({}, (tmp_path / "absent", system)).path == system
    packaged = find_headers({}, ())
    assert packaged.origin == "kernel-lens from pip"
    assert packaged.version == "10.14.1"


@pytest.mark.parametrize("text", [PLAIN.format(8, 6, 1), PLAIN.format(10, 2, 0)])
def test_headers_that_are_too_old(tmp_path: Path, text: str) -> None:
    folder = _folder(tmp_path / "include", text)
    with pytest.raises(MissingDependency, match=r"the plugins need 10\.3 or newer") as caught:
        find_headers({headers.VARIABLE: str(folder)}, ())
    assert str(folder) in caught.value.message


def test_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependency, match=r"there is no NvInferRuntime\.h in this folder"):
        find_headers({headers.VARIABLE: str(tmp_path)}, ())
    monkeypatch.setattr(headers, "_packaged", lambda: None)
    with pytest.raises(MissingDependency, match="headers are not on this machine") as caught:
        find_headers({}, ())
    assert caught.value.hint is not None
    assert "TENSORRT_INCLUDE_DIR" in caught.value.hint
    assert "pip install kernel-lens==2.0.1" in caught.value.hint


@pytest.mark.parametrize("text", ["", "#define NV_TENSORRT_MAJOR TRT_MAJOR\n"])
def test_headers_without_a_version(tmp_path: Path, text: str) -> None:
    folder = _folder(tmp_path / "include", text)
    with pytest.raises(MissingDependency, match="no version of TensorRT is defined there"):
        find_headers({headers.VARIABLE: str(folder)}, ())
    (folder / "NvInferVersion.h").unlink()
    with pytest.raises(MissingDependency, match="cannot be read"):
        find_headers({headers.VARIABLE: str(folder)}, ())
