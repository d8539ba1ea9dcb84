"""Lint: what in an ONNX graph TensorRT would refuse, compute wrongly or run slowly, found without a GPU."""
