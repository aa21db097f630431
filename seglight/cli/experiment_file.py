"""An experiment's YAML, read so that its short forms mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import get_loader

PARTS = ("model", "data", "trainer")


class UsageError(ValueError):
    """Something about the command or the experiment is wrong; the text says what to do."""


def load_yaml(text: str) -> Any:
    """Read an experiment so that its short forms mean what they say.

    jsonargparse takes `model: FCN8s` followed by `model.lr: 0.1`, or `data: part.yaml` followed by
    `data.batch_size: 4`, for a part of which nothing but the override is known, silently. Here the class name or the
    file takes its long form first, `model.lr` means `model.init_args.lr`, and an override above what it overrides is
    an error.

    Raises:
        UsageError: an override stands above its part, or the part does not exist.
    """
    tree = get_loader("yaml")(text)
    if not isinstance(tree, dict):
        return tree
    seen: dict[str, Any] = {}
    for key, value in tree.items():
        head, *path = str(key).split(".")
        if not path:
            seen[key] = _long_form(value) if key in PARTS else value
        elif head not in tree:  # the part comes from another file, or is a default
            seen[key] = value
        elif head not in seen:
            raise UsageError(f"'{key}' stands above '{head}:', which would replace it. Move it below '{head}:'.")
        else:
            if head in ("model", "data") and path[0] not in ("class_path", "init_args", "dict_kwargs"):
                path.insert(0, "init_args")
            _override(seen[head], path, value)
    return seen


def _long_form(value: Any) -> Any:
    """`FCN8s` and `part.yaml` as mappings; jsonargparse stands in the experiment's folder while it reads it."""
    if not isinstance(value, str):
        return value
    if not value.endswith((".yaml", ".yml")):
        return {"class_path": value}
    if not Path(value).is_file():
        raise UsageError(f"The experiment names the part {value}, but there is no {Path(value).resolve()}.")
    return _long_form(get_loader("yaml")(Path(value).read_text()))


def _override(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one field deep in a part; `name+` appends to a list."""
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    if last.endswith("+"):
        tree[last[:-1]] = [*(tree.get(last[:-1]) or []), value]
    else:
        tree[last] = value
