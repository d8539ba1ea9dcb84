"""TensorRT engines on the device: built, checked, chosen and run."""
