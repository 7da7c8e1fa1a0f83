"""What `moiie inspect` says about a bundle's built forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moiie_export.cli.common import table
from moiie_runtime.errors import Unsound
from moiie_runtime.sizes import readable

if TYPE_CHECKING:
    from moiie_runtime.bundle import Bundle
    from moiie_runtime.engine_files import EngineFiles


def engine_summary(found: Sequence[EngineFiles]) -> dict[str, Any]:
    """Built forms by target, as plain data."""
    return {
        each.target: {
            "backend": each.document.get("backend"),
            "library": each.document.get("library"),
            "sms": each.document.get("sms") or [],
            "plugins": each.document.get("plugins"),
            "files": {name: record.bytes for name, record in sorted(each.files.items())},
            "bytes": each.bytes,
            "stale": each.stale is not None,
            "problems": list(each.problems),
        }
        for each in found
    }


def engine_lines(found: Sequence[EngineFiles], bundle: Bundle) -> Iterator[str]:
    """For people."""
    if not found:
        yield f"\nengines: none; `moiie build {bundle.root} --target NAME` makes one"
        return
    yield "\nengines:"
    yield table([_row(each) for each in found], "  ")
    for each in found:
        if each.stale is not None or each.problems:
            yield f"  {each.target}: {_wrong(each)}; build it again: {each.build} --force"


def check_engines(found: Sequence[EngineFiles]) -> None:
    """Refuse built forms that are damaged or of another export.

    Raises:
        Unsound: naming every one, with the commands that make them again.
    """
    wrong = [each for each in found if each.problems or each.stale is not None]
    if wrong:
        lines = [line for each in wrong for line in (*each.problems, *_stale(each))]
        what = "1 engine is" if len(wrong) == 1 else f"{len(wrong)} engines are"
        raise Unsound(
            f"{what} not as built from this bundle\n" + "\n".join(f"  {line}" for line in lines),
            "build again: " + "; ".join(f"{each.build} --force" for each in wrong),
        )


def _stale(each: EngineFiles) -> list[str]:
    if each.stale is None:
        return []
    return [f"engines/{each.target}: was built from another export of this bundle ({each.stale} differs)"]


def _wrong(each: EngineFiles) -> str:
    return "; ".join((*each.problems, *(["was built from another export of this bundle"] if each.stale else [])))


def _row(each: EngineFiles) -> list[str]:
    library, sms = each.document.get("library"), each.document.get("sms")
    made = f"{library.get('name')} {library.get('version')}" if isinstance(library, dict) else "unknown"
    gpus = f" for SM {', '.join(map(str, sms))}" if isinstance(sms, list) and sms else ""
    return [each.target, made + gpus, f"{len(each.files)} files", readable(each.bytes)]
