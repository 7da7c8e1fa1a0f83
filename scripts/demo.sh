#!/bin/sh
# A model from checkpoint to answer on a CPU: export, run, parity; then a trained one. Everything lands in build/demo.
# The first model is a tiny one with random weights that the tests use, so its answer is nonsense; the verdict is not.
# The second one was trained on drawn pictures and answers questions about one of them.
# usage: scripts/demo.sh [MOIIE]         (MOIIE: the command, `moiie` when left out)
set -eu
moiie=${1:-moiie}
case_dir=tests/golden/moiie_phi3
bundle=build/demo/moiie-phi3

step() {
  printf '\n$ moiie'
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./-]*) printf ' "%s"' "$word" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
  printf '\n'
  "$moiie" "$@"
}

step export "$case_dir/checkpoint" -o "$bundle"
step run "$bundle" -i "$case_dir/inputs/image_0.png" -p "What is shown in the picture?" --max-new-tokens 12 --routing
step parity "$bundle" --checkpoint "$case_dir/checkpoint"
step demo -o build/demo/trained
