"""Pretrained weights: found, read within limits, their configuration inferred, their names converted."""
