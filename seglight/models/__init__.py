"""The architectures, one file per family. A new one is its file and its line here."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "BaseModel": "base",
        "FCN8s": "fcn",
        "FCN8sAtOnce": "fcn",
        "FCN16s": "fcn",
        "FCN32s": "fcn",
        "InstanceModel": "instance",
        "SMP": "smp",
        "SemanticModel": "semantic",
        "UNet": "unet",
    },
)
