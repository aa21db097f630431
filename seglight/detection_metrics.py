"""The numbers of instance segmentation: average precision and recall by COCO's rules, of masks and of boxes.

`AveragePrecision` only collects what was found and what was there, as run lengths and boxes, and brings it together
over ranks; `evaluate` hands it to an official implementation; `InstanceScores` is what comes out.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from seglight.instance_scores import IOUS, RECALLS, SIZES, InstanceScores, Part, ap_limit
from seglight.official import mean

if TYPE_CHECKING:
    from seglight.types import InstanceTruth


class Image(NamedTuple):
    """What was found in one image and what was there. Plain arrays and bytes: small to keep, quick to send."""

    size: tuple[int, int]
    boxes: np.ndarray
    """float64 (N, 4), x y width height, as COCO writes boxes; the order of detections decides between equal scores."""
    labels: np.ndarray
    scores: np.ndarray
    rles: list[bytes] | None
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    truth_rles: list[bytes] | None
    crowd: np.ndarray
    area: np.ndarray


class AveragePrecision:
    """COCO's AP and AR of a set, exact over any number of ranks and any order of images.

    Ties between equal scores go by the image's id (as a number if all ids are), then by the order of detections: never
    by batches or ranks. Images without detections or without objects count: detections there are false.

    Args:
        classes: K names.
        max_detections: how many detections per image and class may count for the recalls AR1, AR10, ...; see
            `seglight.instance_scores.definitions`.
        agnostic: take all classes as one, as proposals are scored (FPN, section 5.2; COCO's useCats = 0).
        reference: evaluate by pycocotools itself. faster-coco-eval, the default, is several times as fast and gives the
            same numbers to 1e-12.
    """

    def __init__(
        self,
        classes: Sequence[str],
        max_detections: Sequence[int] = (1, 10, 100),
        agnostic: bool = False,
        reference: bool = False,
    ):
        if not classes:
            raise ValueError("AveragePrecision needs the names of its classes, at least one.")
        limits = tuple(max_detections)
        if not limits or min(limits) < 1 or list(limits) != sorted(set(limits)):
            raise ValueError(f"max_detections is {limits}, but must be growing numbers from 1, such as (1, 10, 100).")
        self.classes, self.limits = tuple(classes), limits
        self.agnostic, self.reference = agnostic, reference
        self.images: dict[str, Image] = {}

    def update(self, image_id: str, size: tuple[int, int], detections: Mapping[str, Any], truth: InstanceTruth) -> None:
        """Add one image.

        Args:
            image_id: unique in the set.
            size: height and width of the image.
            detections: `boxes`, `labels` and `scores` as in `seglight.types.Detections`, any device, any order, and
                `rles`, run lengths of their masks by `seglight.masks.encode`. Without `rles` only boxes are scored.
            truth: the annotated objects.

        Raises:
            ValueError: an image for the second time, labels out of range, boxes or scores that are not finite, or
                masks of another number or size.
        """
        if image_id in self.images:
            raise ValueError(_twice(image_id))
        size = (int(size[0]), int(size[1]))
        boxes, labels = self._objects(image_id, "detection", detections, size)
        scores = _array(detections["scores"], np.float64)
        if scores.shape != labels.shape or not np.isfinite(scores).all():
            raise ValueError(
                f"Image {image_id}: the scores {scores[:5]} do not fit {len(labels)} detections; "
                "give one finite number each."
            )
        truth_boxes, truth_labels = self._objects(image_id, "object", truth, size)
        crowd, area = _array(truth["iscrowd"], bool), _array(truth["area"], np.float64)
        if crowd.shape != truth_labels.shape or area.shape != truth_labels.shape or not np.isfinite(area).all():
            raise ValueError(f"Image {image_id}: iscrowd and area do not fit its {len(truth_labels)} objects.")
        found, there = (
            None if part.get("rles") is None else [r["counts"] for r in part["rles"]] for part in (detections, truth)
        )
        self.images[image_id] = Image(size, boxes, labels, scores, found, truth_boxes, truth_labels, there, crowd, area)

    def _objects(
        self, image_id: str, what: str, part: Mapping[str, Any], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes, x y width height, and labels of detections or objects, checked together with their masks."""
        boxes, labels = _array(part["boxes"], np.float64).reshape(-1, 4), _array(part["labels"], np.int64)
        if len(boxes) != len(labels):
            raise ValueError(f"Image {image_id}: {len(boxes)} boxes and {len(labels)} labels; one each per {what}.")
        wrong = (labels < 0) | (labels >= len(self.classes))
        if wrong.any():
            raise ValueError(
                f"Image {image_id}: a {what} has the label {labels[wrong][0]}, but with {len(self.classes)} classes "
                f"only 0..{len(self.classes) - 1} are legal; the background is none of them."
            )
        boxes[:, 2:] -= boxes[:, :2]
        wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"Image {image_id}: the box of {what} {i} is {_array(part['boxes'], np.float64)[i].tolist()}; "
                "boxes are x1 y1 x2 y2, finite, with x2 >= x1 and y2 >= y1."
            )
        rles = part.get("rles")
        if rles is not None and (len(rles) != len(labels) or any(tuple(r["size"]) != size for r in rles)):
            raise ValueError(
                f"Image {image_id} is {size[0]} x {size[1]} (height x width) with {len(labels)} {what}s, but there "
                f"are {len(rles)} masks of the sizes {sorted({tuple(r['size']) for r in rles})[:3]}; give one each, "
                "of the image's size."
            )
        return boxes, labels

    def compute(self) -> InstanceScores:
        """Return the scores of all images of all ranks; every rank must call it.

        The first rank evaluates, the others wait for what it says: nothing is computed twice.

        Raises:
            ValueError: no image at all, an image on two ranks, or masks for some images only.
        """
        return over_ranks(
            self.images, lambda images: evaluate(images, self.classes, self.limits, self.agnostic, self.reference)
        )

    def reset(self) -> None:
        """Forget all images."""
        self.images = {}


def over_ranks(images: Mapping[str, Any], work: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return `work(images of all ranks)` on every rank, or raise its error there. Only the first rank does the work."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return work(images)
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(images, parts, dst=0)
    answer: list[Any] = [None, RuntimeError("The scores could not be computed; see the error of rank 0.")]
    try:
        if parts is not None:
            whole: dict[str, Any] = {}
            for name, image in (item for part in parts for item in part.items()):
                if name in whole:
                    raise ValueError(_twice(name))
                whole[name] = image
            answer = [work(whole), None]
    except ValueError as error:
        answer = [None, error]
    finally:  # whatever happened: the others would wait for ever
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def evaluate(
    images: Mapping[str, Image],
    classes: Sequence[str],
    limits: tuple[int, ...] = (1, 10, 100),
    agnostic: bool = False,
    reference: bool = False,
) -> InstanceScores:
    """Return the scores of a set. Args: as `AveragePrecision`; `images` by their ids, in any order."""
    if not images:
        raise ValueError("There is no image to evaluate: the metric was never updated, or the split is empty.")
    numbers = all(re.fullmatch(r"-?\d+", name) for name in images)
    ordered = [images[name] for name in sorted(images, key=lambda name: (int(name), name) if numbers else name)]
    masked = [image.rles is not None and image.truth_rles is not None for image in ordered]
    if any(masked) and not all(masked):
        without = sorted(name for name, image in images.items() if image.rles is None or image.truth_rles is None)
        raise ValueError(f"Image {without[0]} has no masks, but others have: give masks for all images, or for none.")
    if agnostic:
        classes = ("object",)
    truth, found = _annotations(ordered, agnostic)
    objects = np.zeros(len(classes), dtype=np.int64)
    for image in ordered:
        np.add.at(objects, image.truth_labels[~image.crowd] * (not agnostic), 1)
    sizes = [image.size for image in ordered]
    masks = None
    if all(masked):
        masks = _part("segm", sizes, truth, found, len(classes), limits, reference)
        for one in found:  # the size of a detection is that of its mask or its box, whichever is scored
            one["area"] = one["bbox"][2] * one["bbox"][3]
    boxes = _part("bbox", sizes, truth, found, len(classes), limits, reference)
    return InstanceScores(tuple(classes), tuple(limits), masks, boxes, objects, len(images), agnostic)


def _annotations(images: Sequence[Image], agnostic: bool) -> tuple[list[dict], list[dict]]:
    """Objects and detections as COCO's tools know them. Every id is from 1: to them, 0 means that nothing matched."""
    from seglight.masks import areas

    truth, found = [], []
    for image_id, image in enumerate(images, 1):
        size = list(image.size)
        # useCats = 0 goes through the classes in turn
        order = np.argsort(image.truth_labels, kind="stable") if agnostic else range(len(image.truth_labels))
        boxes, labels = image.truth_boxes.tolist(), (image.truth_labels * (not agnostic) + 1).tolist()
        crowd, area = image.crowd.tolist(), image.area.tolist()
        for i in order:
            one = {"id": len(truth) + 1, "image_id": image_id, "category_id": labels[i], "bbox": boxes[i]}
            one |= {"iscrowd": int(crowd[i]), "area": area[i]}
            if image.truth_rles is not None:
                one["segmentation"] = {"size": size, "counts": image.truth_rles[i]}
            truth.append(one)
        order = np.argsort(image.labels, kind="stable") if agnostic else range(len(image.labels))
        boxes, labels = image.boxes.tolist(), (image.labels * (not agnostic) + 1).tolist()
        scores, area = image.scores.tolist(), (image.boxes[:, 2] * image.boxes[:, 3]).tolist()
        rles = None if image.rles is None else [{"size": size, "counts": counts} for counts in image.rles]
        if rles is not None:
            area = areas(rles).tolist()
        for i in order:
            one = {"id": len(found) + 1, "image_id": image_id, "category_id": labels[i], "bbox": boxes[i]}
            one |= {"score": scores[i], "area": area[i], "iscrowd": 0}
            if rles is not None:
                one["segmentation"] = rles[i]
            found.append(one)
    return truth, found


def _part(
    kind: str,
    sizes: Sequence[tuple[int, int]],
    truth: list[dict],
    found: list[dict],
    classes: int,
    limits: tuple[int, ...],
    reference: bool,
) -> Part:
    """Scores of masks ("segm") or boxes ("bbox") by pycocotools, if `reference`, or faster-coco-eval."""
    options: dict[str, Any] = {}
    if reference:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        options["rle_iou_max_workers"] = 1  # threads gain nothing here, and other ranks need the cores
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    images = [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes, 1)]
    categories = [{"id": i, "name": str(i)} for i in range(1, classes + 1)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        both = COCO(), COCO()
        for one, annotations in zip(both, (truth, found), strict=True):
            one.dataset = {"images": images, "annotations": annotations, "categories": categories}
            one.createIndex()
        work = COCOeval(*both, iouType=kind, **options)
        work.params.iouThrs, work.params.recThrs = IOUS, RECALLS
        work.params.areaRng, work.params.areaRngLbl = [list(pixels) for pixels in SIZES.values()], list(SIZES)
        work.params.maxDets = list(limits)
        work.evaluate()
        work.accumulate()
    precision, recall = (np.array(work.eval[key]) for key in ("precision", "recall"))
    precision[precision < 0], recall[recall < 0] = np.nan, np.nan  # -1: no object
    at = limits.index(ap_limit(limits))
    values = {"AP": mean(precision[:, :, :, 0, at])}
    values |= {"AP50": mean(precision[0, :, :, 0, at]), "AP75": mean(precision[5, :, :, 0, at])}
    values |= {f"AP{letter}": mean(precision[:, :, :, a, at]) for a, letter in enumerate(SIZES) if letter}
    values |= {f"AR{limit}": mean(recall[:, :, 0, m]) for m, limit in enumerate(limits)}
    values |= {f"AR{letter}": mean(recall[:, :, a, -1]) for a, letter in enumerate(SIZES) if letter}
    curves = precision[:, :, :, 0, at]
    return Part(
        values=values,
        precision=curves,
        ap=curves.mean((0, 1)),
        ap50=curves[0].mean(0),
        ar=recall[:, :, 0, -1].mean(0),
    )


def _array(values: Any, dtype: type) -> np.ndarray:
    """A copy on the host."""
    return np.array(values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values, dtype=dtype)


def _twice(image_id: str) -> str:
    return (
        f"Image {image_id} was counted twice: ids must be unique in a split, and no sampler may pad the set by "
        "repeating images (seglight.data.samplers does not). Call reset between two passes."
    )
