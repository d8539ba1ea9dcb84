"""Building blocks, one idea per file: modules on tensors."""
