"""Annotation files in COCO's json format: read once, kept as flat arrays that all processes share."""
