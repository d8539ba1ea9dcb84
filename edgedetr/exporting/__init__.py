"""From PyTorch to ONNX, and the reference detections that travel with it."""
