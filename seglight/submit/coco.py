"""COCO's evaluation server, instance segmentation.

By cocodataset.org, "Upload" and "Results format": a zip named detections_SPLIT_ALG_results.zip that holds one file of
the same name with .json, in no folder: a list of {image_id, category_id, segmentation, score}. Categories are COCO's
own ids 1..90, masks compressed run lengths; up to 100 detections of an image count.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seglight.data.findings import DataError, Fault
from seglight.submit.archive import Reader
from seglight.submit.benchmark import Submission, Verdict

if TYPE_CHECKING:
    from rich.table import Table

MOST = 100
KEYS = {"image_id", "category_id", "segmentation", "score"}


class COCOSubmission(Submission):
    """The name of the method, ALG, is part of the archive's name."""

    title = "COCO instance segmentation"
    datasets: ClassVar = {"instance": "COCO"}
    splits: ClassVar = {"test": "test-dev2017", "val": "val2017"}
    upload = 'the server that cocodataset.org/#upload names, competition "detection (segmentation)", test-dev'

    def __init__(self, split: str):
        super().__init__(split)
        self._found: dict[int, list[dict[str, Any]]] = {}

    def rule_of_name(self) -> str | None:
        """Other names than the server's."""
        begin = f"detections_{self.splits[self.split]}_"
        if re.fullmatch(rf"{begin}[^_/]+_results\.zip", self.name):
            return None
        return (
            f"COCO's server takes no archive named {self.name}. Call it {begin}ALG_results.zip, with the name of your "
            "method, without an underscore, in place of ALG."
        )

    def entries(self, data: Any, image_id: str, index: int, prediction: Any) -> list[tuple[str, bytes]]:
        """Nothing yet: the results of all images are one file."""
        found = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), prediction["rles"], strict=True)
        best = sorted(found, key=lambda one: -one[1])[:MOST]
        self._found[index] = [
            {
                "image_id": int(image_id),
                "category_id": int(data.category_ids[label]),
                "segmentation": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
                "score": float(f"{score:.7g}"),
            }
            for label, score, rle in best
        ]
        return []

    def closing(self, data: Any) -> list[tuple[str, bytes]]:
        """The list of all results, in the order of the images."""
        results = [one for index in sorted(self._found) for one in self._found[index]]
        return [(f"{self.name.removesuffix('.zip')}.json", json.dumps(results, separators=(",", ":")).encode())]

    def look(self, archive: Reader, data: Any) -> Verdict:
        """The name, and every entry of the list: its image, its category, its score and the size of its mask."""
        name = archive.name.removesuffix(".zip") + ".json"
        if archive.names != [name]:
            held = ", ".join(archive.names[:3]) or "nothing"
            rule = f"the archive must hold exactly {name}, in no folder; it holds {held}."
            return Verdict([Fault(0, rule, archive.name)], len(archive.names), None)
        try:
            results = json.loads(archive.read(name))
        except (ValueError, DataError) as error:
            return Verdict([Fault(0, f"no json ({error}).", name)], 1, None)
        if not isinstance(results, list) or not results:
            return Verdict([Fault(0, "no list of results, or an empty one.", name)], 1, None)
        dataset = data.split("test")
        sizes = {int(one): dataset.size(index) for index, one in enumerate(dataset.ids)}
        categories = set(data.category_ids)
        faults, per_image = [], dict.fromkeys(sizes, 0)
        for place, one in enumerate(results):
            if rule := _rule(one, sizes, categories):
                faults.append(Fault(1, rule, f"entry {place}"))
            else:
                per_image[one["image_id"]] += 1
        crowded = [f"image {image}" for image, count in per_image.items() if count > MOST]
        faults += [
            Fault(2, f"more than {MOST} results: the server counts the best {MOST} only.", one) for one in crowded
        ]
        table = None if faults else _score(data, dataset, results)
        return Verdict(faults, 1, table)


def _rule(one: Any, sizes: dict[int, tuple[int, int]], categories: set[int]) -> str | None:
    """What is wrong with an entry."""
    if not isinstance(one, dict) or KEYS - set(one):
        return f"lacks one of {', '.join(sorted(KEYS))}."
    if type(one["image_id"]) is not int or one["image_id"] not in sizes:
        return "its image_id is not a number of this split's list; the server refuses the whole file."
    if type(one["category_id"]) is not int or one["category_id"] not in categories:
        return "its category_id is none of COCO's (1..90 with gaps); are they labels 0..79?"
    if type(one["score"]) not in (int, float) or not math.isfinite(one["score"]):
        return "its score is not a finite number."
    mask = one["segmentation"]
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        return "its segmentation is not compressed run lengths."
    if mask.get("size") != list(sizes[one["image_id"]]):
        return "its mask is not of the image's size (height, width)."
    return None if _covers(mask) else "the run lengths of its mask do not cover the image."


def _covers(mask: dict[str, Any]) -> bool:
    """Whether run lengths add up to the image."""
    from seglight.data.rle import run_lengths

    runs = run_lengths(mask["counts"].encode("ascii", "replace"))
    return runs is not None and bool((runs >= 0).all()) and int(runs.sum()) == mask["size"][0] * mask["size"][1]


def _score(data: Any, dataset: Any, results: list[dict[str, Any]]) -> Table | None:
    """COCO's scores, where the split's objects are public."""
    annotations = data.files["test"][1]
    if annotations.name.startswith("image_info_"):
        return None
    from seglight.coco_evaluation import evaluate_json

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        file.write_text(json.dumps(results))
        return evaluate_json(annotations, file).as_summary()
