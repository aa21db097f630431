"""Writes scenes in the file formats of well-known datasets, so that their readers can be tried without a download.

Each writer takes an output folder and the scenes of each split, and returns that folder. The folder must be new or
empty. Files are written beside it under a temporary name and moved when all are there: an interrupted run leaves no
half dataset. Names, folders, types and values are as in the real dataset; what the values stand for is written here.
"""

from __future__ import annotations

from seglight.data.formats.cityscapes import write_cityscapes
from seglight.data.formats.coco import write_coco
from seglight.data.formats.context import write_context
from seglight.data.formats.folder import write_folder
from seglight.data.formats.voc import write_voc

__all__ = ["write_cityscapes", "write_coco", "write_context", "write_folder", "write_voc"]
