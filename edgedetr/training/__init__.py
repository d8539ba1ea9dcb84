"""Training: data pipeline, matching, losses, optimizer, checkpoints, the loop."""
