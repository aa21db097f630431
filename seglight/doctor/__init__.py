"""The data doctor: looks at every file of a dataset and says what is wrong with it, worst first, and what to do.

`examine(source)` gives a `Report` of `Finding`s; `seglight data check` prints it.
"""

from __future__ import annotations

from seglight._lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "Finding": "findings",
        "Place": "findings",
        "Report": "findings",
        "examine": "examination",
    },
)
