"""Decoded samples in large files: the same pixels, made once, never stale."""

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from seglight.cli import main
from seglight.data import ISBI, VOC, Cityscapes, COCOSemantic, Folder, Mixed, PascalContext, cache_write
from seglight.data import cache as cache_module
from seglight.data.cache import Cached, load, rules
from seglight.data.findings import DataError
from seglight.data.formats import write_cityscapes, write_cocostuff, write_context_json, write_isbi, write_voc
from seglight.data.scenes import split_scenes
from seglight.data.shapes import Shapes

SPLITS = ("train", "val")


def make(module, out, splits=SPLITS, progress=None):
    parts = cache_write.plan({split: module.dataset(split) for split in splits}, list(module.classes), out)
    cache_write.write(parts, out, progress)
    return parts


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def scenes(train=6, val=3, size=(96, 112)):
    return {"train": split_scenes("train", train, 0, size), "val": split_scenes("val", val, 0, size)}


@pytest.fixture
def folder(tmp_path):
    """Images of different sizes with masks of colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for number in range(count):
            size = (40 + 7 * number, 60 - 3 * number)
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            mask = np.array([(0, 0, 0), (255, 0, 0), (0, 9, 9)], np.uint8)[rng.integers(0, 3, size)]
            place = tmp_path / "data" / split
            Image.fromarray(image).save(place / f"images/{number}.bmp")  # equal sizes in bytes whatever the content
            Image.fromarray(mask).save(place / f"masks/{number}.png")
    return tmp_path / "data"


COLOURS = {"ground": [0, 0, 0], "thing": [255, 0, 0], "edge": [0, 9, 9]}


def of_folder(root, **options):
    return Folder(str(root), colors=COLOURS, ignore=["edge"], batch_size=4, workers=0, **options)


def equal(one, other):
    assert one.keys() == other.keys() and one["image_id"] == other["image_id"]
    for name in ("image", "mask"):
        pairs = [(one[name], other[name])] if torch.is_tensor(one[name]) else zip(one[name], other[name], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    return True


# ---------------------------------------------------------------- the same pixels


@pytest.mark.parametrize("kind", ["voc", "cityscapes", "folder"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without(tmp_path, folder, kind, workers):
    if kind == "voc":
        root, kind_of = write_voc(tmp_path / "voc", scenes()), VOC
    elif kind == "cityscapes":
        root, kind_of = write_cityscapes(tmp_path / "city", scenes()), Cityscapes
    else:
        root, kind_of = folder, of_folder
    before = sorted((str(path), path.stat().st_mtime_ns) for path in Path(root).rglob("*"))
    make(kind_of(str(root)), tmp_path / "cache")
    for options in ({"crop": 48, "jitter": 0.3, "rotate": 5.0}, {"crop": None, "batch_size": 1}):
        if kind == "folder" and "batch_size" in options:
            continue
        plain, cached = (
            kind_of(str(root), **options, **({"workers": workers} if kind != "folder" else {}), **more)
            for more in ({}, {"cache": str(tmp_path / "cache")})
        )
        assert isinstance(cached.split("train"), Cached) and not isinstance(plain.split("train"), Cached)
        loaders = (plain.train_batches(3), cached.train_batches(3))
        assert all(equal(*pair) for pair in zip(*loaders, strict=True))
        for split in SPLITS:
            cached.split(split).check(cached.num_classes)
            assert cached.split(split).fingerprint() == plain.split(split).fingerprint()
        loaders = (plain.val_dataloader(), cached.val_dataloader())
        assert all(equal(*pair) for pair in zip(*loaders, strict=True))
    assert sorted((str(path), path.stat().st_mtime_ns) for path in Path(root).rglob("*")) == before


def test_crops_around_objects_too(tmp_path):
    root = write_voc(tmp_path / "voc", scenes())
    make(VOC(str(root)), tmp_path / "cache")
    options = {"crop": 40, "crop_around": "objects", "workers": 0}
    plain, cached = VOC(str(root), **options), VOC(str(root), cache=str(tmp_path / "cache"), **options)
    assert all(equal(*pair) for pair in zip(plain.train_batches(3), cached.train_batches(3), strict=True))


def test_who_may_write_to_what(tmp_path, folder):
    make(of_folder(folder), tmp_path / "cache")
    data = of_folder(folder, cache=str(tmp_path / "cache")).split("train")
    image, mask = data.read(2)
    image[:], mask[:] = 0, 0
    assert data.read(2)[0].any() and np.array_equal(data.read(2)[1], data.dataset.read(2)[1])
    image, mask = data.view(2)
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 0


def test_data_that_are_not_files(tmp_path):
    module = Shapes(train_size=9, val_size=4, crop=32)
    parts = make(module, tmp_path / "cache")
    assert [len(part.todo) for part in parts] == [9, 4]
    data = Cached(module.dataset("train"), tmp_path / "cache", module.classes)
    assert all(np.array_equal(*pair) for i in range(9) for pair in zip(data.read(i), data.dataset.read(i), strict=True))
    with pytest.raises(DataError, match="rules for labels are others"):
        Cached(Shapes(train_size=9, scene_seed=5, crop=32).dataset("train"), tmp_path / "cache", module.classes)


# ---------------------------------------------------------------- stale or damaged


def refusal(folder, cache, **options):
    with pytest.raises(DataError) as error:
        of_folder(folder, cache=str(cache), **options).split("train")
    assert "seglight data cache SOURCE --out" in str(error.value)
    return str(error.value)


def test_a_stale_cache_is_refused_with_what_has_changed(tmp_path, folder):
    cache = tmp_path / "cache"
    make(of_folder(folder), cache)
    Image.new("RGB", (9, 9)).save(folder / "train/images/3.bmp")
    Image.new("RGB", (9, 9)).save(folder / "train/masks/3.png")
    for kind in ("images", "masks"):
        name = "new.bmp" if kind == "images" else "new.png"
        Image.new("RGB", (9, 9)).save(folder / f"train/{kind}/{name}")
    text = refusal(folder, cache)
    assert "1 samples have changed since (3)" in text and "1 of 8 samples are not in it (new)" in text
    parts = make(of_folder(folder), cache)
    assert [len(part.todo) for part in parts] == [2, 0], "only what has changed is decoded again"
    data = of_folder(folder, cache=str(cache)).split("train")
    assert all(np.array_equal(*pair) for i in range(8) for pair in zip(data.read(i), data.dataset.read(i), strict=True))
    assert len(load(cache)[0].samples.ids) == 8


def test_an_edit_that_keeps_the_size_is_found_by_its_date(tmp_path, folder):
    cache = tmp_path / "cache"
    make(of_folder(folder), cache)
    path = folder / "train/images/5.bmp"
    size = path.stat().st_size
    image = cv2.imread(str(path))
    image[0, 0] ^= 1
    cv2.imwrite(str(path), image)
    assert path.stat().st_size == size
    assert "Folder train: 5 is not what data.cache" in refusal(folder, cache)
    make(of_folder(folder), cache)
    assert of_folder(folder, cache=str(cache)).split("train").read(5)[0][0, 0].tolist() == image[0, 0, ::-1].tolist()


def test_other_rules_for_labels_are_found(tmp_path, folder):
    cache = tmp_path / "cache"
    make(of_folder(folder), cache)
    with pytest.raises(DataError, match="rules for labels are others"):
        Folder(str(folder), colors=COLOURS, cache=str(cache)).split("train")
    swapped = {**COLOURS, "ground": COLOURS["thing"], "thing": COLOURS["ground"]}
    with pytest.raises(DataError, match="rules for labels are others"):
        Folder(str(folder), colors=swapped, ignore=["edge"], cache=str(cache)).split("train")
    data = of_folder(folder).dataset("train")
    data.lut = np.arange(256)
    assert rules(data, ["a"]) != rules(of_folder(folder).dataset("train"), ["a"]) != rules(data, ["b"])
    module = Folder(str(folder), colors=COLOURS)
    assert [len(part.todo) for part in make(module, cache)] == [7, 3]
    assert (Folder(str(folder), colors=COLOURS, cache=str(cache)).split("train").read(0)[1] < 3).all()


def test_other_rules_for_the_labels_of_a_mixture_are_found(tmp_path):
    write_voc(tmp_path / "voc", scenes())
    write_cocostuff(tmp_path / "coco", scenes())

    def mixed(rename, **options):
        parts = {"voc": VOC(str(tmp_path / "voc")), "coco": COCOSemantic(str(tmp_path / "coco"), min_pixels=0)}
        return Mixed(parts, rename={"coco": rename}, crop=32, workers=0, **options)

    make(mixed({"background": "ignore"}), tmp_path / "cache", ("train",))
    same = mixed({"background": "ignore"}, cache=str(tmp_path / "cache")).split("train")
    assert all(np.array_equal(same.read(i)[1], same.dataset.read(i)[1]) for i in range(len(same)))
    with pytest.raises(DataError, match="rules for labels are others"):
        mixed({"car": "ignore"}, cache=str(tmp_path / "cache")).split("train")


def test_rules_of_the_parts_of_a_mixture_count(folder):
    def mixed(**options):
        return Mixed({"one": Folder(str(folder), colors=COLOURS, **options)}, crop=32).dataset("train")

    assert rules(mixed(), "abc") == rules(mixed(), "abc")
    assert rules(mixed(), "abc") != rules(mixed(ignore=["edge"]), "abc")


def test_two_datasets_in_one_folder(tmp_path, folder):
    """The second neither replaces the first nor shortens a file that somebody reads."""
    cache, root = tmp_path / "cache", write_voc(tmp_path / "voc", scenes())
    make(of_folder(folder), cache)
    first = of_folder(folder, cache=str(cache)).split("train")
    seen, size = first.view(6)[0], only(cache, "train-*.raw").stat().st_size
    make(VOC(str(root)), cache)
    assert np.array_equal(seen, first.dataset.read(6)[0])
    assert size in [path.stat().st_size for path in cache.glob("train-*.raw")]
    for module in (of_folder(folder, cache=str(cache)), VOC(str(root), cache=str(cache))):
        data = module.split("train")
        assert all(np.array_equal(data.read(i)[1], data.dataset.read(i)[1]) for i in range(len(data)))
        assert [len(part.todo) for part in make(module, cache, ("val",))] == [0]
    Image.open(folder / "val/images/0.bmp").save(folder / "val/images/9.bmp")
    Image.open(folder / "val/masks/0.png").save(folder / "val/masks/9.png")
    with pytest.raises(DataError, match=r"not of this data: 1 of 4 samples are not in it \(9\)"):
        of_folder(folder, cache=str(cache)).split("val")


def test_files_with_other_dates_are_compared_all(tmp_path):
    """Every mask is saved again, as long as before, and one in the middle differs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 1)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = Image.fromarray(rng.integers(0, 2, (8, 8), np.uint8))
                pixels.save(tmp_path / f"data/{split}/{kind}/{number:02}.bmp")
    cache, masks = tmp_path / "cache", sorted((tmp_path / "data/train/masks").iterdir())

    def module(**options):
        return Folder(str(tmp_path / "data"), classes=["a", "b"], crop=8, workers=0, **options)

    make(module(), cache)
    raw = only(cache, "train-*.raw")
    size = raw.stat().st_size
    for path in masks:
        os.utime(path, (1, 1))
    module(cache=str(cache)).split("train")
    assert [(len(part.todo), len(part.redated)) for part in make(module(), cache)] == [(0, 40), (0, 0)]
    assert raw.stat().st_size == size, "the same content is not written again"
    assert [len(part.redated) for part in make(module(), cache)] == [0, 0], "the dates are known now"
    labels = np.array(Image.open(masks[17]))
    Image.fromarray(1 - labels).save(masks[17])
    for path in masks:
        os.utime(path, (2, 2))
    with pytest.raises(DataError, match=r"Folder train: 17 is not what data\.cache"):
        module(cache=str(cache)).split("train")
    assert [(len(part.todo), len(part.redated)) for part in make(module(), cache)] == [(1, 39), (0, 0)]
    assert np.array_equal(module(cache=str(cache)).split("train").read(17)[1], 1 - labels)


def test_what_a_mixture_repeats_is_kept_once(tmp_path, folder, capsys):
    def mixed(**options):
        parts = {"one": of_folder(folder)}
        return Mixed(parts, repeats={"one": 3}, crop=32, workers=0, **options)

    (part,) = make(mixed(), tmp_path / "cache", ("train",))
    assert len(part.todo) == part.count == 7 and len(part.dataset) == 21
    assert [len(part.todo) for part in make(mixed(), tmp_path / "cache", ("train",))] == [0]
    data = mixed(cache=str(tmp_path / "cache")).split("train")
    assert all(np.array_equal(data.read(i)[0], data.dataset.read(i)[0]) for i in range(21))


def test_names_in_another_encoding(tmp_path, folder):
    for kind, suffix in (("images", ".bmp"), ("masks", ".png")):
        place = os.fsencode(folder / "train" / kind)
        os.rename(place + b"/3" + suffix.encode(), place + b"/stra\xdfe" + suffix.encode())
    make(of_folder(folder), tmp_path / "cache")
    data = of_folder(folder, cache=str(tmp_path / "cache")).split("train")
    assert os.fsencode(data.ids[-1]) == b"stra\xdfe" and len(data.fingerprint()["sha256"]) == 64
    assert [len(part.todo) for part in make(of_folder(folder), tmp_path / "cache")] == [0, 0]


def test_slices_of_a_stack(tmp_path):
    write_isbi(tmp_path / "isbi", scenes())
    make(ISBI(str(tmp_path / "isbi")), tmp_path / "cache")
    data = ISBI(str(tmp_path / "isbi"), cache=str(tmp_path / "cache")).split("train")
    assert all(np.array_equal(*pair) for i in range(7) for pair in zip(data.read(i), data.dataset.read(i), strict=True))


def test_labels_inside_one_large_file(tmp_path):
    """PASCAL-Context's json: its masks have no files of their own."""
    write_context_json(tmp_path / "context", scenes())
    options = {"root": str(tmp_path / "context"), "labels": "json", "crop": 32, "workers": 0}
    make(PascalContext(**options), tmp_path / "cache")
    data = PascalContext(**options, cache=str(tmp_path / "cache")).split("train")
    assert all(np.array_equal(data.read(i)[1], data.dataset.read(i)[1]) for i in range(len(data)))
    with open(data.mask_paths[0].parent, "a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="samples have changed since"):
        PascalContext(**options, cache=str(tmp_path / "cache")).split("train")


def test_a_changed_image_of_coco_is_found_alone_and_in_a_mixture(tmp_path):
    write_cocostuff(tmp_path / "coco", scenes())

    def coco(**options):
        return COCOSemantic(str(tmp_path / "coco"), min_pixels=0, crop=32, workers=0, **options)

    def mixed(**options):
        return Mixed({"coco": coco()}, crop=32, workers=0, **options)

    make(coco(), tmp_path / "alone")
    make(mixed(), tmp_path / "mixed")
    path = sorted((tmp_path / "coco/train2017").glob("*.jpg"))[2]
    Image.new("RGB", Image.open(path).size).save(path)
    for kind, cache in ((coco, tmp_path / "alone"), (mixed, tmp_path / "mixed")):
        with pytest.raises(DataError, match="1 samples have changed since"):
            kind(cache=str(cache)).split("train")
        assert [len(part.todo) for part in make(kind(), cache)] == [1, 0]
        data = kind(cache=str(cache)).split("train")
        assert not data.read(2)[0].any() and data.read(1)[0].any()


def test_files_that_are_gone_are_named_at_once(tmp_path, folder):
    make(of_folder(folder), tmp_path / "cache")
    data = of_folder(folder).dataset("train")
    for path in (data.image_paths[1], data.mask_paths[4]):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files of Folder train are missing: \S*1\.bmp, \S*4\.png\."):
        cache_module.describe(data)


def test_a_copy_of_the_data_may_use_the_cache(tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    make(of_folder(folder), cache)
    other = tmp_path / "elsewhere" / "data"
    shutil.copytree(folder, other, copy_function=shutil.copyfile)
    data = of_folder(other, cache=str(cache)).split("train")
    assert np.array_equal(data.read(1)[0], data.dataset.read(1)[0])
    assert str(data.image_paths[0]).startswith(str(other)), "everything else is asked of the dataset"


def test_some_of_the_samples_may_use_the_cache(tmp_path, folder):
    cache = tmp_path / "cache"
    make(of_folder(folder), cache)
    (folder / "train.txt").write_text("5\n1\n")
    (folder / "val.txt").write_text("0\n")
    data = of_folder(folder, cache=str(cache), lists="{split}.txt").split("train")
    assert data.ids == ["5", "1"]
    assert all(np.array_equal(*pair) for i in range(2) for pair in zip(data.read(i), data.dataset.read(i), strict=True))


def test_the_same_id_in_two_splits(tmp_path, folder):
    """train/images/0.bmp and val/images/0.bmp: the same id, sizes and times, but other pixels."""
    for kind in ("images/0.bmp", "masks/0.png"):
        if kind.startswith("masks"):
            shutil.copy(folder / "train" / kind, folder / "val" / kind)
        for split in SPLITS:
            os.utime(folder / split / kind, (1, 1))
    make(of_folder(folder), tmp_path / "cache")
    module = of_folder(folder, cache=str(tmp_path / "cache"))
    train, val = module.split("train"), module.split("val")
    assert train.ids[0] == val.ids[0] == "0" and not np.array_equal(train.read(0)[0], val.read(0)[0])


def test_damage(tmp_path, folder):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"no cache in .*seglight data cache SOURCE --out"):
        of_folder(folder, cache=str(cache)).split("train")
    make(of_folder(folder), cache)
    npz, raw = (only(cache, f"train-*.{suffix}") for suffix in ("npz", "raw"))
    whole = npz.read_bytes()
    npz.write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"train-\w{12}\.npz is damaged"):
        of_folder(folder, cache=str(cache)).split("train")
    npz.write_bytes(whole)
    os.truncate(raw, 1000)
    with pytest.raises(DataError, match="shorter than"):
        of_folder(folder, cache=str(cache)).split("train")
    (cache / "cache.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="another version"):
        of_folder(folder, cache=str(cache)).split("train")
    (cache / "cache.json").write_text('{"format"')
    with pytest.raises(DataError, match=r"cache\.json is damaged"):
        of_folder(folder, cache=str(cache)).split("train")
    with pytest.raises(FileNotFoundError, match="no cache in"):
        of_folder(folder, cache=str(cache / "cache.json")).split("train")


# ---------------------------------------------------------------- writing


def test_an_interrupted_cache_goes_on(tmp_path, folder, monkeypatch):
    cache, module = tmp_path / "cache", of_folder(folder)

    def stop(samples, part):
        for number, one in enumerate(samples):
            if number == 3:
                raise KeyboardInterrupt
            yield one

    with pytest.raises(KeyboardInterrupt):
        make(module, cache, progress=stop)
    assert len(load(cache)[0].samples.ids) == 3
    with open(only(cache, "train-*.raw"), "ab") as file:
        file.write(b"half a sample")
    with pytest.raises(DataError, match="4 of 7 samples are not in it"):
        of_folder(folder, cache=str(cache)).split("train")
    assert [len(part.todo) for part in make(module, cache)] == [4, 3]
    data = of_folder(folder, cache=str(cache)).split("train")
    assert all(np.array_equal(*pair) for i in range(7) for pair in zip(data.read(i), data.dataset.read(i), strict=True))
    assert [len(part.todo) for part in make(module, cache)] == [0, 0], "nothing is left to do"


def _stuck(folder, cache):
    def stuck(samples, part):
        for number, one in enumerate(samples):
            if number == 3:
                (cache / "stuck").touch()
                time.sleep(600)
            yield one

    cache_write._SAVED = 0.0
    make(of_folder(folder), cache, progress=stuck)


def test_a_killed_writer_leaves_a_cache_that_can_go_on(tmp_path, folder):
    cache = tmp_path / "cache"
    writer = multiprocessing.get_context("fork").Process(target=_stuck, args=(folder, cache))
    writer.start()
    while not (cache / "stuck").exists():
        assert writer.is_alive()
        time.sleep(0.02)
    with pytest.raises(BlockingIOError, match="Another process is writing"):
        make(of_folder(folder), cache)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    there = len(load(cache)[0].samples.ids)
    assert there == 3
    assert [len(part.todo) for part in make(of_folder(folder), cache)] == [7 - there, 3]
    data = of_folder(folder, cache=str(cache)).split("train")
    assert all(np.array_equal(*pair) for i in range(7) for pair in zip(data.read(i), data.dataset.read(i), strict=True))


def test_a_sample_that_cannot_be_read_stops_it_by_name(tmp_path, folder):
    module, cache = of_folder(folder), tmp_path / "cache"
    parts = cache_write.plan({"train": module.dataset("train")}, list(module.classes), cache)
    Image.new("RGB", (3, 3)).save(folder / "train/masks/4.png")
    with pytest.raises(DataError, match=r"masks/4\.png"):
        cache_write.write(parts, cache)
    assert load(cache)[0].samples.ids == ["0", "1", "2", "3"]


def test_space_and_place_are_looked_at_first(tmp_path, folder, monkeypatch):
    module = of_folder(folder)
    data = {"train": module.dataset("train")}
    parts = cache_write.plan(data, list(module.classes), tmp_path / "cache")
    real = sum(-(-4 * data["train"].read(i)[1].size // 4096) * 4096 for i in range(7))
    assert parts[0].bytes == real, "exact, from the headers"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=real - 1))
    with pytest.raises(DataError, match=r"needs 0\.0 GB more.*--out.*--split"):
        cache_write.write(parts, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.raw"))
    with pytest.raises(DataError, match="is no cache, and something is in the way"):
        cache_write.plan(data, list(module.classes), folder)


def test_the_command(tmp_path, capsys):
    root = str(write_voc(tmp_path / "voc", scenes()))
    cache = str(tmp_path / "cache")
    command = ["data", "cache", root, "--out", cache]
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "6 samples of VOC train; 0 are there, 6 to write" in text and " free" in text and not Path(cache).exists()
    assert main(command) == 0
    assert f"--data.cache {cache}" in capsys.readouterr().out
    assert main([*command, "--split", "test"]) == 0
    assert "3 are there, 0 to write" in capsys.readouterr().out, "the test split is the validation split here"
    assert main(["data", "cache", root, "--out", root]) != 0
    assert "is no cache" in capsys.readouterr().err
    assert main(["data", "cache", "VOCInstances", "--data.root", root, "--out", cache]) != 0
    assert "semantic datasets only" in capsys.readouterr().err


def test_faulty_data_are_not_cached(tmp_path, folder, capsys):
    Image.new("RGB", (3, 3)).save(folder / "train/masks/4.png")
    (folder / "classes.txt").write_text("ground\nthing\n")
    assert main(["data", "cache", str(folder), "--out", str(tmp_path / "cache")]) == 1
    assert "4.png" in capsys.readouterr().err and not list((tmp_path).glob("cache/*.raw"))


# ---------------------------------------------------------------- memory


def rss(path, kind="Rss"):
    """Bytes of the pages of a mapped file that this process holds."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith(kind + ":"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def large(tmp_path):
    """Three images of 1024x2048 with masks."""
    for kind in ("images", "masks"):
        (tmp_path / "large/train" / kind).mkdir(parents=True)
    for number in range(3):
        image = np.full((1024, 2048, 3), number, np.uint8)
        cv2.imwrite(str(tmp_path / f"large/train/images/{number}.png"), image)
        cv2.imwrite(str(tmp_path / f"large/train/masks/{number}.png"), image[..., 0])
    module = Folder(str(tmp_path / "large"), images="{split}/images", masks="{split}/masks", classes=["a", "b", "c"])
    make(module, tmp_path / "cache", splits=("train", "val"))
    return module, tmp_path / "cache"


def _epoch(data, path, pipe):
    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private"))

    before = private()
    total = sum(int(one.sum()) for i in range(len(data)) for one in data.view(i))
    pipe.send((total, private() - before, rss(path), rss(path, "Private_Dirty")))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_crop_touches_its_pages_and_workers_share_them(large):
    module, cache = large
    data = Cached(module.dataset("train"), cache, module.classes)
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 5000 and np.array_equal(again.view(1)[0], data.view(1)[0])
    path = next(one.path for one in load(cache) if one.path.name.startswith("train-"))
    fresh, number = pickle.loads(pickle.dumps(data)), 0
    whole = rss(path)
    image, mask = fresh.view(number)
    assert int(image[400:500, 800:900].sum() + mask[400:500, 800:900].sum()) == 100 * 100 * 4 * int(fresh.ids[number])
    assert rss(path) - whole < 0.75 * 4 * 1024 * 2048, "a tenth of the rows, and what the kernel maps around them"
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_epoch, args=(fresh, path, theirs))
    worker.start()
    total, grown, mapped, dirty = ours.recv()
    worker.join()
    assert total == 4 * 1024 * 2048 * sum(map(int, fresh.ids)) and mapped >= len(fresh) * 4 * 1024 * 2048
    assert dirty == 0 and cache_module.PAGE == 4096
    assert grown - mapped < 4e6, "what a worker needs besides pages of the file"
