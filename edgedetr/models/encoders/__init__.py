"""Necks and encoders: feature maps of the backbone to the memory that queries read."""
