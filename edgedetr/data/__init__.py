"""Images and boxes: readers for COCO, YOLO and VOC layouts, decoding, checks, the rendered demo set."""
