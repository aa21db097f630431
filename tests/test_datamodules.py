"""One contract for every datamodule: batches, evaluation, workers, ranks, fingerprints, errors, untouched folders.

A new datamodule needs a miniature in `CASES`, and `test_every_datamodule_is_here` fails until it has one.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from seglight import data
from seglight.data import formats
from seglight.data.base import DataModule, SemanticDataModule
from seglight.data.findings import DataError
from seglight.data.formats.archives import zip_folders
from seglight.data.formats.files import save
from seglight.data.instances import InstanceDataModule
from seglight.data.scenes import VOID, split_scenes

SIZE = (52, 60)
CROP, SIDES = 32, {"short_side": 40, "long_side": 64}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
ABSTRACT = (DataModule, SemanticDataModule, InstanceDataModule)


# ---------------------------------------------------------------- miniatures


@lru_cache
def drawn(split, count):
    return tuple(split_scenes(split, count, 0, SIZE))


def scenes(train=6, val=3, **more):
    """Scenes of each split; the test scenes serve train_extra as well, which has no index of its own."""
    counts = {"train": train, "val": val, **more}
    return {split: drawn(split if split in ("train", "val") else "test", count) for split, count in counts.items()}


def write_camvid(root: Path) -> None:
    for split, found in scenes(test=3).items():
        lines = []
        for i, scene in enumerate(found):
            paths = f"{split}/{split}_{i:03d}.png", f"{split}annot/{split}_{i:03d}.png"
            save(root / paths[0], scene.image)
            save(root / paths[1], np.where(scene.mask == VOID, 11, scene.mask).astype(np.uint8))
            lines.append(" ".join(f"/SegNet/CamVid/{path}" for path in paths))
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_folder_lists(root: Path) -> None:
    """One folder of images and masks, split by lists."""
    formats.write_folder(root, scenes())
    for kind in ("images", "masks"):
        (root / kind).mkdir()
        for split in ("train", "val"):
            for path in sorted((root / split / kind).iterdir()):
                path.rename(root / kind / path.name)
    for split, names in (("train", range(6)), ("val", range(6, 9))):
        (root / f"{split}.txt").write_text("".join(f"scene_{i:04d}\n" for i in names))
        shutil.rmtree(root / split)


def write_mixed(root: Path) -> None:
    formats.write_voc(root / "voc", scenes())
    formats.write_cocostuff(root / "coco", scenes())


def rezip(path: Path) -> None:
    """Another content in one member of an archive."""
    folder = path.parent / "unpacked"
    shutil.unpack_archive(path, folder)
    for kind in ("labelIds", "instanceIds"):
        grow(next(iter(sorted(folder.glob(f"gtFine/train/*/*_{kind}.png")))))
    path.unlink()
    zip_folders(folder, {path.name: [top.name for top in folder.iterdir()]})
    (folder / path.name).rename(path)
    shutil.rmtree(folder)


def grow(path: Path) -> None:
    """The same picture or table in a file that is longer."""
    path.write_bytes(path.read_bytes() + (b" " if path.suffix in (".json", ".txt") else b"\0"))


def repaint(path: Path) -> None:
    """Another value in the first pixel of a TIFF stack that is not compressed."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def append_line(list_file: str, line_of: str) -> Callable[[Path], None]:
    """Let one list have the first line of another."""

    def leak(root: Path) -> None:
        first = (root / line_of).read_text().splitlines()[0]
        with open(root / list_file, "a") as file:
            file.write(first + "\n")

    return leak


@dataclass
class Case:
    """One way of using a datamodule."""

    name: str
    write: Callable[[Path], Any] | None = None
    """Makes the miniature in a new folder; None for data that are no files."""
    options: dict[str, Any] = field(default_factory=dict)
    """"{root}" in a value stands for the folder."""
    samples: tuple[int, int, int] = (6, 3, 3)
    """In train, val and test."""
    change: str | None = None
    """A file of the training split that the fingerprint knows, as a pattern."""
    changed: Callable[[Path], None] = grow
    leak: dict[str, Any] | Callable[[Path], None] | None = None
    """Options, or a change of the lists, that train on what is validated on; None where splits cannot overlap."""
    unlabelled: bool = False
    """The labels of the test split are not public."""
    root: str = "root"
    """The option that says where the data are."""
    build: Callable[[dict[str, Any]], DataModule] | None = None


def plain(writer: str, **options: Any) -> Callable[[Path], Any]:
    counts = {key: options.pop(key) for key in ("test", "train_extra", "train") if key in options}
    return lambda root: getattr(formats, f"write_{writer}")(root, scenes(**counts), **options)


def mixed(options: dict[str, Any]) -> DataModule:
    root = Path(options.pop("root"))
    parts = {
        "voc": data.VOC(str(root / "voc"), **options.pop("voc", {})),
        "coco": data.COCOSemantic(str(root / "coco"), min_pixels=0),
    }
    return data.Mixed(parts, **options)


_VOC_LISTS = "VOCdevkit/VOC2012/ImageSets/Segmentation"
_LEAK_VOC = append_line(f"{_VOC_LISTS}/train.txt", f"{_VOC_LISTS}/val.txt")
_COCO = {"train_split": "train2017", "val_split": "train2017"}
_JSON = {
    "images": "{root}/train2017", "annotations": "{root}/annotations/instances_train2017.json",
    "val_images": "{root}/val2017", "val_annotations": "{root}/annotations/instances_val2017.json",
}  # fmt: skip
CASES = {
    "ADE20K": Case("ADE20K", plain("ade20k"), change="**/training/*.png", leak={"val_split": "training"}),
    "COCO": Case("COCO", plain("coco"), change="**/instances_train2017.json", leak=_COCO),
    "COCO test-dev": Case(
        "COCO", plain("coco", test=2), {"test_split": "test-dev2017"}, (6, 3, 2), "**/*_train2017.json", unlabelled=True
    ),
    "COCOFormat": Case(
        "COCOFormat", plain("coco"), _JSON, change="**/*_train2017.json", root="images",
        leak={"val_images": "{root}/train2017", "val_annotations": "{root}/annotations/copy.json"},
    ),
    "COCOSemantic": Case(
        "COCOSemantic", plain("cocostuff"), {"min_pixels": 0}, change="**/instances_train2017.json", leak=_COCO
    ),
    "COCOSemantic coco": Case(
        "COCOSemantic", plain("cocostuff", test=2), {"min_pixels": 0, "classes": "coco", "test_split": "test-dev2017"},
        (6, 3, 2), "**/instances_train2017.json", unlabelled=True,
    ),
    "COCOStuff": Case("COCOStuff", plain("cocostuff"), change="stuffthingmaps/train2017/*.png", leak=_COCO),
    "CamVid": Case("CamVid", write_camvid, change="trainannot/*.png", leak=append_line("train.txt", "val.txt")),
    "Cityscapes": Case(
        "Cityscapes", plain("cityscapes", plates=True), change="gtFine/train/*/*labelIds.png",
        leak={"val_split": "train"},
    ),
    "Cityscapes coarse": Case(
        "Cityscapes", plain("cityscapes", coarse=True, train_extra=2), {"train_labels": "fine+coarse"}, (8, 3, 3),
        "gtCoarse/train_extra/*/*labelIds.png", leak={"val_split": "train_extra"},
    ),
    "Cityscapes zips": Case(
        "Cityscapes", plain("cityscapes", plates=True, test=2, zipped=True), {"test_split": "test"}, (6, 3, 2),
        "gtFine_trainvaltest.zip", rezip, {"val_split": "train"}, unlabelled=True,
    ),
    "CityscapesInstances": Case(
        "CityscapesInstances", plain("cityscapes", plates=True), change="gtFine/train/*/*instanceIds.png",
        leak={"val_split": "train"},
    ),
    "CityscapesInstances zips": Case(
        "CityscapesInstances", plain("cityscapes", zipped=True), change="gtFine_trainvaltest.zip", changed=rezip
    ),
    "Folder": Case("Folder", plain("folder"), change="train/masks/*.png"),
    "Folder lists": Case(
        "Folder", write_folder_lists, {"lists": "{split}.txt"}, change="masks/*.png",
        leak=append_line("train.txt", "val.txt"),
    ),
    "ISBI": Case("ISBI", plain("isbi"), {"val_slices": [6, 7, 8]}, change="train-labels.tif", changed=repaint),
    "ISBI test": Case(
        "ISBI", plain("isbi"), {"val_slices": [6, 7, 8], "test_split": "test"}, change="train-labels.tif",
        changed=repaint, unlabelled=True,
    ),
    "Mixed": Case(
        "Mixed", write_mixed, {"rename": {"coco": {"background": "ignore"}}}, (12, 3, 3),
        "**/instances_train2017.json", build=mixed, leak={"voc": {"train_split": "trainval"}},
    ),
    "PascalContext": Case(
        "PascalContext", plain("context"), change="trainval/*.mat",
        leak=append_line("VOCdevkit/VOC2010/ImageSets/Main/train.txt", "VOCdevkit/VOC2010/ImageSets/Main/val.txt"),
    ),
    "PascalContext json": Case(
        "PascalContext", plain("context_json"), {"background": False}, (6, 2, 2), "**/trainval_merged.json"
    ),  # one of its pictures has no labels, as in the real file
    "SBD": Case(
        "SBD", plain("sbd", train=12), samples=(4, 3, 3), change="**/cls/*.mat",
        leak=append_line("benchmark_RELEASE/dataset/train.txt", "benchmark_RELEASE/dataset/val.txt"),
    ),
    "Shapes": Case("Shapes", options={"train_size": 6, "val_size": 3, "test_size": 3, "image_size": SIZE}),
    "ShapesInstances": Case(
        "ShapesInstances", options={"train_size": 6, "val_size": 3, "test_size": 3, "image_size": SIZE}
    ),
    "VOC": Case("VOC", plain("voc"), change="**/SegmentationClass/*.png", leak=_LEAK_VOC),
    "VOC trainaug": Case(
        "VOC", plain("sbd", train=9), {"train_split": "trainaug"}, (9, 3, 3), "**/cls/*.mat",
        leak={"train_split": "trainval"},
    ),
    "VOC test": Case("VOC", plain("voc", test=2), {"test_split": "test"}, (6, 3, 2), "**/SegmentationClass/*.png",
                     unlabelled=True),
    "VOCInstances": Case("VOCInstances", plain("voc"), change="**/SegmentationObject/*.png", leak=_LEAK_VOC),
}  # fmt: skip


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    """The folder of each miniature, made once."""
    made: dict[str, Path] = {}

    def home(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("data") / "set"
            CASES[name].write(made[name])
        return made[name]

    return home


def module_of(case: Case, root: Path | None, **options: Any) -> DataModule:
    """The datamodule of a case, with small batches, loaded in this process."""
    small = {"crop": CROP} if issubclass(getattr(data, case.name), SemanticDataModule) else SIDES
    filled = {"workers": 0, "batch_size": 2, "val_batch_size": 2, "seed": 5, **small, **case.options, **options}
    if issubclass(getattr(data, case.name), InstanceDataModule):
        filled.setdefault("skip_empty", False)
    if case.write and "{root}" not in str(case.options):
        filled.setdefault(case.root, "{root}")
    for key, value in filled.items():
        filled[key] = value.replace("{root}", str(root)) if isinstance(value, str) else value
    return case.build(filled) if case.build else getattr(data, case.name)(**filled)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def root(request, homes, case):
    return homes(request.node.callspec.params["case"]) if case.write else None


@pytest.fixture
def module(case, root):
    return module_of(case, root)


def as_rank(module: DataModule, rank: int, world: int = 2) -> DataModule:
    """As the trainer has it on one of several processes."""
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(world_size=world, global_rank=rank, strategy=cpu, max_steps=-1)
    return module


def same(a: Any, b: Any) -> bool:
    """Whether two batches are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tree(root: Path) -> dict[str, Any]:
    """All that is below a folder: names, content and times."""
    return {
        path.relative_to(root).as_posix(): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }


# ---------------------------------------------------------------- the registry


def test_every_datamodule_is_here():
    concrete = set()
    for name in data.__all__:
        kind = getattr(data, name)
        if inspect.isclass(kind) and issubclass(kind, DataModule) and kind not in ABSTRACT:
            concrete.add(name)
    assert {case.name for case in CASES.values()} == concrete, "write a miniature for a new datamodule, see CASES"


def test_classes_and_colours(module):
    assert module.num_classes == len(module.classes) == len(module.palette) <= 254
    assert len(set(module.classes)) == module.num_classes and all(isinstance(name, str) for name in module.classes)
    assert all(len(colour) == 3 and all(0 <= part <= 255 for part in colour) for colour in module.palette)
    assert module.task == ("instance" if isinstance(module, InstanceDataModule) else "semantic")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("Cityscapes", "train_labels"), ("ISBI", "test_split"), ("PascalContext", "labels"), ("PascalContext", "order"),
        ("COCOSemantic", "crowds"), ("COCOSemantic", "overlaps"), ("COCOSemantic", "classes"), ("COCO", "faulty"),
        ("Shapes", "faulty_samples"),
    ],
)  # fmt: skip
def test_a_misspelt_choice_is_refused(homes, name, option):
    root = {"root": str(homes(name))} if CASES[name].write else {}
    with pytest.raises(ValueError, match=rf"^data\.{option} is 'fein'; it must be \w.* or \w"):
        getattr(data, name)(**root, **{option: "fein"})


# ---------------------------------------------------------------- batches


def test_training_batches(case, module):
    ids, seen = list(module.split("train").ids), []
    assert len(ids) == len(set(ids)) == case.samples[0] and all(type(name) is str for name in ids)
    labels = set()
    for batch in module.train_batches(case.samples[0]):  # two passes
        assert len(batch["image"]) == len(batch["image_id"]) == 2
        seen += batch["image_id"]
        if module.task == "semantic":
            assert set(batch) == {"image", "mask", "image_id"}
            assert batch["image"].shape == (2, 3, CROP, CROP) and batch["image"].dtype == torch.uint8
            assert batch["mask"].shape == (2, CROP, CROP) and batch["mask"].dtype == torch.uint8
            labels |= set(batch["mask"].unique().tolist())
        else:
            assert set(batch) == {"image", "target", "image_id"}
            for image, target in zip(batch["image"], batch["target"], strict=True):
                _check_target(image, target, labels)
    assert labels <= {*range(module.num_classes), 255} and labels - {255}
    if module.task == "semantic" and case.name != "ISBI":
        assert 255 in labels, "padding, borders or unlabelled pixels"
    assert seen[: len(ids)] != ids and sorted(seen[: len(ids)]) == sorted(seen[len(ids) :]) == sorted(ids)


def _check_target(image, target, labels):
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and min(image.shape[1:]) == SIDES["short_side"]
    kinds = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.bool, "iscrowd": torch.bool,
             "area": torch.float32}  # fmt: skip
    assert {key: value.dtype for key, value in target.items()} == kinds
    count = len(target["labels"])
    assert target["masks"].shape == (count, *image.shape[1:]) and target["boxes"].shape == (count, 4)
    assert target["iscrowd"].shape == target["area"].shape == (count,)
    boxes = target["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([*image.shape[:0:-1]] * 2)).all() and (target["area"] > 0).all()
    labels |= set(target["labels"].tolist())


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_shows_all_as_it_is(case, module, split):
    data = module.split(split)
    count = case.samples[1 if split == "val" else 2]
    assert len(data) == len(set(data.ids)) == count
    if split == "val":
        assert not set(module.split("train").ids) & set(data.ids)
    seen, values, objects = [], set(), 0
    for batch in getattr(module, f"{split}_dataloader")():
        seen += batch["image_id"]
        for i, image in enumerate(batch["image"]):
            assert image.dtype == torch.uint8 and image.shape == (3, *SIZE), "the original size"
            if module.task == "semantic":
                assert batch["mask"][i].dtype == torch.uint8 and batch["mask"][i].shape == SIZE
                values |= set(batch["mask"][i].unique().tolist())
                continue
            target = batch["target"][i]
            kinds = {"boxes": torch.float32, "labels": torch.int64, "iscrowd": torch.bool, "area": torch.float64}
            assert {key: value.dtype for key, value in target.items() if key != "rles"} == kinds
            assert len({len(value) for value in target.values()}) == 1
            assert all(rle["size"] == list(SIZE) for rle in target["rles"])
            values |= set(target["labels"].tolist())
            objects += len(target["labels"])
    assert seen == list(data.ids)
    assert values <= {*range(module.num_classes), *([255] if module.task == "semantic" else [])}
    if case.unlabelled and split == "test":
        assert values == {255} if module.task == "semantic" else objects == 0
    else:
        assert values - {255}
    other = next(iter(module.predict_dataloader()))
    assert split == "val" or other["image_id"] == seen[:2], "seglight predict sees the test split"


def test_batches_do_not_depend_on_workers(case, root, module):
    first_of_its_kind = CASES.get(case.name) is case
    expected = list(module.train_batches(3)), list(module.val_dataloader())
    for workers in (1, 2, 4) if first_of_its_kind else (2,):
        other = module_of(case, root, workers=workers)
        assert same(list(other.train_batches(3)), expected[0]), workers
        if workers == 1 and first_of_its_kind:
            assert same(list(other.val_dataloader()), expected[1])


def test_ranks_share_the_batches_of_one(case, root):
    """Rank r of R gets every R-th sample of a global batch, beginning with r."""
    whole = list(module_of(case, root, batch_size=4).train_batches(3))
    ranks = [list(as_rank(module_of(case, root), rank).train_batches(3)) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        for rank, batches in enumerate(ranks):
            mine = {key: value[rank::2] for key, value in batch.items()}
            assert same(batches[number], mine)


@pytest.mark.parametrize("split", ["val", "test"])
def test_ranks_share_the_evaluation(case, root, module, split):
    """Nothing twice, nothing left out: three samples on two ranks, and ranks without any."""
    names = list(module.split(split).ids)
    for world in (2, 5):
        seen = []
        for rank in range(world):
            mine = as_rank(module_of(case, root), rank, world)
            loader = getattr(mine, f"{split}_dataloader")()
            seen.append([name for batch in loader for name in batch["image_id"]])
            assert seen[rank] == names[rank::world]
        assert sorted(sum(seen, [])) == sorted(names)  # noqa: RUF017


def test_another_seed_gives_other_batches(case, root, module):
    first, again = (next(iter(one.train_batches(1))) for one in (module, module_of(case, root)))
    other = next(iter(module_of(case, root, seed=6).train_batches(1)))
    assert same(first, again) and not same(first, other)


def test_pickles(module):
    """As spawned workers and launchers need it."""
    expected = next(iter(module.train_batches(1)))
    copy = pickle.loads(pickle.dumps(module))
    assert same(next(iter(copy.train_batches(1))), expected)
    build = pickle.loads(pickle.dumps(module.eval_builder("val")))
    assert same(build([0, 1]), module.eval_builder("val")([0, 1]))


# ---------------------------------------------------------------- the files


def test_a_clean_miniature_passes_the_check(module):
    for split in ("train", "val", "test"):
        module.split(split).check(module.num_classes)
    module.prepare_data()


def test_reading_changes_nothing(case, root, module):
    if root is None:
        pytest.skip("no files")
    before = tree(root)
    for split in ("train", "val", "test"):
        module.split(split).check(module.num_classes)
    module.fingerprint()
    list(module.train_batches(2)), list(module.val_dataloader()), list(module.test_dataloader())
    assert tree(root) == before


def test_fingerprint(case, root, module, tmp_path):
    def prints(one):
        for split in ("train", "val", "test"):
            one.split(split)
        found = one.fingerprint()
        assert found["name"] == case.name and found["classes"] == list(one.classes)
        assert found["train"]["samples"] == case.samples[0] and found["val"]["samples"] == case.samples[1]
        return found

    first = prints(module)
    assert prints(module_of(case, root)) == first
    if root is None:
        assert prints(module_of(case, root, scene_seed=9)) != first
        return
    assert str(root) not in str(first)
    copy = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert prints(module_of(case, copy)) == first
    used = {str(path) for path in getattr(module.split("train"), "mask_paths", [])}
    found = [path for path in sorted(copy.glob(case.change)) if path.is_file()]
    chosen = [path for path in found if str(root / path.relative_to(copy)) in used] or found
    case.changed(chosen[0])
    other = prints(module_of(case, copy))
    assert other["train"] != first["train"]


def test_missing_data_are_explained(case, root, tmp_path):
    if root is None:
        pytest.skip("no files")
    with pytest.raises(FileNotFoundError) as error:
        module_of(case, tmp_path / "nowhere")
    text = str(error.value)
    assert str(tmp_path / "nowhere") in text
    assert "To get it:" in text or case.name in ("Folder", "COCOFormat"), "where the data come from"
    assert "data." in text or "--data" in text, "the option to give"


def test_a_leaking_split_is_refused(case, root, tmp_path):
    if case.leak is None:
        pytest.skip("no lists, or another case has them")
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    options = case.leak if isinstance(case.leak, dict) else {}
    if not options:
        case.leak(copy)
    if case.name == "COCOFormat":
        shutil.copy(copy / "annotations/instances_train2017.json", copy / "annotations/copy.json")
    with pytest.raises(DataError, match=r"training samples are also|cannot be|also in|judged by"):
        module_of(case, copy, **options).split("train")
