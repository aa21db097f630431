"""seglight: segmentation experiments on PyTorch Lightning."""

from seglight._lazy import lazy

__version__ = "0.1.0"

__getattr__, __all__ = lazy(
    __name__,
    {
        "InstanceModel": "models.instance",
        "SemanticModel": "models.semantic",
        "data": "",
        "load": "checkpoints",
        "models": "",
        "trainer_parts": "callbacks.parts",
    },
)
