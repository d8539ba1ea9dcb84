"""Lint: what TensorRT would refuse, compute wrongly or run slowly in an ONNX graph, found without a GPU."""
