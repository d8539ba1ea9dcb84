"""edgedetr trains DETR-family detectors, quantizes them to INT8 and proves that they stayed accurate."""

from edgedetr import telemetry

__version__ = "0.2.0"

telemetry.switch_off()  # before anything of this package can import a library that reports
