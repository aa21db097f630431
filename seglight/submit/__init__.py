"""Archives for the servers of benchmarks: written from a model's predictions, and checked against the dataset's list.

Each benchmark is a file with one class; `seglight.submit.benchmark` says what such a class has. One process does the
work: a submission is made once, and its order of files is part of it.
"""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "VOCSubmission": "voc",
        "CityscapesSubmission": "cityscapes",
        "COCOSubmission": "coco",
        "ContextSubmission": "context",
        "check": "run",
        "make": "run",
    },
)

BENCHMARKS = {
    "voc": "VOCSubmission",
    "cityscapes": "CityscapesSubmission",
    "coco": "COCOSubmission",
    "context": "ContextSubmission",
}
"""Name on the command line and class."""
