"""Evaluation: COCO metrics, paired bootstrap, agreement of detections, the verdict on each file of a bundle."""
