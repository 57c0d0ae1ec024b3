"""Calibration rows: from COCO, the user's own files or the embedded sample into one database."""
