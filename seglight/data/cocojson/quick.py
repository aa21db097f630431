"""Many annotations at once, if all of them are ordinary: several times as fast as one by one.

simdjson parses a piece of a file and hands over the numbers of a polygon as one buffer, without an object for each.
Whatever is not ordinary, from a missing box to a broken text, is left to `seglight.data.cocojson.lists`, which knows
why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import simdjson

from seglight.data.cocojson.lists import ID, SIDE, Unusable, rle_of

_FLOAT = 8  # bytes
_PARSER = simdjson.Parser()  # kept: memory for a new one would cost as much time as the parsing


def columns(text: bytes) -> dict[str, np.ndarray] | None:
    """As `Annotations.columns`, of a json list of annotations.

    Returns:
        None unless each has everything, has no list of something else in it and breaks no rule. (Of a key that an
        annotation has twice, simdjson sees the first, Python's json the last.)
    """
    ids, crowds, areas, boxes, parts, lengths, points = [], [], [], [], [], [], []
    rles, brackets = {}, 1
    try:
        for one in _PARSER.parse(text):
            ids += one["id"], one["image_id"], one["category_id"]
            crowds.append(one.get("iscrowd", 0))
            areas.append(one["area"])
            boxes.append(one["bbox"].as_buffer(of_type="d"))
            outline = one["segmentation"]
            if isinstance(outline, simdjson.Object):
                rle = outline.as_dict()
                rles[len(parts)] = rle_of(rle)
                brackets += sum(isinstance(value, list) for value in rle.values()) - 1
                parts.append(0)
                continue
            if not len(outline):
                return None
            parts.append(len(outline))
            for polygon in outline:
                lengths.append(len(polygon))
                points.append(polygon.as_buffer(of_type="d"))
        numbers = np.array(ids, np.int64).reshape(-1, 3)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError, Unusable):
        return None
    if text.count(b"[") != brackets + 2 * len(parts) + len(lengths):  # lists in a list of numbers would be made flat
        return None
    if not {*map(type, ids), *map(type, crowds)} <= {int} or not {*map(type, areas)} <= {int, float}:
        return None
    if not {*crowds} <= {0, 1} or any(box.size != 4 * _FLOAT for box in boxes):
        return None
    if any(length < 6 or length % 2 for length in {*lengths}):
        return None
    rle_lengths, rle_sizes = np.zeros(len(parts), np.int64), np.zeros((len(parts), 2), np.int64)
    for row, (runs, size) in rles.items():
        rle_lengths[row], rle_sizes[row] = len(runs), size
    return {
        "ids": numbers[:, 0],
        "image_ids": numbers[:, 1],
        "category_ids": numbers[:, 2],
        "iscrowd": np.array(crowds, np.int8),
        "area": np.array(areas, float),
        "boxes": np.frombuffer(b"".join(boxes)),
        "parts": np.array(parts, np.int64),
        "part_lengths": np.array(lengths, np.int64),
        "points": np.frombuffer(b"".join(points)),
        "rle_lengths": rle_lengths,
        "rle_sizes": rle_sizes.ravel(),
        "rle": np.frombuffer(b"".join(runs for runs, _ in rles.values()), np.uint8),
    }


def entries(text: bytes, lists: Collection[str]) -> Iterator[tuple[str, int | None, Any]]:
    """As `seglight.data.cocojson.stream.entries`, but ordinary images come at once, with the name of their list.

    Raises:
        ValueError: no json object for simdjson, before the first entry.
    """
    try:
        document = simdjson.Parser().parse(text)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if not isinstance(document, simdjson.Object) or len({*document}) < len(document):
        raise ValueError("no mapping, or a key is there twice")
    for name in document:
        value = document[name]
        if name in lists and isinstance(value, simdjson.Array):
            together = _images(value) if name == "images" else None
            yield name, None, together
            for number, one in enumerate(value) if together is None else ():
                yield name, number, _plain(one)


def _images(listed: simdjson.Array) -> tuple[list[int], list[str], list[int], list[int]] | None:
    """What `Images.extend` takes."""
    ids, names, sides = [], [], []
    try:
        for one in listed:
            ids.append(one["id"])
            names.append(one["file_name"])
            sides += one["height"], one["width"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
        return None
    if not {*map(type, ids), *map(type, sides)} <= {int} or not {*map(type, names)} <= {str}:
        return None
    if len({*ids}) < len(ids) or len({*names}) < len(names) or max(ids, default=0) > ID:
        return None
    if min(sides, default=1) < 1 or max(sides, default=1) > SIDE:
        return None
    return ids, names, sides[::2], sides[1::2]


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value
