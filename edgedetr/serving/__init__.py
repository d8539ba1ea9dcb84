"""Graphs and configurations for servers: whole camera frames, Triton, DeepStream."""
