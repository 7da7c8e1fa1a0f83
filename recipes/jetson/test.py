#!/usr/bin/env python3
"""Is the package whole, is TensorRT the system's, and do the plugins compile for this board?

jetson-containers runs it after the image was built, where there may be no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any


def moiie(*arguments: str) -> Any:
    """The JSON that a verb prints."""
    command = [sys.executable, "-m", "moiie_export.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - this interpreter
    if done.returncode not in (0, 4):  # 4: the doctor found something missing, and says what
        raise SystemExit(f"moiie {' '.join(arguments)} ended with {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    """Print what was found; the exit status is 0 when all is well."""
    for finding in moiie("doctor")["findings"]:
        print(f"{finding['status']:<5} {finding['name']}: {finding['detail']}")  # noqa: T201
        if finding["name"] == "jetson tensorrt" and finding["status"] == "warn":
            raise SystemExit(finding["hint"])
    with tempfile.TemporaryDirectory() as folder:
        built = moiie("plugins", "build", "--sm", "87,110", "--out", folder)
        print(f"plugins: {built['library']['bytes']} bytes, headers {built['tensorrt_headers']['version']}")  # noqa: T201


if __name__ == "__main__":
    main()
