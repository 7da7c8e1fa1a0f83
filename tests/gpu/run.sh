#!/usr/bin/env bash
# The plugins' kernels on a GPU: numerics against float64, then speed, then engines where a TensorRT is there, one table
# last. Needs python3 with torch, triton and numpy, and nothing of this project installed. `--interpret` runs toy sizes on a CPU; other options: --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root/plugins" "$links/moiie_plugins"
ln -s "$root/runtime" "$links/moiie_runtime"
ln -s "$root/recipes" "$links/moiie_recipes"
cd "$root"
PYTHONPATH="$links:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 "${PYTHON:-python3}" -m tests.gpu.report "$@"
