"""Quantization: observe ranges, decide which layers become INT8, and write Q/DQ pairs for each target."""
