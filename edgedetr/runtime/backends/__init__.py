"""The libraries that run a model on a CPU or by ONNX Runtime's CUDA provider, behind one protocol."""
