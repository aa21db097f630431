"""A failing logger never stops training."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any


def never_stops(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a logger (or a function of one) warn, once per kind of failure, instead of raising."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # A full disk or a lost server must not end a training that works. Only here.
            kind = (type(self).__name__, method.__name__.strip("_"), type(error).__name__)
            told = self.__dict__.setdefault("_failures", set())
            if kind not in told:
                told.add(kind)
                reason = " ".join(str(error).split())
                text = (
                    f"{kind[0]}.{kind[1]} failed, training goes on without it ({kind[2]}: {reason}). "
                    f"Further failures of this kind are not reported."
                )
                print(f"seglight: {text}", file=sys.stderr, flush=True)  # during a fit, warnings reach train.log only
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return None

    return guarded
