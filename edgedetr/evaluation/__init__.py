"""Measuring: COCO metrics, paired bootstrap, matched-detection parity, the verdict."""
