"""edgedetr trains DETR-family detectors, quantises them to INT8 and proves that they stayed accurate."""

__version__ = "0.1.0"
