"""Quantization-aware training: a bundle's model learns with the rounding of its INT8 graph, from its float form."""
