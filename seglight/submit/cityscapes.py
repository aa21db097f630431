"""Cityscapes' evaluation server (www.cityscapes-dataset.com/submit), pixel level and instance level.

By cityscapesScripts, which the server runs: exactly one file per test image whose name begins with its city, sequence
and frame. Pixel level: a grey PNG of labelIds (not train ids), 2048x1024. Instance level: a text file with a line
"MASK.png LABELID CONFIDENCE" per object; masks are grey PNGs, anything but 0 is the object, their paths are relative to
the text file and hold no space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from seglight.cityscapes_ap import IDS, CityscapesAP
from seglight.cityscapes_scores import CLASSES
from seglight.data.findings import DataError, Fault
from seglight.submit.archive import Reader
from seglight.submit.benchmark import (
    Submission,
    Verdict,
    compare_names,
    has_labels,
    label_files,
    png,
    read_labels,
    size_of,
)

MASKS = "masks"
LEGAL = np.arange(256) <= 33


class CityscapesSubmission(Submission):
    """Of a semantic model for the pixel level, of an instance model for the instance level."""

    title = "Cityscapes"
    datasets: ClassVar = {"semantic": "Cityscapes", "instance": "CityscapesInstances"}
    splits: ClassVar = {"test": "test", "val": "val"}
    upload = "https://www.cityscapes-dataset.com/submit (an account is needed; it limits how often one may submit)"

    def entries(self, data: Any, image_id: str, index: int, prediction: Any) -> list[tuple[str, bytes]]:
        """A PNG of labelIds, or a text file and its masks."""
        if data.task == "semantic":
            ids = np.array(list(CLASSES.values()), np.uint8)
            return [(_labels_name(image_id), png(ids[prediction]))]
        from seglight.masks import decode

        numbers, lines, files = list(IDS.values()), [], []
        found = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), prediction["rles"], strict=True)
        for place, (label, score, rle) in enumerate(found):
            name = f"{MASKS}/{image_id}_{place:03}.png"
            lines.append(f"{name} {numbers[label]} {score:.7g}\n")
            files.append((name, png(decode([rle])[0].astype(np.uint8) * 255)))
        return [(f"{image_id}.txt", "".join(lines).encode()), *files]

    def look(self, archive: Reader, data: Any) -> Verdict:
        """Names, sizes and values of every file, and every line of the text files."""
        return self._look_at_labels(archive, data) if data.task == "semantic" else self._look_at_objects(archive, data)

    def _look_at_labels(self, archive: Reader, data: Any) -> Verdict:
        dataset = data.split("test")
        expected = {_labels_name(name): index for index, name in enumerate(dataset.ids)}
        faults = compare_names(archive.names, list(expected))
        metric = data.official_scores("test") if has_labels(dataset) else None
        train_ids = True
        for index, labels in label_files(archive, dataset, expected, LEGAL, None, faults):
            train_ids = train_ids and labels.max() < len(CLASSES)
            if metric is not None:
                truth = dataset.values(index)
                metric.add(dataset.ids[index], labels, np.where(truth == 255, 0, truth))
        if train_ids and not faults:
            rule = (
                f"no image holds a value above {len(CLASSES) - 1}, so these look like train ids 0..18. The server "
                "wants labelIds 0..33: 7 is road, 26 is car."
            )
            faults.append(Fault(3, rule, "all files"))
        scores = None if metric is None or faults else metric.compute()
        known = scores is not None and not np.isnan(scores.means["IoU"])  # the public labels of test are all void
        return Verdict(faults, len(archive.names), scores.as_table() if known else None)

    def _look_at_objects(self, archive: Reader, data: Any) -> Verdict:
        dataset = data.split("test")
        texts = {f"{name}.txt": index for index, name in enumerate(dataset.ids)}
        metric = CityscapesAP() if has_labels(dataset) else None
        faults: list[Fault] = []
        named: list[str] = []
        there = set(archive.names)
        for name in sorted(there & set(texts)):
            index, found = texts[name], []
            for mask, label, score in _lines(archive, name, faults):
                named.append(mask)
                if mask not in there:
                    continue
                try:
                    shape = read_labels(archive.read(mask), size_of(dataset, index), np.ones(256, bool), None)
                    found.append((label, score, _rle(shape)))
                except DataError as error:
                    faults.append(Fault(2, str(error).removeprefix(f"{mask}: "), mask))
            if metric is not None:
                labels, scores, rles = zip(*found, strict=True) if found else ((), (), ())
                detections = {"labels": np.array(labels, int), "scores": np.array(scores, float), "rles": list(rles)}
                metric.update(dataset.ids[index], dataset.parts[0].numbers(index), detections)
        faults += compare_names(archive.names, [*texts, *dict.fromkeys(named)])
        if len(named) > len(set(named)):
            faults.append(Fault(2, "named in more than one line; the scripts keep the last one.", _twice(named)))
        scores = None if metric is None or faults else metric.compute()
        known = scores is not None and not np.isnan(scores.ap)
        return Verdict(faults, len(archive.names), scores.as_table() if known else None)


def _labels_name(image_id: str) -> str:
    return f"{image_id}_labelIds.png"


def _lines(archive: Reader, name: str, faults: list[Fault]) -> Iterator[tuple[str, int, float]]:
    """Mask, label 0..7 and confidence of every good line of a text file."""
    labels = {number: label for label, number in enumerate(IDS.values())}
    try:
        text = archive.read(name).decode()
    except (DataError, UnicodeDecodeError) as error:
        faults.append(Fault(2, f"cannot be read ({error}).", name))
        return
    for place, line in enumerate(text.splitlines(), start=1):
        where, parts = f"{name}, line {place}", line.split(" ")
        try:
            mask, number, score = parts[0], int(parts[1]), float(parts[2])
        except (IndexError, ValueError):
            parts = []
        if len(parts) != 3:
            faults.append(Fault(2, "not a path, a labelId and a confidence with one space between them.", where))
        elif mask.startswith("/") or ".." in mask.split("/"):
            faults.append(Fault(2, "the path of the mask leaves the archive.", where))
        elif number not in labels:
            rule = f"a labelId without objects; legal are {', '.join(map(str, labels))} (not the labels 0..7)."
            faults.append(Fault(2, rule, where))
        elif not math.isfinite(score):
            faults.append(Fault(2, "a confidence that is not finite.", where))
        else:
            yield mask, labels[number], score


def _rle(shape: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask

    return mask.encode(np.asfortranarray(shape != 0, dtype=np.uint8))


def _twice(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
