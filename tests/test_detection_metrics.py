"""AP and AR against a literal implementation, pycocotools by hand, and the numbers that COCO's own files give."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask

from seglight.coco_evaluation import evaluate_json
from seglight.detection_metrics import AveragePrecision, evaluate
from seglight.instance_scores import SIZES, definitions

H, W = 40, 50


def scene(seed: int, images: int = 6, classes: int = 3) -> dict[str, dict]:
    """Images with crowds, equal scores, doubles, empty and zero-area objects, areas on COCO's borders, empty images."""
    rng = np.random.default_rng(seed)

    def shape() -> tuple[np.ndarray, list[float]]:
        x, y = rng.integers(0, W), rng.integers(0, H)
        w, h = rng.integers(0, W - x + 1), rng.integers(0, H - y + 1)
        dense = np.zeros((H, W), dtype=np.uint8, order="F")
        dense[y : y + h, x : x + w] = 1
        if rng.random() < 0.3:
            dense[rng.random((H, W)) < 0.2] ^= 1
        return dense, [float(x), float(y), float(x + w), float(y + h)]

    out = {}
    for i in range(images):
        there = [shape() for _ in range(rng.integers(0, 6))]
        found = []
        for _ in range(rng.integers(0, 15)):
            dense, box = shape()
            if there and rng.random() < 0.8:
                dense, box = there[rng.integers(len(there))]
                dense, box = (
                    np.asfortranarray(np.roll(dense, rng.integers(0, 4), 1)),
                    [box[0], box[1], box[2] + 2, box[3]],
                )
            found.append((dense, box, float(rng.choice([0.1, 0.3, 0.5, 0.7, rng.random()]))))
        area = [float(d.sum()) if rng.random() < 0.7 else float(rng.choice([0, 1024, 9216, 5000])) for d, _ in there]
        out[str(i)] = {
            "size": (H, W),
            "detections": {
                "boxes": torch.tensor([box for _, box, _ in found], dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(rng.integers(0, classes, len(found))),
                "scores": torch.tensor([score for _, _, score in found], dtype=torch.float32),
                "rles": [mask.encode(dense) for dense, _, _ in found],
            },
            "truth": {
                "boxes": torch.tensor([box for _, box in there], dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(rng.integers(0, classes, len(there))),
                "rles": [mask.encode(dense) for dense, _ in there],
                "iscrowd": torch.tensor(rng.random(len(there)) < 0.25),
                "area": torch.tensor(area, dtype=torch.float64),
            },
        }
    return out


def metric(images: dict[str, dict], classes: int = 3, **options) -> AveragePrecision:
    out = AveragePrecision([f"class {i}" for i in range(classes)], **options)
    for name, image in images.items():
        out.update(name, image["size"], image["detections"], image["truth"])
    return out


def as_coco(images: dict[str, dict], classes: int = 3) -> tuple[dict, list[dict]]:
    """The same as json: annotations and results, ids from 1."""
    document = {"categories": [{"id": i + 1, "name": f"class {i}"} for i in range(classes)], "images": []}
    document["annotations"], results = [], []
    for name, image in images.items():
        document["images"].append({"id": int(name), "height": H, "width": W})
        for kind, out in (("truth", document["annotations"]), ("detections", results)):
            part = image[kind]
            for i in range(len(part["labels"])):
                x0, y0, x1, y1 = part["boxes"][i].double().tolist()
                one = {"id": len(out) + 1, "image_id": int(name), "category_id": int(part["labels"][i]) + 1}
                one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
                one["segmentation"] = {"size": [H, W], "counts": part["rles"][i]["counts"].decode()}
                if kind == "truth":
                    one |= {"iscrowd": int(part["iscrowd"][i]), "area": float(part["area"][i])}
                else:
                    one["score"] = float(part["scores"][i])
                out.append(one)
    return document, results


def by_hand(document: dict, results: list[dict], kind: str, limits=(1, 10, 100), use_cats: int = 1):
    """pycocotools as its demo uses it: a COCOeval."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(document))
        truth.createIndex()
        drop = "bbox" if kind == "segm" else "segmentation"
        work = COCOeval(truth, truth.loadRes([{k: v for k, v in r.items() if k != drop} for r in results]), kind)
        work.params.maxDets, work.params.useCats = list(limits), use_cats
        work.evaluate()
        work.accumulate()
        if tuple(limits) == (1, 10, 100):
            work.summarize()
    return work


def literal(images: dict[str, dict], kind: str, classes: int, limits: tuple[int, ...]) -> dict[str, float]:
    """COCO's rules from their description, object by object, on dense masks."""
    ious = [0.5 + 0.05 * i for i in range(10)]

    def shapes(part: dict) -> list:
        if kind == "bbox":
            return part["boxes"].double().tolist()
        return [mask.decode(rle).astype(bool) for rle in part["rles"]]

    def size(a) -> float:
        return (a[2] - a[0]) * (a[3] - a[1]) if kind == "bbox" else float(a.sum())

    def overlap(a, b, crowd: bool) -> float:
        if kind == "bbox":
            w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            shared = w * h if w > 0 and h > 0 else 0.0
        else:
            shared = float((a & b).sum())
        whole = size(a) if crowd else size(a) + size(b) - shared
        return shared / whole if shared else 0.0

    precisions, recalls = {}, {}
    for letter, (low, high) in SIZES.items():
        for limit in limits:
            for k in range(classes):
                for t in ious:
                    entries, count = [], 0
                    for name in sorted(images, key=int):
                        found, there = images[name]["detections"], images[name]["truth"]
                        a, b = shapes(found), shapes(there)
                        mine = [i for i in range(len(b)) if there["labels"][i] == k]
                        off = {i: bool(there["iscrowd"][i]) or not low <= there["area"][i] <= high for i in mine}
                        count += sum(not off[i] for i in mine)
                        order = [i for i in range(len(a)) if found["labels"][i] == k]
                        order = sorted(order, key=lambda i: -found["scores"][i].item())[:limit]
                        taken = set()
                        for d in order:
                            best = None
                            for ignored in (False, True):
                                least = min(t, 1 - 1e-10)
                                for g in mine:
                                    crowd = bool(there["iscrowd"][g])
                                    if off[g] != ignored or (g in taken and not crowd):
                                        continue
                                    iou = overlap(a[d], b[g], crowd)
                                    if iou >= least - 1e-12:
                                        best, least = g, iou
                                if best is not None:
                                    break
                            if best is not None:
                                taken.add(best)
                            outside = not low <= size(a[d]) <= high
                            if (best is not None and off[best]) or (best is None and outside):
                                continue
                            entries.append((found["scores"][d].item(), best is not None))
                    if not count:
                        continue
                    entries.sort(key=lambda entry: -entry[0])
                    hits = np.cumsum([hit for _, hit in entries]) if entries else np.zeros(0)
                    recall = hits / count
                    precision = hits / np.arange(1, len(hits) + 1)
                    reached = [precision[recall >= r - 1e-12] for r in np.linspace(0, 1, 101)]
                    precisions[letter, limit, k, t] = np.mean([p.max() if len(p) else 0.0 for p in reached])
                    recalls[letter, limit, k, t] = recall[-1] if len(recall) else 0.0

    def mean(table: dict, letter: str, limit: int, at: float | None = None) -> float:
        values = [v for (s, m, _, t), v in table.items() if s == letter and m == limit and at in (None, t)]
        return float(np.mean(values)) if values else math.nan

    few, most = (100 if 100 in limits else limits[-1]), limits[-1]
    out = {"AP": mean(precisions, "", few), "AP50": mean(precisions, "", few, ious[0])}
    out |= {"AP75": mean(precisions, "", few, ious[5])}
    out |= {f"AP{s}": mean(precisions, s, few) for s in "sml"}
    out |= {f"AR{limit}": mean(recalls, "", limit) for limit in limits}
    return out | {f"AR{s}": mean(recalls, s, most) for s in "sml"}


def same(a: dict[str, float], b: dict[str, float], within: float = 1e-9) -> None:
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0, atol=within, equal_nan=True)


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [(1, 10, 100), (2, 3)])
def test_equals_a_literal_implementation(seed, limits):
    images = scene(seed, images=4, classes=2)
    scores = metric(images, 2, max_detections=limits).compute()
    same(scores.masks.values, literal(images, "segm", 2, limits))
    same(scores.boxes.values, literal(images, "bbox", 2, limits))


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(10, 24))
def test_equals_pycocotools_by_hand_in_either_way(seed):
    images = scene(seed, images=1 + seed % 9)
    document, results = as_coco(images)
    if not results:
        pytest.skip("pycocotools cannot load an empty list of results")
    for reference in (False, True):
        scores = metric(images, reference=reference).compute()
        for kind, part in (("segm", scores.masks), ("bbox", scores.boxes)):
            work = by_hand(document, results, kind)
            expected = np.where(work.stats < 0, np.nan, work.stats)
            np.testing.assert_allclose(list(part.values.values()), expected, rtol=0, atol=1e-12, equal_nan=True)
            curve = work.eval["precision"][:, :, :, 0, 2]
            np.testing.assert_allclose(np.nan_to_num(part.precision, nan=-1), curve, rtol=0, atol=1e-12)


@pytest.mark.fidelity
@pytest.mark.parametrize("seed", range(40, 43))
@pytest.mark.parametrize("reference", [False, True])
def test_class_agnostic_recall(seed, reference):
    """AR@1000 equals pycocotools without categories, and equals all objects relabelled to one class."""
    images, limits = scene(seed), (1, 100, 1000)
    document, results = as_coco(images)
    scores = metric(images, max_detections=limits, agnostic=True, reference=reference).compute()
    work = by_hand(document, results, "segm", limits, use_cats=0)
    assert scores.masks.values["AR1000"] == pytest.approx(work.eval["recall"][:, 0, 0, 2].mean(), abs=1e-12)
    assert scores.masks.values["AP"] == pytest.approx(work.eval["precision"][:, :, 0, 0, 1].mean(), abs=1e-12)
    for image in images.values():
        for part in ("detections", "truth"):
            order = torch.argsort(image[part]["labels"], stable=True)
            image[part] = {key: [v[i] for i in order] if key == "rles" else v[order] for key, v in image[part].items()}
            image[part]["labels"] = torch.zeros_like(image[part]["labels"])
    relabelled = metric(images, 1, max_detections=limits, reference=reference).compute()
    same(scores.masks.values, relabelled.masks.values, 0)
    assert scores.classes == ("object",) and not any("class" in name for name in scores.as_dict())


SEGM = [
    0.3195452758576433, 0.5622883972521636, 0.29892653412086784, 0.3873740315997837, 0.31018272403369485,
    0.3269339071005138, 0.2682297225711534, 0.41544868114906375, 0.4168394992198818, 0.4694498622754236,
    0.37675922666197265, 0.3814715099715099,
]  # fmt: skip
BBOX = [
    0.5045806987249628, 0.6969727247299577, 0.5729816669904824, 0.5856257209410443, 0.5193996948036719,
    0.5013978986347466, 0.38681277964578054, 0.5936795762842003, 0.595352982877607, 0.6398109626113442,
    0.5664205978994309, 0.5642905982905982,
]  # fmt: skip


@pytest.mark.fidelity
@pytest.mark.parametrize("reference", [False, True])
def test_the_24_numbers_of_the_coco_api(real_data, reference):
    folder = real_data / "cocoapi_eval"
    truth = folder / "instances_val2014_100.json"
    for kind, expected in (("segm", SEGM), ("bbox", BBOX)):
        results = folder / f"results/instances_val2014_fake{kind}100_results.json"
        scores = evaluate_json(truth, results, reference=reference)
        np.testing.assert_allclose(list(scores.main.values.values()), expected, rtol=0, atol=1e-9)
        assert scores.images == 100 and (scores.masks is None) == (kind == "bbox")
        assert "70 of 80 classes and 100 images" in scores.definition


# ------------------------------------------------------------------ rules, one by one


def one(boxes=(), scores=(), labels=None, crowd=(), truth=(), area=None, truth_labels=None) -> dict:
    """An image 100 x 100 of boxes that are their own masks."""

    def rles(boxes) -> list:
        return [mask.frPyObjects(np.array([[x, y, X - x, Y - y]], dtype=float), 100, 100)[0] for x, y, X, Y in boxes]

    def tensor(boxes) -> torch.Tensor:
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)

    return {
        "size": (100, 100),
        "detections": {
            "boxes": tensor(boxes),
            "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
            "scores": torch.tensor(scores),
            "rles": rles(boxes),
        },
        "truth": {
            "boxes": tensor(truth),
            "labels": torch.tensor(truth_labels or [0] * len(truth), dtype=torch.int64),
            "rles": rles(truth),
            "iscrowd": torch.tensor(crowd or [False] * len(truth)).bool(),
            "area": torch.tensor(area or [(X - x) * (Y - y) for x, y, X, Y in truth], dtype=torch.float64),
        },
    }


A, B, C = [10, 10, 30, 30], [50, 50, 90, 90], [0, 60, 20, 80]


def ap(*images: dict, classes: int = 1, **options) -> float:
    scores = metric({str(i): image for i, image in enumerate(images)}, classes, **options).compute()
    assert scores.masks.values["AP"] == pytest.approx(scores.boxes.values["AP"], abs=1e-12, nan_ok=True)
    return scores.masks.values["AP"]


def test_empty_images_count():
    good = one([A], [0.5], truth=[A])
    assert ap(good) == pytest.approx(1)
    assert ap(good, one([A], [0.9])) == pytest.approx(0.5)  # a detection where there is nothing is false
    assert ap(good, one([], [], truth=[A])) == pytest.approx(51 / 101)  # an object in an image without detections
    assert ap(good, one()) == pytest.approx(1)
    assert math.isnan(ap(one([A], [0.5]))) and ap(one(truth=[A])) == 0


def test_crowds_are_neither_found_nor_missed():
    inside = [52, 52, 70, 70], [60, 60, 80, 80]  # both within the crowd, IoU with it below 0.5
    assert ap(one([A, *inside], [0.5, 0.9, 0.8], truth=[A, B], crowd=[False, True])) == pytest.approx(1)
    assert ap(one([A, *inside], [0.5, 0.9, 0.8], truth=[A, B])) == pytest.approx(1 / 3 * 51 / 101)
    only = metric({"0": one([B], [0.5], truth=[B], crowd=[True])}, 1).compute()
    assert math.isnan(only.masks.values["AP"]) and only.objects.tolist() == [0]


def test_a_class_without_objects_is_left_out():
    image = one([A, B], [0.5, 0.9], labels=[0, 1], truth=[A])
    scores = metric({"0": image}, 3).compute()
    assert scores.masks.values["AP"] == pytest.approx(1)
    assert scores.masks.ap[0] == pytest.approx(1) and np.isnan(scores.masks.ap[1:]).all()
    assert "1 of 3 classes" in scores.definition and "left out: class 1, class 2" in scores.definition
    assert [name for name in scores.as_dict("val") if "class" in name] == ["val_class/class 0"]
    assert math.isnan(scores.masks.values["APl"]) and math.isnan(scores.masks.values["ARl"])


def test_the_annotated_area_decides_on_the_size():
    values = metric({"0": one([A], [0.5], truth=[A], area=[2000.0])}, 1).compute().masks.values
    assert math.isnan(values["APs"]) and values["APm"] == pytest.approx(1) and values["ARm"] == pytest.approx(1)
    border = metric({"0": one([A], [0.5], truth=[A], area=[1024.0])}, 1).compute().masks.values
    assert border["APs"] == border["APm"] == pytest.approx(1)  # both ends included


def test_the_size_of_a_false_detection_is_that_of_what_is_scored():
    """A small mask in a medium box, where nothing is: false among the small masks, no matter among the small boxes."""
    image = one([A, B], [0.5, 0.9], truth=[A])
    image["detections"]["rles"][1] = mask.frPyObjects(np.array([[60.0, 60.0, 20.0, 20.0]]), 100, 100)[0]
    scores = metric({"0": image}, 1).compute()
    assert scores.masks.values["APs"] == pytest.approx(0.5) and scores.boxes.values["APs"] == pytest.approx(1)


@pytest.mark.parametrize("reference", [False, True])
def test_ap_looks_at_100_detections_even_if_recall_looks_at_more(reference):
    image = one([B] * 100 + [A], [0.9] * 100 + [0.1], truth=[A])
    values = metric({"0": image}, 1, max_detections=(1, 100, 1000), reference=reference).compute().masks.values
    assert values["AP"] == values["AR100"] == 0 and values["AR1000"] == values["ARs"] == 1
    assert metric({"0": image}, 1, max_detections=(1, 1000)).compute().masks.values["AP"] == pytest.approx(1 / 101)


@pytest.mark.parametrize("reference", [False, True])
def test_limits_without_100_are_no_trap(reference):
    images = scene(3)
    few = metric(images, max_detections=(1, 10, 1000), reference=reference).compute()
    assert few.masks.values["AP"] == metric(images).compute().masks.values["AP"] > 0
    assert list(few.masks.values) == [
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR1",
        "AR10",
        "AR1000",
        "ARs",
        "ARm",
        "ARl",
    ]
    single = metric(images, max_detections=(5,), reference=reference).compute()
    assert single.masks.values["AP"] > 0 and "at most 5 detections" in single.definition
    assert all(value >= 0 or math.isnan(value) for value in single.as_dict().values())


def test_ids_decide_between_equal_scores_and_not_the_order_of_updates():
    """Equal scores, right in one image and wrong in the other: image 2 comes before image 10, but "b" after "a10"."""
    right, wrong = one([A], [0.5], truth=[A]), one([B], [0.5])
    first = metric({"2": right, "10": wrong}, 1).compute().masks.values["AP"]
    assert first == pytest.approx(1)
    assert metric({"10": wrong, "2": right}, 1).compute().masks.values["AP"] == first
    assert metric({"2x": right, "10x": wrong}, 1).compute().masks.values["AP"] == pytest.approx(0.5)
    assert metric({"10x": wrong, "2x": right}, 1).compute().masks.values["AP"] == pytest.approx(0.5)


def test_ids_from_zero_do_not_matter(tmp_path):
    """An annotation with the id 0, which COCO's own tool takes for unmatched; categories and images from 0 too."""
    images = scene(21)
    document, results = as_coco(images)
    shifted = json.loads(json.dumps(document))
    for key in ("annotations", "categories"):
        for entry in shifted[key]:
            entry["id"] -= 1
    for entry in shifted["annotations"]:
        entry["category_id"] -= 1
    shifted["categories"].reverse()
    moved = [{**r, "category_id": r["category_id"] - 1} for r in results]
    scores = [
        evaluate_json(*written(tmp_path / name, *files), reference=True)
        for name, files in {"a": (document, results), "b": (shifted, moved)}.items()
    ]
    same(scores[0].masks.values, scores[1].masks.values, 0)
    assert scores[0].classes == scores[1].classes
    assert np.array_equal(scores[0].masks.ap, scores[1].masks.ap, equal_nan=True)
    same(scores[0].masks.values, metric(images).compute().masks.values, 1e-12)


def written(folder: Path, document: dict, results: list[dict]) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "annotations.json", folder / "results.json"


# ------------------------------------------------------------------------------ ranks


def _rank(rank: int, images: dict, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    names = sorted(images)
    work = metric({name: images[name] for i, name in enumerate(names) if i % 2 == rank})
    answers = [work.compute()]
    if rank == 1:  # image 0 is on the other rank already
        work.update("0", images["0"]["size"], images["0"]["detections"], images["0"]["truth"])
    try:
        work.compute()
    except ValueError as error:
        answers.append(str(error))
    Path(f"{folder}/{rank}.pickle").write_bytes(pickle.dumps(answers))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo meets in a file here, which Windows spells differently")
def test_two_ranks_are_one(tmp_path):
    """To the last bit, on a set of odd size; and an image on both is named by both."""
    images = scene(5, images=7)
    torch.multiprocessing.spawn(_rank, (images, str(tmp_path)), nprocs=2)
    whole = metric(images).compute()
    for rank in range(2):
        scores, error = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert scores.as_dict() == pytest.approx(whole.as_dict(), abs=0, nan_ok=True)
        for part, expected in ((scores.masks, whole.masks), (scores.boxes, whole.boxes)):
            assert part.precision.tobytes() == expected.precision.tobytes()
        assert scores.images == 7 and scores.objects.tolist() == whole.objects.tolist()
        assert "Image 0 was counted twice" in error


# ------------------------------------------------------------------ use, memory, errors


def test_names_tables_and_definitions():
    scores = metric(scene(1)).compute()
    names = scores.as_dict("test")
    assert names["test/AP"] == scores.masks.values["AP"] and names["test/box_ARl"] == scores.boxes.values["ARl"]
    assert names["test_class/class 1"] == scores.masks.ap[1] and len(names) == 12 + 12 + 3
    assert np.nanmean(scores.masks.ap) == pytest.approx(names["test/AP"])
    assert np.nanmean(scores.masks.ap50) == pytest.approx(names["test/AP50"])
    assert np.nanmean(scores.masks.ar) == pytest.approx(names["test/AR100"])
    assert scores.precision.shape == (10, 101, 3) and scores.precision is scores.masks.precision
    assert list(scores.definitions) == list(scores.masks.values) == list(definitions())
    assert scores.as_table().row_count == 5 and scores.as_summary().row_count == 12
    text = io.StringIO()
    from rich.console import Console

    Console(file=text, width=200).print(scores.as_table(), scores.as_summary())
    assert f"{100 * scores.masks.ap[2]:.1f}" in text.getvalue() and "mean, boxes" in text.getvalue()
    Console(file=text, width=200).print(dataclasses.replace(scores, classes=("[red]", "[/x]", "c")).as_table())
    assert "│ [red] " in text.getvalue() and "│ [/x] " in text.getvalue(), "no styles"


def test_boxes_alone():
    images = scene(2)
    whole = metric(images).compute()
    for image in images.values():
        del image["detections"]["rles"]
    scores = metric(images).compute()
    assert scores.masks is None and scores.main is scores.boxes and scores.definition.startswith("Box AP")
    same(scores.boxes.values, whole.boxes.values, 0)
    assert "val/AP" not in scores.as_dict() and "val/box_AP" in scores.as_dict()
    with pytest.raises(ValueError, match="Image 0 has no masks, but others have"):
        metric({**images, "99": scene(2)["1"]}).compute()


def test_nothing_large_is_kept():
    """Below a tenth of the dense masks, by far."""
    work = metric(scene(0, images=20))
    dense = sum(len(image.rles) + len(image.truth_rles) for image in work.images.values()) * H * W
    smooth = metric({str(i): one([A, B] * 20, [0.5] * 40, truth=[A, B]) for i in range(20)}, 1)
    assert len(pickle.dumps(work.images)) < dense / 2  # noise, the worst case of run lengths
    assert len(pickle.dumps(smooth.images)) < 20 * 42 * 100 * 100 / 50


def test_inputs_are_not_changed_and_reset_forgets():
    images = scene(4)
    before = pickle.dumps(images)
    work = metric(images)
    first = work.compute()
    assert work.compute().as_dict() == pytest.approx(first.as_dict(), abs=0, nan_ok=True)  # twice is no problem
    assert pickle.dumps(images) == before
    work.reset()
    with pytest.raises(ValueError, match="no image to evaluate"):
        work.compute()
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate({}, ["a"])


def change(part: str, **values) -> dict:
    image = one([A, B], [0.5, 0.6], truth=[A, B])
    image[part].update(values)
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (change("detections", labels=torch.tensor([0, 1])), "Image 7: a detection has the label 1, but with 1 classes"),
        (change("truth", labels=torch.tensor([-1, 0])), "Image 7: a object has the label -1"),
        (change("detections", labels=torch.tensor([0])), "2 boxes and 1 labels"),
        (change("detections", scores=torch.tensor([0.5])), "do not fit 2 detections"),
        (change("detections", scores=torch.tensor([0.5, math.nan])), "do not fit 2 detections"),
        (
            change("detections", boxes=torch.tensor([A, [5.0, 5, 4, 9]])),
            r"box of detection 1 is \[5.0, 5.0, 4.0, 9.0\]",
        ),
        (change("truth", boxes=torch.tensor([A, [5.0, math.nan, 6, 9]])), "box of object 1"),
        (change("detections", rles=[]), "100 x 100 .* with 2 detections, but there are 0 masks"),
        (change("truth", rles=[{"size": [9, 8], "counts": b""}] * 2), r"2 masks of the sizes \[\(9, 8\)\]"),
        (change("truth", area=torch.tensor([1.0])), "iscrowd and area do not fit its 2 objects"),
        (change("truth", iscrowd=torch.tensor([True])), "iscrowd and area do not fit its 2 objects"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        metric({"7": image}, 1)


def test_bad_options_and_doubles():
    work = metric({"7": one([A], [0.5], truth=[A])}, 1)
    with pytest.raises(ValueError, match="Image 7 was counted twice"):
        work.update("7", (100, 100), one()["detections"], one()["truth"])
    with pytest.raises(ValueError, match="needs the names"):
        AveragePrecision([])
    for limits in ((), (0, 10), (10, 1), (5, 5)):
        with pytest.raises(ValueError, match="must be growing numbers"):
            AveragePrecision(["a"], limits)


def test_bad_files(tmp_path):
    document, results = as_coco(scene(1))
    good = written(tmp_path, document, results)
    assert evaluate_json(*good).images == 6
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"broken.json is no json file: .*line 1"):
        evaluate_json(tmp_path / "broken.json", good[1])
    with pytest.raises(ValueError, match=r"results.json is no annotation file"):
        evaluate_json(good[1], good[1])
    with pytest.raises(ValueError, match=r"annotations.json is no result file"):
        evaluate_json(good[0], good[0])
    for edit, message in (
        ({"image_id": 99}, "entry 0 is of image 99"),
        ({"category_id": 99}, "entry 0 has the category 99"),
        ({"score": None}, "entry 0 has no score"),
    ):
        entry = {k: v for k, v in {**results[0], **edit}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            evaluate_json(*written(tmp_path / "bad", document, [entry, *results[1:]]))
    bare = [{k: v for k, v in r.items() if k not in ("bbox", "segmentation")} for r in results]
    with pytest.raises(ValueError, match="entry 0 has no bbox"):
        evaluate_json(*written(tmp_path / "bad", document, bare))
    assert evaluate_json(*written(tmp_path / "none", document, [])).masks.values["AP"] == 0


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("results", {"bbox": [1, 2, 3]}, r"entry 0 has the bbox \[1, 2, 3\]; it must be x, y, width and height"),
        ("results", {"bbox": [1, 2, -3, 4]}, r"entry 0 has the bbox \[1, 2, -3, 4\]; it must be"),
        ("results", {"score": float("nan")}, "entry 0 has the score nan, which is no finite number"),
        ("results", {"segmentation": []}, "entry 0: no 'segmentation'"),
        ("results", {"segmentation": {"size": [W, H], "counts": f"{W * H}"}}, "entry 0: .* do not add up"),
        (
            "results",
            {"segmentation": {"size": [W, H], "counts": [W * H]}},
            rf"entry 0 has a mask of the size \[{W}, {H}",
        ),
        ("results", {"segmentation": {"size": [H, W], "counts": "!!"}}, "entry 0: the 'counts' of an RLE"),
        ("results", {"image_id": [1]}, r"entry 0 has the image_id \[1\]; it must be"),
        ("annotations", {"segmentation": None}, "annotation 1 has no segmentation, but others have"),
        ("annotations", {"bbox": None}, "entry 0 has no bbox"),
        ("annotations", {"area": "big"}, "annotation 1 has the area 'big'"),
        ("images", {"id": 1}, "image 1 is listed twice"),
        ("images", {"height": None}, r"image \[0\] has no height"),
        ("categories", {"name": None}, r"category \[0\] has no name"),
    ],
)
def test_entries_that_cannot_be_scored_are_named(kind, edit, message, tmp_path):
    document, results = as_coco(scene(1))
    (results if kind == "results" else document[kind])[0].update(edit)
    with pytest.raises(ValueError, match=message):
        evaluate_json(*written(tmp_path, document, results))


def test_annotations_of_boxes_alone(tmp_path):
    document, results = as_coco(scene(1))
    full = evaluate_json(*written(tmp_path, document, results)).boxes
    for one in document["annotations"]:
        del one["segmentation"]
    bare = evaluate_json(*written(tmp_path, document, results))
    assert bare.masks is None and bare.boxes.values == pytest.approx(full.values, abs=1e-12, nan_ok=True)
    nothing = evaluate_json(*written(tmp_path, document, []))
    assert nothing.masks is None and nothing.boxes.values["AP"] == 0


@pytest.mark.parametrize("reference", [False, True])
def test_recall_of_a_class_is_with_the_most_detections(reference):
    image = one([B] * 100 + [A], [0.9] * 100 + [0.1], truth=[A])
    masks = metric({"0": image}, 1, max_detections=(1, 100, 1000), reference=reference).compute().masks
    assert masks.ar.tolist() == [masks.values["AR1000"]] == [1]


@pytest.mark.parametrize("reference", [False, True])
def test_a_double_of_the_first_detection_is_false(reference):
    image = one([A, A, B], [0.9, 0.8, 0.7], truth=[A, B])
    values = metric({"0": image}, 1, reference=reference).compute().masks.values
    assert values["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_what_is_given_stays_as_it_is():
    image = one([A, B], [0.9, 0.8], truth=[A, B])
    for part in ("detections", "truth"):
        image[part]["boxes"] = image[part]["boxes"].double()  # of the type that is kept
    metric({"0": image}, 1).compute()
    for part in ("detections", "truth"):
        assert image[part]["boxes"].tolist() == [A, B]


def rles(boxes):
    out = []
    for x1, y1, x2, y2 in boxes:
        dense = np.zeros((H, W), np.uint8, order="F")
        dense[y1:y2, x1:x2] = 1
        out.append(mask.encode(dense))
    return out


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("labels", [[0, 1], [1, 0]])
def test_objects_of_equal_overlap_come_class_by_class_where_classes_do_not_count(labels, reference):
    """Of two objects that a detection overlaps alike COCO takes the later one; useCats = 0 lists them by class."""
    there, found = [[0, 0, 10, 10], [2, 0, 12, 10]], [[1, 0, 11, 10], [2, 0, 12, 10]]
    truth = {
        "boxes": torch.tensor(there).float(),
        "labels": torch.tensor(labels),
        "rles": rles(there),
        "iscrowd": torch.tensor([False] * 2),
        "area": torch.tensor([100.0] * 2),
    }
    detections = {
        "boxes": torch.tensor(found).float(),
        "labels": torch.tensor([0, 0]),
        "rles": rles(found),
        "scores": torch.tensor([0.9, 0.8]),
    }
    images = {"0": {"size": (H, W), "detections": detections, "truth": truth}}
    ours = metric(images, agnostic=True, reference=reference).compute().masks.values["AR100"]
    work = by_hand(*as_coco(images), "segm", use_cats=0)
    assert ours == pytest.approx(work.eval["recall"][:, 0, 0, 2].mean(), abs=1e-12)
