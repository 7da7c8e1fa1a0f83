#!/usr/bin/env bash
# The plugins' kernels on a GPU: numerics against float64, then speed, then engines where a TensorRT is there, one table
# last. Needs python3 with torch, triton and numpy, and nothing of this project installed. `--interpret` runs toy sizes on a CPU; other options: --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
links=$(mktemp -d)
fresh=
trap 'rm -rf "$links" ${fresh:+"$fresh"}' EXIT
ln -s "$root/plugins" "$links/moiie_plugins"
ln -s "$root/runtime" "$links/moiie_runtime"
ln -s "$root/recipes" "$links/moiie_recipes"
# Wheels that are too large to travel in one piece: WHEEL_PARTS names a folder that is kept, with the parts that
# `split -b 36M NAME.whl NAME.whl.` makes. They are put together and unpacked there once.
wheels=
if [ -n "${WHEEL_PARTS:-}" ]; then
  wheels="$WHEEL_PARTS/unpacked"
  if [ ! -d "$wheels" ]; then
    fresh="$WHEEL_PARTS/partial.$$"
    mkdir -p "$fresh"
    for first in "$WHEEL_PARTS"/*.whl.aa; do
      [ -e "$first" ] || { echo "$WHEEL_PARTS: no parts of a wheel (NAME.whl.aa, NAME.whl.ab, ...)" >&2; exit 4; }
      cat "${first%aa}"?? >"$fresh/joined.whl"
      "${PYTHON:-python3}" -m zipfile -e "$fresh/joined.whl" "$fresh" || { echo "${first%.aa}: parts are missing or damaged" >&2; exit 4; }
      rm "$fresh/joined.whl"
    done
    mv "$fresh" "$wheels"
  fi
fi
cd "$root"
PYTHONPATH="$links:$root${wheels:+:$wheels}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 "${PYTHON:-python3}" -m tests.gpu.report "$@"
