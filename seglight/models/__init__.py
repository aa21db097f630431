"""The architectures, one file per family. A new one is its file and its line here."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "BaseModel": "base",
        "DeconvNet": "deconvnet",
        "DeepLabV2": "deeplabv2",
        "DeepLabV2VGG": "deeplabv2",
        "DeepLabV3": "deeplabv3",
        "DeepLabV3Cascade": "deeplabv3",
        "DeepLabV3Plus": "deeplabv3plus",
        "Dilation": "dilation",
        "EncNet": "encnet",
        "FCN8s": "fcn",
        "FCN8sAtOnce": "fcn",
        "FCN16s": "fcn",
        "FCN32s": "fcn",
        "FCN32sAlexNet": "fcn_trunks",
        "FCN32sGoogLeNet": "fcn_trunks",
        "FPNMaskProposal": "fpn_proposals",
        "FasterRCNN": "maskrcnn",
        "InstanceModel": "instance",
        "MaskEnsemble": "ensemble",
        "MaskRCNN": "maskrcnn",
        "MaskRCNNC4": "maskrcnn",
        "PANet": "panet",
        "PSPNet": "pspnet",
        "ParseNet": "parsenet",
        "SMP": "smp",
        "SemanticFPN": "fpn",
        "SemanticModel": "semantic",
        "TorchvisionSegmentation": "torchvision_seg",
        "UNet": "unet",
    },
)
