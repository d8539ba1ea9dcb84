"""INT8 as Q/DQ pairs in the ONNX graph: observe, choose ranges, insert, translate to dialects."""
