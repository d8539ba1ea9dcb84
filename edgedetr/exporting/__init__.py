"""Export from PyTorch to ONNX, with the reference detections that the files are judged by."""
