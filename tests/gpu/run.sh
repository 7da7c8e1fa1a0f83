#!/usr/bin/env bash
# The plugins' kernels on a GPU: numerics against float64, then speed, then engines where a TensorRT is there, one table
# last. Needs python3 with torch, triton and numpy, and nothing of this project installed; engines also take the packages of
# the base install and cuda-bindings, and onnx, onnx-ir and ml-dtypes where they are built here and did not travel in the bundle.
# `--interpret` runs toy sizes on a CPU; other options: --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
links=$(mktemp -d)
fresh=
trap 'rm -rf "$links" ${fresh:+"$fresh"}' EXIT
ln -s "$root/plugins" "$links/moiie_plugins"
ln -s "$root/runtime" "$links/moiie_runtime"
ln -s "$root/recipes" "$links/moiie_recipes"
# What is not installed there travels as wheels: WHEEL_PARTS names a folder that is kept, with wheels, or, of those that are
# too large to travel in one piece, the parts that `split -b 36M NAME.whl NAME.whl.` makes. They are unpacked there once.
wheels=
if [ -n "${WHEEL_PARTS:-}" ]; then
  wheels="$WHEEL_PARTS/unpacked"
  if [ ! -d "$wheels" ]; then
    fresh="$WHEEL_PARTS/partial.$$"
    mkdir -p "$fresh"
    for first in "$WHEEL_PARTS"/*.whl.aa "$WHEEL_PARTS"/*.whl; do
      [ -e "$first" ] || continue
      wheel=$first
      if [ "$first" != "${first%.aa}" ]; then
        wheel="$fresh/joined.whl"
        cat "${first%aa}"?? >"$wheel"
      fi
      "${PYTHON:-python3}" -m zipfile -e "$wheel" "$fresh" || { echo "${first%.aa}: is damaged, or parts are missing" >&2; exit 4; }
      rm -f "$fresh/joined.whl"
      unpacked=yes
    done
    [ -n "${unpacked:-}" ] || { echo "$WHEEL_PARTS: no wheels (NAME.whl) and no parts of one (NAME.whl.aa, NAME.whl.ab, ...)" >&2; exit 4; }
    mv "$fresh" "$wheels"
  fi
fi
cd "$root"
PYTHONPATH="$links:$root${wheels:+:$wheels}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 "${PYTHON:-python3}" -m tests.gpu.report "$@"
