"""Detectors that their authors published: the table of them, and how their files come to this machine."""
