"""Data sets: readers of COCO, YOLO and VOC layouts, image decoding, checks, the rendered demo set."""
