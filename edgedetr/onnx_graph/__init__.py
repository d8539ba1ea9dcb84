"""ONNX graphs: read them (io), index them (index), edit and convert them, and run them (session)."""
