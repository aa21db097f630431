"""PASCAL VOC 2012 with SBD beside it, as both archives unpack."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seglight.data.formats.files import Splits, new_folder, numbered, save, write_lists
from seglight.data.formats.voc import object_numbers, save_masks, voc_name
from seglight.data.scenes import VOID, Scene


def write_sbd(out: str | Path, splits: Splits) -> Path:
    """OUT/VOCdevkit/VOC2012 and OUT/benchmark_RELEASE/dataset with img, cls, inst, train.txt and val.txt.

    A third of the training scenes is in SBD only, half of them in its train and half in its val list; every second one
    has its picture in VOC's JPEGImages, too. The others are VOC's train. SBD overlaps VOC as the real one does: its
    train list has the first scene of VOC's train and, a trap, the first of VOC's val, its val list the second of VOC's
    val. ImageSets/Segmentation/seg11valid.txt lists those of VOC's val that are not in SBD's train.

    The MATLAB files hold `GTcls` or `GTinst` with Segmentation (uint8), Boundaries, and CategoriesPresent or
    Categories. SBD has no border of 255: objects reach as far as they are visible.
    """
    with new_folder(out) as folder:
        voc, sbd = folder / "VOCdevkit/VOC2012", folder / "benchmark_RELEASE/dataset"
        scenes = {split: list(numbered({split: of})) for split, of in splits.items()}
        names: dict[str, list[str]] = {}
        start = 0
        for split, found in scenes.items():
            names[split] = [voc_name(start + number) for _, number, _ in found]
            start += len(found)
        only = names["train"][len(names["train"]) - len(names["train"]) // 3 :]
        lists = {**names, "train": names["train"][: len(names["train"]) - len(only)]}
        parts = {
            "train": [*only[0::2], lists["train"][0], *names["val"][:1]],
            "val": [*only[1::2], *names["val"][1:2]],
        }
        in_sbd = {*parts["train"], *parts["val"]}
        for split, found in scenes.items():
            for name, (_, number, scene) in zip(names[split], found, strict=True):
                if name in in_sbd:
                    save(sbd / f"img/{name}.jpg", scene.image)
                    _save_mats(sbd, name, scene)
                if name not in only or number % 2:
                    save(voc / f"JPEGImages/{name}.jpg", scene.image)
                if name not in only:
                    save_masks(voc, name, scene)
        for part, listed in parts.items():
            (sbd / f"{part}.txt").write_text("".join(f"{name}\n" for name in sorted(listed)))
        write_lists(voc / "ImageSets/Segmentation", lists)
        valid = [name for name in names["val"] if name not in parts["train"]]
        (voc / "ImageSets/Segmentation/seg11valid.txt").write_text("".join(f"{name}\n" for name in valid))
    return Path(out)


def sbd_classes(scene: Scene) -> np.ndarray:
    """uint8 (H, W): labels without a border. Wires, which are no objects, get the background's label there."""
    of_object = np.array([0, *(one.label for one in scene.objects)], np.uint8)
    return np.where(scene.mask == VOID, of_object[scene.instances], scene.mask).astype(np.uint8)


def _save_mats(sbd: Path, name: str, scene: Scene) -> None:
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    classes, objects = sbd_classes(scene), object_numbers(scene)
    objects = np.where(objects == VOID, scene.instances, objects).astype(np.uint8)
    empty = np.array([[csc_matrix(classes.shape)] for _ in range(20)], object)
    present = np.unique(classes[classes > 0])[:, None].astype(np.float64)
    categories = [[float(classes[objects == number][0])] for number in range(1, int(objects.max()) + 1)]
    for kind, variable, content in (
        ("cls", "GTcls", {"Boundaries": empty, "Segmentation": classes, "CategoriesPresent": present}),
        ("inst", "GTinst", {"Segmentation": objects, "Boundaries": empty, "Categories": np.array(categories)}),
    ):
        (sbd / kind).mkdir(parents=True, exist_ok=True)
        savemat(sbd / kind / f"{name}.mat", {variable: content}, do_compression=True)
