"""The datasets, one file each. A new one is its file and its line here."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "VOC": "voc",
        "CamVid": "camvid",
        "Cityscapes": "cityscapes",
        "Folder": "folder",
        "PascalContext": "context",
        "SemanticDataModule": "base",
        "SemanticDataset": "base",
        "Shapes": "shapes",
    },
)
