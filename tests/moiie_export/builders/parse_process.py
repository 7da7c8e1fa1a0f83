"""Parses ONNX files with the parser of TensorRT for RTX in this one process; prints a line of JSON a file.

    python parse_process.py PLUGINS FILE...

A line has what the parser said against the file, and how many layers of each type it made of it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from moiie_export.builders.library import load_library, load_plugins


def main(plugins: Path, files: list[str]) -> None:
    library = load_library("tensorrt_rtx")
    load_plugins(library, plugins)
    trt = library.trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for file in files:
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(file)
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers)) if parsed else {}
        print(json.dumps({"file": file, "parsed": parsed, "said": said, "layers": layers}), flush=True)
        del parser, network


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
