"""What all instance models share: resizing, scores, pictures, results files, predictions."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from test_loggers import parse
from torch import nn

import seglight
from seglight import masks as mask_tools
from seglight import visualize_objects
from seglight.callbacks.parts import trainer_parts
from seglight.data.dataset import InstanceDataset
from seglight.data.instances import InstanceDataModule
from seglight.data.objects import Bitmap, Objects
from seglight.loggers import WandB, read_metrics
from seglight.models.instance import InstanceModel
from seglight.visualize_objects import Objects as Drawn


class Blobs(InstanceDataset):
    """Bright rectangles on black, red for class 0 and green for class 1; every fifth image is empty."""

    def __init__(self, count: int, start: int = 0):
        self.ids = [str(start + i) for i in range(count)]

    def _boxes(self, index: int) -> np.ndarray:
        if index % 5 == 4:
            return np.zeros((0, 4), np.float32)
        shift = 3 * (index % 3)
        return np.array([[4 + shift, 6, 20 + shift, 18], [30, 20 + shift, 44, 40]], np.float32)

    def size(self, index):
        return (48, 64) if index % 2 else (60, 56)

    def image(self, index):
        image = np.zeros((*self.size(index), 3), np.uint8)
        for label, (x1, y1, x2, y2) in enumerate(self._boxes(index).astype(int)):
            image[y1:y2, x1:x2, label] = 220
        return image

    def objects(self, index):
        boxes = self._boxes(index)
        sides = boxes.astype(int)
        return Objects(
            boxes,
            np.arange(len(boxes)),
            np.zeros(len(boxes), bool),
            ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(float),
            [Bitmap(y1, x1, np.ones((y2 - y1, x2 - x1), bool)) for x1, y1, x2, y2 in sides],
        )


class BlobData(InstanceDataModule):
    classes = ("red", "green")
    palette = ((200, 0, 0), (0, 200, 0))
    category_ids = (7, 90)

    def __init__(self, **kwargs):
        super().__init__(workers=0, short_side=48, long_side=80, **kwargs)

    def dataset(self, split):
        return Blobs(7 if split == "train" else 11, 0 if split == "train" else 100)


class Finder(nn.Module):
    """A detector that finds a channel's bright pixels: one box per colour, wholly filled."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.sizes = []

    def forward(self, images, targets):
        if targets is not None:
            return {"box": self.weight**2, "mask": self.weight.abs()}, []
        self.sizes += [tuple(image.shape[-2:]) for image in images]
        return {}, [self._find(image) for image in images]

    def _find(self, image):
        boxes, labels = [], []
        for label in (0, 1):
            bright = image[label] > 0.5
            if bright.any():
                ys, xs = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
                boxes.append([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
                labels.append(label)
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return {
            "boxes": boxes,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor([0.9, 0.8])[: len(labels)] * self.weight.detach(),
            "masks": torch.ones(len(labels), 32, 32),
            "windows": boxes.clone(),
        }


class FinderModel(InstanceModel):
    def __init__(self, num_classes: int, **kwargs):
        super().__init__(network=Finder(), num_classes=num_classes, **kwargs)


def model(**kwargs):
    kwargs = {"test_short_side": None, "classes": ["red", "green"], "palette": [(200, 0, 0), (0, 200, 0)], **kwargs}
    return FinderModel(2, **kwargs)


def run(folder, **kwargs):
    parts = trainer_parts(folder, monitor="val/AP", show=InstanceModel.show)
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **{**parts, **kwargs})


def test_images_are_resized_by_the_short_side_and_boxes_come_back():
    finder = model(test_short_side=96, test_long_side=100)
    image = torch.from_numpy(Blobs(1).image(0)).permute(2, 0, 1)
    (found,) = finder([image])
    assert finder.network.sizes == [(100, 93)]  # 96 for the short side would make the long one 102
    assert torch.allclose(found["boxes"], torch.tensor([[4, 6, 20, 18], [30, 20, 44, 40.0]]), atol=1.0)
    assert torch.equal(found["boxes"], found["windows"])
    finder = model(test_scales=[60, 90], test_flip=True, test_long_side=200)
    (found,) = finder([image])
    assert finder.network.sizes == [(64, 60), (64, 60), (96, 90), (96, 90)]
    assert torch.allclose(found["boxes"], torch.tensor([[4, 6, 20, 18], [30, 20, 44, 40.0]]), atol=1.0)
    assert found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"test_threshold": 0.0}, "test_threshold is 0.0"),
        ({"test_short_side": 0}, "side of 0 pixels"),
        ({"test_scales": [600, -1]}, "side of -1 pixels"),
    ],
)
def test_wrong_test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_fit_leaves_scores_pictures_and_curves(tmp_path):
    finder, data = model(), BlobData()
    trainer = run(tmp_path / "run", max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(finder, datamodule=data)
    assert finder.scores.masks.values["AP"] == 1.0 == trainer.callback_metrics["val/AP"].item()
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"images/train_batch0.jpg", "plots/precision_recall.png", "per_class.csv", "best.json"} <= files
    assert {"checkpoints/best.ckpt", "plots/results.png"} <= files
    rows = list(csv.reader((tmp_path / "run" / "per_class.csv").read_text().splitlines()))
    assert rows == [["class", "AP", "AP50", "AR100", "objects"], *[[c, "1.0", "1.0", "1.0", "9"] for c in data.classes]]
    logged = read_metrics(next((tmp_path / "run").glob("metrics.jsonl")))
    assert any(row.get("train/loss_box") is not None for row in logged)
    pictures = sorted((tmp_path / "run" / "images").glob("val_*.png"))
    assert len(pictures) == 8 and pictures[0].name == "val_00_100.png"
    again = seglight.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert isinstance(again, InstanceModel) and again.classes == ["red", "green"]


def test_results_file_scores_the_same_by_pycocotools(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Rough(FinderModel):
        def _view(self, *args):
            found = super()._view(*args)
            for detection in found:
                detection["boxes"] = detection["boxes"] + torch.tensor([-2.0, 0, 2, 1])
                detection["windows"] = detection["boxes"]
            return found

    finder = Rough(2, test_short_side=None, classes=["red", "green"], palette=None)
    data = BlobData(val_batch_size=3)
    trainer = run(tmp_path / "run")
    trainer.test(finder, datamodule=data, verbose=False)
    dataset = data.dataset("test")
    truth = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in data.category_ids]}
    for index, name in enumerate(dataset.ids):
        height, width = dataset.size(index)
        truth["images"].append({"id": int(name), "height": height, "width": width})
        objects = dataset.objects(index)
        for i, rle in enumerate(objects.rles((height, width))):
            box = objects.boxes[i].tolist()
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": int(name),
                    "category_id": data.category_ids[objects.labels[i]],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": float(objects.area[i]),
                    "iscrowd": 0,
                }
            )
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(tmp_path / "truth.json"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    masks = [{key: value for key, value in one.items() if key != "bbox"} for one in results]  # or sizes are the boxes'
    for kind, part, entries in (("segm", finder.scores.masks, masks), ("bbox", finder.scores.boxes, results)):
        evaluation = COCOeval(coco, coco.loadRes(entries), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0.1 < evaluation.stats[0] < 0.95
        theirs = np.where(evaluation.stats == -1, np.nan, evaluation.stats)
        assert list(part.values.values()) == pytest.approx(theirs, abs=1e-9, nan_ok=True) and len(theirs) == 12


def test_the_dashboard_gets_masks_boxes_and_the_curves(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    logger = WandB(save_dir=tmp_path, id="objects")
    parts = trainer_parts(tmp_path / "run", monitor="val/AP", show=InstanceModel.show, loggers=[logger])
    options = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **parts, **options)
    trainer.fit(model(), datamodule=BlobData())
    logger.finish()
    for _ in range(100):  # wandb's own process closes the file a moment after finish()
        found = parse(next((tmp_path / "wandb").glob("offline-run-*")))
        if found["closed"]:
            break
        time.sleep(0.1)
    history = {key: value for row in found["history"] for key, value in row.items()}
    assert {"val/AP", "val/AP50", "val/box_AP", "val_class/red", "train/loss_mask", "val/precision_recall"} <= set(
        history
    )
    assert history["val_class/table"]["_type"] == "table-file" and history["val_class/table"]["nrows"] == 2
    pictures = history["media/val"]
    assert pictures["count"] == 8 and pictures["captions"][0] == "100"
    assert set(pictures["all_masks"][0]) == {"ground truth", "prediction"} == set(pictures["all_boxes"][0])
    boxes = json.loads(
        (
            next((tmp_path / "wandb").glob("offline-run-*")) / "files" / pictures["all_boxes"][0]["prediction"]["path"]
        ).read_text()
    )
    (first, _) = boxes["box_data"]
    assert first["position"] == {"minX": 4, "maxX": 20, "minY": 6, "maxY": 18} and first["box_caption"] == "red"
    assert 0.5 < first["scores"]["score"] < 0.9


def test_prediction_of_a_picture(tmp_path):
    image = Blobs(1).image(0)
    prediction = model().predict(image)
    assert len(prediction) == 2 and prediction.names == ["red", "green"]
    assert prediction.masks.shape == (2, 60, 56)
    assert np.array_equal(prediction.masks[0], image[..., 0] > 0)
    assert len(model().predict(image, min_score=0.85)) == 1
    (red, green) = prediction.to_coco(5, [7, 90])
    assert (red["image_id"], red["category_id"], green["category_id"]) == (5, 7, 90)
    assert red["bbox"] == [4, 6, 16, 12] and red["score"] == pytest.approx(0.9)
    assert mask_tools.areas([red["segmentation"]]).tolist() == [16 * 12]
    prediction.save(tmp_path / "deep" / "a.jpg")
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    objects = ["deep/a_objects/000_red_0.90.png", "deep/a_objects/001_green_0.80.png"]
    assert names == ["deep/a.json", *objects, "deep/a_overlay.jpg"]
    mask = cv2.imread(str(tmp_path / objects[1]), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask > 0, image[..., 1] > 0) and set(np.unique(mask)) == {0, 255}
    mine = tmp_path / "deep/a_objects/123_by_hand.png"
    mine.write_bytes(b"precious")
    model().predict(image, min_score=0.85).save(tmp_path / "deep" / "a.jpg")
    assert mine.read_bytes() == b"precious"
    assert sorted(p.name for p in mine.parent.iterdir()) == ["000_red_0.90.png", mine.name]
    empty = model().predict(np.zeros((20, 30, 3), np.uint8))
    assert len(empty) == 0 and empty.masks.shape == (0, 20, 30) and empty.to_coco() == []
    empty.save(tmp_path / "empty")
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_the_predict_command_writes_objects_and_an_annotation_file(tmp_path, capsys, monkeypatch):
    from seglight.predict import main

    trainer = run(tmp_path / "run", max_steps=1, limit_val_batches=1)
    trainer.fit(model(), datamodule=BlobData())
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        image = Blobs(5).image(i) if i < 2 else np.zeros((20, 30, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "pictures" / name), image[..., ::-1])
    (tmp_path / "pictures" / "d.png").write_bytes(b"no picture")
    words = ["--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt"), "--source", str(tmp_path / "pictures")]
    words += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 1  # one could not be read
    assert "3 of 4 pictures" in capsys.readouterr().out
    document = json.loads((tmp_path / "out/objects.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["a.png", "b.png", "c.png"]
    assert [one["image_id"] for one in document["annotations"]] == [1, 1, 2, 2]
    assert [one["id"] for one in document["annotations"]] == [1, 2, 3, 4]
    assert [one["name"] for one in document["categories"]] == ["red", "green"]
    assert document["annotations"][0]["area"] == 16 * 12
    assert (tmp_path / "out/c_overlay.jpg").is_file() and json.loads((tmp_path / "out/c.json").read_text()) == []
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--min_score", "0.85"]) == 1
    assert len(json.loads((tmp_path / "out/objects.json").read_text())["annotations"]) == 2
    from pycocotools.coco import COCO

    assert len(COCO(str(tmp_path / "out/objects.json")).getAnnIds()) == 2
    capsys.readouterr()
    mine = tmp_path / "new/a_objects/mask.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"precious")
    assert main([*words, "--out", str(tmp_path / "new")]) == 2
    assert f"1 of 4 results exist already, the first is {mine.parent}" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "new").rglob("*")] == ["a_objects", "mask.png"]


def square(x, y, side, size=(40, 60)):
    mask = np.zeros((1, *size), bool)
    mask[0, y : y + side, x : x + side] = True
    return Drawn.dense(np.zeros(1, int), mask).rles[0]


def test_matching_for_the_error_panel():
    truth = Drawn(np.array([0, 0, 1]), [square(0, 0, 10), square(20, 0, 10), square(40, 20, 10)])
    found = Drawn(
        np.array([0, 0, 0, 0]),
        [square(1, 0, 10), square(0, 0, 10), square(20, 5, 10), square(40, 20, 10)],
        np.array([0.9, 0.8, 0.7, 0.6]),
    )
    hit, taken = visualize_objects.match(truth, found)
    assert hit.tolist() == [0, -1, -1, -1] and taken.tolist() == [True, False, False]  # taken; too far off; wrong class
    hit, _ = visualize_objects.match(truth, found, classes=False)
    assert hit.tolist() == [0, -1, -1, 2]
    crowd = Drawn(np.array([0]), [square(0, 0, 30)], crowd=np.array([True]))
    hit, _ = visualize_objects.match(crowd, found)
    assert hit.tolist() == [0, 0, 0, -1]  # many may lie in one crowd
    image = np.full((40, 60, 3), 100, np.uint8)
    picture, caption = visualize_objects.errors(image, crowd, found)
    assert caption == "0 right, 1 invented, 0 missed" and picture[8, 3].min() > 150  # as AP, which ignores those three
    picture, caption = visualize_objects.errors(image, truth, found)
    assert caption == "1 right, 3 invented, 2 missed"
    proposals, agnostic = visualize_objects.errors(image, truth, found, classes=False)
    assert agnostic == "2 found, 1 missed" and proposals[8, 25, 2] > proposals[8, 25, 0]
    assert picture[3, 3, 1] > picture[3, 3, 0] and picture[8, 25, 0] > picture[8, 25, 1]


def test_overlay_tints_and_outlines_every_object():
    image = np.full((40, 60, 3), 100, np.uint8)
    objects = Drawn(np.array([0, 1]), [square(0, 0, 10), square(20, 5, 20)], np.array([0.9, 0.3]))
    picture = visualize_objects.overlay(image, objects, ["a", "b"], [(255, 0, 0), (0, 0, 255)], names=False)
    assert picture[5, 5].tolist() == [178, 50, 50] and picture[0, 5].tolist() == [255, 0, 0]
    assert picture[15, 30].tolist() == [50, 50, 178] and picture[30, 50].tolist() == [100, 100, 100]
    assert np.array_equal(image, np.full((40, 60, 3), 100, np.uint8))
    assert visualize_objects.label_map(objects, (40, 60))[[5, 15, 39], [5, 30, 59]].tolist() == [0, 1, 255]
    (first, _) = visualize_objects.box_data(objects, ["a", "b"], scale=0.5)
    assert first["position"] == {"minX": 0, "minY": 0, "maxX": 5, "maxY": 5} and first["scores"] == {"score": 0.9}
    assert len(objects.above(0.5).rles) == 1


def test_the_ground_truth_of_an_evaluation_stays_on_the_host():
    model = InstanceModel(network=torch.nn.Identity(), num_classes=2)
    batch = {"image": [torch.zeros(3, 4, 4)], "target": [{"boxes": torch.zeros(1, 4)}], "image_id": ["a"]}
    for training, expected in ((True, "meta"), (False, "cpu")):
        model._trainer = SimpleNamespace(training=training)
        moved = model.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert moved["image"][0].device.type == "meta" and moved["image_id"] == ["a"]
        assert moved["target"][0]["boxes"].device.type == expected


@pytest.mark.parametrize("size", [(1, 2000), (4000, 2), (3, 5000), (1, 1), (37, 61)])
def test_strips_keep_a_pixel_of_width(size):
    """Where both sides are left, the size is what torchvision's detectors make of it."""
    model = InstanceModel(network=torch.nn.Identity(), num_classes=2)
    image = torch.rand(3, *size)
    resized = model.resize(image, 800)
    scale = min(800 / min(size), 1333 / max(size))
    assert tuple(resized.shape[1:]) == tuple(max(1, int(side * scale)) for side in size)
    if min(resized.shape[1:]) > 1:
        theirs = nn.functional.interpolate(
            image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
        )[0]
        assert torch.equal(resized, theirs)


def test_no_images_no_detections():
    assert InstanceModel(network=torch.nn.Identity(), num_classes=2).detect([]) == []


def test_proposals_without_classes_are_objects_everywhere(tmp_path):
    from seglight.callbacks.pictures import Pictures
    from seglight.callbacks.predictions import Predictions
    from seglight.predict import _predict_all

    finder, pixels = model(), Blobs(1).image(0)
    finder.agnostic, find = True, finder.network._find
    finder.network._find = lambda image: {**find(image), "labels": torch.zeros(2, dtype=torch.int64)}
    assert set(finder.predict(pixels).names) == {"object"}
    found = finder.detect([torch.from_numpy(pixels).permute(2, 0, 1)])[0]
    image, rles = torch.from_numpy(pixels).permute(2, 0, 1), finder._rles(found, pixels.shape[:2])
    target = {"labels": torch.tensor([0, 1]), "rles": rles, "iscrowd": torch.zeros(2, dtype=torch.bool)}
    found["rles"] = rles
    _, drawn = Pictures()._draw_objects(finder, "a", image, target, found)
    said = {key: {box["box_caption"] for box in boxes} for key, boxes in drawn.boxes.items()}
    assert said == {"ground truth": {"red", "green"}, "prediction": {"object"}}
    saved = Predictions()._objects(finder, pixels, found, finder._rles(found, pixels.shape[:2]))
    assert set(saved.names) == {"object"}
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    pictures = [(tmp_path / "a.png", Path("a.png"))]
    assert _predict_all(finder, pictures, [tmp_path / "a.json"], tmp_path, {"min_score": 0.5}) == 0
    document = json.loads((tmp_path / "objects.json").read_text())
    assert document["categories"] == [{"id": 1, "name": "object"}]
    assert {one["category_id"] for one in document["annotations"]} == {1}


@pytest.mark.parametrize(("name", "written"), [("123", 123), ("0", 0), ("000123", "000123"), ("²", "²"), ("١", "١")])
def test_only_plain_numbers_become_image_ids(name, written):
    from seglight.callbacks.predictions import Predictions

    detection = {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)}
    outputs = {"detections": [detection], "rles": [[{"size": [2, 2], "counts": b"04"}]]}
    kept = Predictions()
    kept._keep(SimpleNamespace(datamodule=None), outputs, {"image_id": [name]})
    assert [one["image_id"] for one in kept._results] == [written]


class Fixed(nn.Module):
    """Squares side by side in every image, of the given scores; a mask is 0.4 on the left, 0.9 on the right."""

    def __init__(self, scores):
        super().__init__()
        self.weight, self.given = nn.Parameter(torch.zeros(1)), torch.tensor(scores)

    def forward(self, images, targets=None):
        left = torch.arange(len(self.given)) * 8.0
        boxes = torch.stack([left, left * 0, left + 8, left * 0 + 8], 1)
        mask = torch.full((len(boxes), 2, 2), 0.4)
        mask[..., 1] = 0.9
        return {}, [
            {
                "boxes": boxes,
                "labels": torch.zeros(len(boxes), dtype=torch.int64),
                "scores": self.given.clone(),
                "masks": mask.clone(),
                "windows": boxes.clone(),
            }
            for _ in images
        ]


def fixed(scores, **options):
    return InstanceModel(Fixed(scores), num_classes=1, test_short_side=None, **options).eval()


def test_of_several_looks_the_best_detections_are_kept():
    scores = torch.linspace(0.1, 0.9, 120).tolist()
    model = fixed(scores, test_flip=True)
    (found,) = model.detect([torch.zeros(3, 8, 960)])
    assert len(found["scores"]) == model.limits[-1] == 100 and found["scores"].min() > 0.2


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_pixels_belong_to_an_object_from_the_threshold_on(threshold):
    model = fixed([0.9], test_threshold=threshold)
    (rle,) = model.predict(np.zeros((8, 16, 3), np.uint8)).rles
    found = model.detect([torch.zeros(3, 8, 16)])[0]
    dense = mask_tools.paste(found["masks"], found["windows"], (8, 16), threshold)[0].numpy()
    assert np.array_equal(mask_tools.decode([rle])[0], dense)
    assert dense.any()


def test_an_object_of_the_lowest_score_is_kept():
    found = fixed([0.75, 0.5, 0.25]).predict(np.zeros((8, 32, 3), np.uint8), min_score=0.5)
    assert found.scores.tolist() == [0.75, 0.5] and len(found.rles) == 2
