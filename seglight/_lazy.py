"""Public names that import their module when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """A module `__getattr__` and `__all__` for names that live in submodules of `package`.

    Args:
        package: `__name__` of the package.
        names: public name to submodule; an empty submodule means the name is a submodule itself.
    """

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{names[name] or name}")
        return getattr(module, name) if names[name] else module

    return getattr_, sorted(names)
