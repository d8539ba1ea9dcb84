"""Detectors made elsewhere become bundles: ONNX files, and pretrained weights."""
