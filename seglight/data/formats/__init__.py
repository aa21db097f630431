"""Writes scenes in the file formats of well-known datasets, so that their readers can be tried without a download.

Each writer takes an output folder and the scenes of each split, and returns that folder. The folder must be new or
empty. Files are written beside it under a temporary name and moved when all are there: an interrupted run leaves no
half dataset. Names, folders, types and values are as in the real dataset; what the values stand for is written here.
"""

from __future__ import annotations

from seglight.data.formats.ade20k import write_ade20k
from seglight.data.formats.cityscapes import write_cityscapes
from seglight.data.formats.coco import write_coco
from seglight.data.formats.cocostuff import write_cocostuff
from seglight.data.formats.context import write_context, write_context_json
from seglight.data.formats.folder import write_folder
from seglight.data.formats.isbi import write_isbi
from seglight.data.formats.sbd import write_sbd
from seglight.data.formats.voc import write_voc

__all__ = [
    "write_ade20k",
    "write_cityscapes",
    "write_coco",
    "write_cocostuff",
    "write_context",
    "write_context_json",
    "write_folder",
    "write_isbi",
    "write_sbd",
    "write_voc",
]
