"""ONNX graphs as text to be checked and as configurations for servers."""
