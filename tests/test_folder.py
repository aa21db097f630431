"""Anybody's folder: layouts, splits, label values, colours, and what is wrong with it."""

import shutil

import numpy as np
import pytest
from PIL import Image

from seglight.data.findings import DataError
from seglight.data.folder import Folder
from seglight.doctor.examination import examine

RNG = np.random.default_rng(0)


def fill(folder, names, values=(0, 1, 2, 255), image=("images", ".jpg"), mask=("masks", ".png")):
    for name in names:
        picture, labels = folder / image[0] / f"{name}{image[1]}", folder / mask[0] / f"{name}{mask[1]}"
        for path in (picture, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)
        Image.fromarray(np.resize(np.array(values, np.uint8), (20, 30))).save(labels)


def name_classes(root, *names):
    (root / "classes.txt").write_text("\n".join(names or ("sky", "tree", "road")) + "\n")


@pytest.mark.parametrize("image, mask", [
    ("{}/images", "{}/masks"), ("images/{}", "masks/{}"), ("{}/image", "{}/label"), ("images/{}", "annotations/{}"),
])  # fmt: skip
def test_a_usual_layout_needs_nothing_but_the_root(tmp_path, image, mask):
    name_classes(tmp_path)
    for split, names in (("train", "abc"), ("val", "de"), ("test", "a")):
        fill(tmp_path, names, image=(image.format(split), ".jpg"), mask=(mask.format(split), ".png"))
    module = Folder(root=str(tmp_path))
    assert module.classes == ("sky", "tree", "road") and module.num_classes == 3 and len(module.palette) == 3
    for split, names in (("train", "abc"), ("val", "de"), ("test", "a")):
        data = module.dataset(split)
        assert data.ids == list(names) and data.image_paths[0].parent == tmp_path / image.format(split)
        data.check(3)
    assert np.unique(data.read(0)[1]).tolist() == [0, 1, 2, 255]


def test_validation_goes_by_other_names_and_test_falls_back_to_it(tmp_path):
    name_classes(tmp_path)
    fill(tmp_path / "train", "ab")
    fill(tmp_path / "valid", "cd")
    module = Folder(root=str(tmp_path))
    assert module.dataset("val").ids == module.dataset("test").ids == ["c", "d"]


def test_a_fraction_depends_on_names_alone(tmp_path):
    names = [f"n{i:02}" for i in range(20)]
    splits = []
    for root, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        fill(root, order)
        name_classes(root)
        module = Folder(root=str(root), val_fraction=0.25)
        train, val, test = (module.dataset(split).ids for split in ("train", "val", "test"))
        assert len(val) == 5 and sorted(train + val) == names and test == val
        splits.append(val)
    assert splits[0] == splits[1] != names[:5]
    assert Folder(root=str(tmp_path / "one"), val_fraction=0.25, split_seed=1).dataset("val").ids != splits[0]
    assert Folder(root=str(tmp_path / "one"), val_fraction=0.25, seed=5).dataset("val").ids == splits[0]
    fill(tmp_path / "one", ["n99"])
    more = Folder(root=str(tmp_path / "one"), val_fraction=0.25).dataset("val").ids
    assert len(set(more) & set(splits[0])) >= 4, "one more image must not shuffle the others"


def test_other_folders_and_formats(tmp_path):
    fill(tmp_path, ("a/x", "b/x", "c"), image=("fotos", ".PNG"), mask=("truth/png", ".bmp"))
    with pytest.raises(FileNotFoundError, match=r"there is: fotos, truth\. .*data\.images and data\.masks"):
        Folder(root=str(tmp_path))
    module = Folder(root=str(tmp_path), images="fotos", masks="truth/png", classes=["x", "y", "z"], val_fraction=0.3)
    assert sorted(module.dataset("train").ids + module.dataset("val").ids) == ["a/x", "b/x", "c"]
    with pytest.raises(ValueError, match="belong together"):
        Folder(root=str(tmp_path), images="fotos")
    with pytest.raises(FileNotFoundError, match=r"truth/no.*data\.masks"):
        Folder(root=str(tmp_path), images="fotos", masks="truth/no", classes=["x", "y"]).dataset("train")


def test_mask_suffix_in_the_same_folder(tmp_path):
    for name in ("dog", "dog.v2"):
        fill(tmp_path, [name], image=("all", ".jpg"), mask=("all", "_mask.png"))
    module = Folder(root=str(tmp_path), images="all", masks="all", mask_suffix="_mask", classes=["x", "y", "z"])
    ids = module.dataset("train").ids + module.dataset("val").ids
    assert sorted(ids) == ["dog", "dog.v2"]


def test_lists(tmp_path):
    fill(tmp_path, ["a", "b.v1", "c", "sub/d", "my photo"])
    name_classes(tmp_path)
    (tmp_path / "train.txt").write_text("sub/d\n\nb.v1\nmy photo.jpg\n")
    (tmp_path / "val.txt").write_text("c masks/whatever.png\n")
    module = Folder(root=str(tmp_path), lists="{split}.txt")
    assert module.dataset("train").ids == ["sub/d", "b.v1", "my photo"]
    assert module.dataset("val").ids == module.dataset("test").ids == ["c"]
    (tmp_path / "val.txt").write_text("c\nb.v1\n")
    with pytest.raises(DataError, match=r"1 of the training samples are also.*b\.v1"):
        module.dataset("train")
    (tmp_path / "val.txt").write_text("c\nzebra\n")
    with pytest.raises(DataError, match=r"val\.txt names 1 images that are not in .*zebra"):
        module.dataset("val")
    (tmp_path / "val.txt").unlink()
    assert sorted(module.dataset("train").ids + module.dataset("val").ids) == ["b.v1", "my photo", "sub/d"]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        module.dataset("train")


def test_every_unpaired_file_is_listed(tmp_path):
    fill(tmp_path, "abcdef")
    name_classes(tmp_path)
    for name in ("masks/b.png", "masks/e.png", "images/a.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"2 images without a mask: b, e; 1 masks without an image: a\.") as error:
        Folder(root=str(tmp_path)).dataset("train")
    assert "mask_suffix" in str(error.value)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere \(data\.root\)"):
        Folder(root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="there is: nothing"):
        Folder(root=str(tmp_path))
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"images holds no images \(\.jpg"):
        Folder(root=str(tmp_path))
    name_classes(tmp_path)
    with pytest.raises(DataError, match=r"images holds no images"):
        Folder(root=str(tmp_path)).dataset("train")
    fill(tmp_path, "a")
    with pytest.raises(DataError, match="Folder train has no samples"):
        Folder(root=str(tmp_path)).dataset("train")


def test_without_class_names_the_values_are_shown(tmp_path):
    fill(tmp_path, "abc", values=(0, 3, 255))
    with pytest.raises(DataError, match=r"classes\.txt.*data\.classes.*hold the values 0, 3, 255"):
        Folder(root=str(tmp_path))


def test_values_map_to_classes(tmp_path):
    fill(tmp_path, "abcde", values=(0, 255, 128, 7, 9, 1))
    module = Folder(
        root=str(tmp_path), values={0: "membrane", 255: "cell", 128: "cell", 9: "dirt"}, ignore=[7, 1, "dirt"]
    )
    assert module.classes == ("membrane", "cell")
    data = module.dataset("train")
    data.check(2)
    np.testing.assert_array_equal(data.read(0)[1].ravel()[:5], [0, 1, 1, 255, 255])
    strict = Folder(root=str(tmp_path), values={0: "membrane", 255: "cell"}).dataset("train")
    with pytest.raises(DataError, match=r"values 1, 7, 9, 128 in the masks.*data\.values"):
        strict.check(2)
    ordered = Folder(root=str(tmp_path), values={0: "b", 255: "a"}, classes=["a", "b"], ignore=[1, 7, 9, 128]).dataset(
        "train"
    )
    np.testing.assert_array_equal(ordered.read(0)[1].ravel()[:2], [1, 0])


def test_ignore_alone(tmp_path):
    fill(tmp_path, "abcde", values=(0, 1, 99))
    name_classes(tmp_path, "x", "y")
    with pytest.raises(DataError, match="values 99"):
        Folder(root=str(tmp_path)).dataset("train").check(2)
    data = Folder(root=str(tmp_path), ignore=[99]).dataset("train")
    data.check(2)
    assert np.unique(data.read(0)[1]).tolist() == [0, 1, 255]


def test_colours_map_to_classes(tmp_path):
    fill(tmp_path, "abcde")
    colours = {"void": [0, 0, 0], "road": [128, 64, 128], "car": [0, 0, 142]}
    painted = np.array(list(colours.values()), np.uint8)[np.resize([0, 1, 2], (20, 30))]
    for path in (tmp_path / "masks").glob("*.png"):
        Image.fromarray(painted).save(path)
    with pytest.raises(DataError, match=r"mode RGB.*data\.colors"):
        Folder(root=str(tmp_path))
    module = Folder(root=str(tmp_path), colors=colours, ignore=["void"])
    assert module.classes == ("road", "car") and module.palette == ((128, 64, 128), (0, 0, 142))
    data = module.dataset("train")
    data.check(2)
    np.testing.assert_array_equal(data.read(0)[1].ravel()[:3], [255, 0, 1])
    del colours["car"]
    with pytest.raises(DataError, match=r"5 classes|\(0, 0, 142\)"):
        Folder(root=str(tmp_path), colors=colours).dataset("train").check(2)


def test_palette_masks_give_indices(tmp_path):
    fill(tmp_path, "ab")
    name_classes(tmp_path)
    for path in (tmp_path / "masks").glob("*.png"):
        labels = Image.open(path)
        labels.putpalette(RNG.integers(0, 256, 768).tolist())
        labels.save(path)
    assert np.unique(Folder(root=str(tmp_path)).dataset("train").read(0)[1]).tolist() == [0, 1, 2, 255]


@pytest.mark.parametrize("options, words", [
    ({"values": {0: "a"}, "colors": {"a": [0, 0, 0]}}, "exclude each other"),
    ({"values": {0: "a", 300: "b"}}, "masks hold 0..255, not 300"),
    ({"values": {0: "a", 1: "b"}, "classes": ["a", "b", "c"]}, "c: every class needs a value"),
    ({"values": {0: "a", 1: "x"}, "classes": ["a", "b"]}, "b, x: every class"),
    ({"colors": {"a": [0, 0, 0], "b": [0, 300, 0]}}, r"data\.colors: b is not"),
    ({"colors": {"a": [0, 0, 0], "b": [0, 3]}}, r"data\.colors: b is not"),
    ({"classes": ["a", "a"]}, "different names"),
    ({"classes": ["a"]}, "2 to 254"),
    ({"classes": ["a", "b"], "val_fraction": 0}, "val_fraction is 0"),
])  # fmt: skip
def test_wrong_options_are_refused(tmp_path, options, words):
    fill(tmp_path, "ab")
    with pytest.raises(ValueError, match=words):
        Folder(root=str(tmp_path), **options)


def test_real_microscopy(real_data, tmp_path):
    """255 is a class here, and there is no validation folder."""
    module = Folder(root=str(real_data / "isbi2012"), values={0: "membrane", 255: "cell"})
    train, val = module.dataset("train"), module.dataset("val")
    assert (len(train), len(val)) == (19, 5) and module.classes == ("membrane", "cell")
    train.check(2)
    val.check(2)
    image, labels = val.read(0)
    assert image.shape == (512, 512, 3) and np.unique(labels).tolist() == [0, 1]
    assert image[labels == 0].mean() < image[labels == 1].mean(), "membranes are dark"
    shutil.copytree(real_data / "isbi2012/train", tmp_path / "train")
    with pytest.raises(DataError, match="0 and 255 only"):
        Folder(root=str(tmp_path), classes=["membrane", "cell"]).dataset("train").check(2)


def test_names_of_classes_in_another_encoding(tmp_path):
    fill(tmp_path, "ab")
    (tmp_path / "classes.txt").write_bytes("Straße\nWeg\nBaum".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt is no text in UTF-8 .*Save it in that encoding"):
        Folder(str(tmp_path))
    report = examine(str(tmp_path))
    assert any("classes.txt is no text in UTF-8" in one.what for one in report.findings)
