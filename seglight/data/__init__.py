"""The datasets, one file each. A new one is its file and its line here."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "COCO": "coco",
        "COCOFormat": "coco",
        "VOC": "voc",
        "CamVid": "camvid",
        "Cityscapes": "cityscapes",
        "CityscapesInstances": "cityscapes",
        "DataModule": "base",
        "Folder": "folder",
        "InstanceDataModule": "instances",
        "InstanceDataset": "instances",
        "PascalContext": "context",
        "SemanticDataModule": "base",
        "SemanticDataset": "base",
        "Shapes": "shapes",
        "ShapesInstances": "shapes",
        "VOCInstances": "voc",
    },
)
