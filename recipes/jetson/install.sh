#!/usr/bin/env bash
# Installs moiie-export into the Python that sees the system's TensorRT. MOIIE_EXPORT: a release (default), a wheel, or a
# folder with the sources. PYTHON: that Python (default: python3). CUDA_HOME: the system's CUDA (default: /usr/local/cuda).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

"$python" -c 'import tensorrt; print("TensorRT of the system:", tensorrt.__version__)'
# CUDA's Python bindings are those of the system's release: 12 on JetPack 6, 13 on JetPack 7.
release=$(readlink -f "${CUDA_HOME:-/usr/local/cuda}" | sed -n 's/.*cuda-\([0-9][0-9]*\).*/\1/p')
bindings=${release:+cuda-bindings==$release.*}
# cpu: ONNX Runtime for the CPU; build: what reads and writes graphs; plugins: what compiles the kernels; polygraphy: what
# `moiie parity --bisect` compares with; tensorrt: what runs engines beside the TensorRT that is there.
"$python" -m pip install --constraint "$here/forbidden.txt" ${bindings:+"$bindings"} \
    "${MOIIE_EXPORT:-moiie-export}[cpu,build,plugins,polygraphy,tensorrt]"
