"""What every export in a process of its own would do anew; imported by the process that all of those are forks of."""

from __future__ import annotations

import torch
from tqdm import tqdm

from moiie_export.graph.trace import _quiet_exporter
from moiie_export.ops.op import OPSET
from tests.tracing import trace_quickly


def _export() -> None:
    with _quiet_exporter(), torch.no_grad(), torch.device("meta"):
        small = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), strict=False)
        torch.onnx.export(small, dynamo=True, optimize=False, verbose=False, opset_version=OPSET)


tqdm.monitor_interval = 0  # else the exporter's progress bar starts a thread, and there must be none to fork beside
trace_quickly()
_export()
