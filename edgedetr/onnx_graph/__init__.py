"""ONNX graphs: read, indexed, inferred, rewritten and written."""
