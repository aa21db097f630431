"""Official datasets from their archives to the folders that `seglight.data` reads: `seglight data prepare`."""

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "Options": "state",
        "PrepareError": "words",
        "RECIPES": "recipes",
        "prepare": "run",
    },
)
