"""From the PyTorch reference to ONNX graphs: translation of custom ops, ordered passes, external weights, checks."""
