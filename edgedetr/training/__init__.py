"""Training: data pipeline, matching, losses, optimiser, checkpoints, the loop."""
