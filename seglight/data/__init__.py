"""The datasets, one file each. A new one is its file and its line here."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "ADE20K": "ade20k",
        "COCO": "coco",
        "COCOFormat": "coco",
        "COCOSemantic": "coco_semantic",
        "COCOStuff": "cocostuff",
        "VOC": "voc",
        "CamVid": "camvid",
        "Cityscapes": "cityscapes",
        "CityscapesInstances": "cityscapes",
        "DataModule": "base",
        "Folder": "folder",
        "ISBI": "isbi",
        "InstanceDataModule": "instances",
        "InstanceDataset": "instances",
        "Mixed": "mixed",
        "PascalContext": "context",
        "SBD": "sbd",
        "SemanticDataModule": "base",
        "SemanticDataset": "base",
        "Shapes": "shapes",
        "ShapesInstances": "shapes",
        "VOCInstances": "voc",
    },
)
