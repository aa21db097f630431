"""What `data show` draws is what the loaders give, and what it is asked for."""

import numpy as np
import pytest
import torch
from PIL import Image

from seglight.cli import main
from seglight.data import COCO, Folder, Shapes, ShapesInstances
from seglight.data.base import SemanticDataModule
from seglight.data.dataset import SemanticDataset
from seglight.data.formats import write_coco, write_folder
from seglight.data.scenes import split_scenes
from seglight.data_show import _hatch, classes_shown, refuse_foreign, samples, save, show
from seglight.types import IGNORE_INDEX


def semantic(**options):
    return Shapes(
        **{"train_size": 11, "val_size": 5, "batch_size": 4, "workers": 0, "seed": 3, "jitter": 0.2, **options}
    )


def instances(**options):
    return ShapesInstances(
        **{"train_size": 9, "val_size": 5, "batch_size": 2, "workers": 0, "seed": 3, "short_side": 96, **options}
    )


def test_training_samples_are_those_of_the_loader():
    module = semantic()
    batches = iter(module.train_batches(5))
    for number in range(5):
        batch = next(batches)
        found = samples(module, "train", 4, number)
        assert [one.image_id for one in found] == batch["image_id"]
        for slot, one in enumerate(found):
            assert np.array_equal(one.image, batch["image"][slot].permute(1, 2, 0))
            assert np.array_equal(one.labels, batch["mask"][slot])
    assert [one.note for one in samples(module, "train", 4, 2)] == ["pass 0"] * 3 + ["pass 1"]  # 11 samples in a pass


def test_training_objects_are_those_of_the_loader():
    module = instances()
    batch = list(module.train_batches(3))[2]
    found = samples(module, "train", 2, 2)
    assert [one.image_id for one in found] == batch["image_id"]
    from seglight import masks

    for one, image, target in zip(found, batch["image"], batch["target"], strict=True):
        assert np.array_equal(one.image, image.permute(1, 2, 0)) and np.array_equal(one.boxes, target["boxes"])
        assert np.array_equal(masks.decode(one.labels.rles), target["masks"])
        assert np.array_equal(one.labels.labels, target["labels"])
        assert np.array_equal(one.labels.crowd, target["iscrowd"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_splits_are_as_stored(split):
    module = semantic(val_batch_size=2)
    found = samples(module, split, 3, 1)
    assert [one.image_id for one in found] == [f"{split}_{i:06d}" for i in (2, 3, 4)]
    image, mask = module.split(split).read(3)
    assert np.array_equal(found[1].image, image) and np.array_equal(found[1].labels, mask)
    objects = samples(instances(), split, 2)
    assert [one.note for one in objects] == ["as stored"] * 2 and objects[0].boxes.shape[1] == 4


def test_count_goes_over_batches_and_ends_with_the_data():
    assert len(samples(semantic(), "train", 6)) == 6
    assert len(samples(semantic(), "train", 99)) == 12  # the batches of one pass
    assert len(samples(semantic(), "val", 99)) == 5


def test_ids_and_positions():
    module = semantic()
    found = samples(module, "train", ids=["train_000007", 2, -1], epoch=4)
    assert [one.image_id for one in found] == ["train_000007", "train_000002", "train_000010"]
    batch = module.train_builder()([(4, 7)])
    assert np.array_equal(found[0].image, batch["image"][0].permute(1, 2, 0)) and found[0].note == "pass 4"
    assert [one.image_id for one in samples(module, "val", ids=[1])] == ["val_000001"]
    assert len(samples(module, "train", 2, ids=[0, 1, 2])) == 3  # all that were asked for


def test_augmentations_of_one_sample():
    for module in (semantic(), instances()):
        found = samples(module, "train", ids=[5], augment=3, epoch=2)
        assert [one.note for one in found] == ["as stored", "pass 2", "pass 3", "pass 4"]
        assert {one.image_id for one in found} == {"train_000005"}
        assert found[0].image.shape == (160, 192, 3)
        first, second = found[1].image, found[2].image
        assert first.shape != second.shape or not np.array_equal(first, second)
        again = module.train_builder()([(3, 5)])["image"][0]
        assert np.array_equal(found[2].image, torch.as_tensor(again).permute(1, 2, 0))
    first = samples(semantic(), "train", batch=1)[0].image_id
    assert samples(semantic(), "train", batch=1, augment=1)[0].image_id == first


def test_a_class_filters_by_what_shows():
    module = semantic(train_size=40)
    found = samples(module, "train", 5, class_name="star")
    star = module.classes.index("star")
    everything = samples(module, "train", 40)
    expected = [one.image_id for one in everything if (one.labels == star).any()]
    assert [one.image_id for one in found] == expected[:5] and 5 < len(expected) < 40
    module = instances(train_size=40)
    found = samples(module, "train", 3, class_name="moon")
    assert all((one.labels.labels == module.classes.index("moon")).any() for one in found)
    assert classes_shown(found, module.classes)["moon"] >= 3


class Bare(SemanticDataset):
    ids = ("one", "two")

    def read(self, index):
        return np.full((20, 30, 3), 99, np.uint8), np.full((20, 30), IGNORE_INDEX, np.uint8)


class BareModule(SemanticDataModule):
    """Images without labels."""

    classes, palette = ("sky", "sea", "Land"), ((0, 0, 0), (9, 9, 200), (9, 200, 9))

    def dataset(self, split):
        data = Bare()
        data.ids = () if split == "val" else ("one", "two")
        return data


def test_wishes_that_cannot_be_met():
    module = semantic()
    for wish, words in (
        ({"class_name": "stra"}, "no class 'stra'; nearest: star"),
        ({"class_name": "zzz"}, "classes: background, square"),
        ({"split": "training"}, "no split 'training'"),
        ({"count": 0}, "count is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"epoch": -1}, "epoch is -1"),
        ({"augment": -1}, "augment is -1"),
        ({"augment": 2, "split": "val"}, "choose train"),
        ({"class_name": "star", "ids": [1]}, "does not go with"),
        ({"ids": [11]}, "no sample 11 in train; it holds 11"),
        ({"ids": ["train_00001"]}, "no sample 'train_00001' in train; nearest: train_00001"),
        ({"ids": ["dog"]}, "the first are train_000000, train_000001"),
        ({"split": "val", "batch": 5}, "no batch 5 in val; there are 5 of 1"),
    ):
        with pytest.raises(ValueError, match=words.replace(";", ".")):
            show(module, **wish)
    bare = BareModule(crop=16)
    with pytest.raises(ValueError, match="no samples in val"):
        show(bare, "val")
    with pytest.raises(ValueError, match="No sample of test shows 'sea'"):
        show(bare, "test", class_name="sea")
    with pytest.raises(ValueError, match="no class 'land'; nearest: Land"):
        show(bare, class_name="land")


def test_the_pictures():
    """Image and labels beside each other, the image unchanged."""
    module = semantic()
    one = samples(module, "train", 1)[0]
    picture = np.asarray(show(module, "train", 1, panel=192))
    height, width = one.image.shape[:2]
    image = picture[36 : 36 + height, 8 : 8 + width]
    assert np.array_equal(image, one.image)
    labels = picture[36 : 36 + height, 8 + width + 3 : 8 + 2 * width + 3]
    assert not np.array_equal(labels, one.image)
    void = one.labels == IGNORE_INDEX
    assert void.any() and (labels[void] == 110).all(1).any()
    inside = one.labels == one.labels[height // 2, width // 2]
    changed = (labels != one.image).any(2)
    assert changed[void].mean() > 0.9 and inside.any()
    for options in ({"augment": 4}, {"split": "val", "count": 3}, {"class_name": "ring"}):
        for module in (semantic(), instances()):
            assert isinstance(show(module, **options), Image.Image)


def test_crowds_are_hatched_and_boxes_drawn(tmp_path):
    scenes = {split: split_scenes(split, 12, 0, (96, 120)) for split in ("train", "val")}
    write_coco(tmp_path / "coco", scenes)
    module = COCO(str(tmp_path / "coco"), workers=0)
    found = samples(module, "val", 12)
    crowd = next(one for one in found if one.labels.crowd.any() and len(one.labels.labels) > 1)
    picture = np.asarray(show(module, "val", ids=[crowd.image_id], panel=120))[36 : 36 + 96, 8 + 120 + 3 :][:, :120]
    from seglight import masks

    where = masks.decode([crowd.labels.rles[int(np.flatnonzero(crowd.labels.crowd)[0])]])[0]
    assert (picture[where] == 110).all(1).any()
    other = int(np.flatnonzero(~crowd.labels.crowd)[-1])
    x1, y1, x2, _ = crowd.boxes[other].round().astype(int)
    line = picture[y1, x1:x2]
    assert len(np.unique(line, axis=0)) < len(line)  # one colour, but for what lies on top


def test_hatching_leaves_the_rest_alone():
    image = np.full((30, 40, 3), 200, np.uint8)
    where = np.zeros((30, 40), bool)
    where[5:20, 5:20] = True
    hatched = _hatch(image, where)
    assert (hatched[~where] == 200).all() and (image == 200).all()
    stripes = (hatched[where] == 110).all(1)
    assert 0.2 < stripes.mean() < 0.5


def test_a_split_without_labels_says_so(tmp_path):
    bare, labelled = show(BareModule(crop=16), "test"), show(semantic(), "test", 2)
    assert bare.height > 100 and labelled.height > 100
    from seglight.data_show import _legend

    found = samples(BareModule(crop=16), "test")
    drawn = _legend(found, BareModule.classes, BareModule.palette, 900)
    sky = found[0]._replace(labels=np.where(np.eye(20, 30) > 0, 255, 0).astype(np.uint8))
    assert not np.array_equal(drawn, _legend([sky], BareModule.classes, BareModule.palette, 900))


def test_only_its_own_pictures_are_overwritten(tmp_path):
    picture = show(semantic(), count=1)
    path = tmp_path / "new" / "shown.png"
    save(picture, path)
    save(picture, path)
    assert Image.open(path).size == picture.size
    photo, text = tmp_path / "photo.png", tmp_path / "text.png"
    Image.new("RGB", (5, 5)).save(photo)
    text.write_text("mine")
    for mine in (photo, text):
        before = mine.read_bytes()
        with pytest.raises(ValueError, match="was not written by"):
            save(picture, mine)
        assert mine.read_bytes() == before
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        refuse_foreign(tmp_path / "shown.jpg")


def test_the_command(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "mine", {split: split_scenes(split, 6, 0, (96, 120)) for split in ("train", "val")})
    monkeypatch.chdir(tmp_path)
    source, crop = str(tmp_path / "mine"), ["--data.crop", "64", "--data.batch_size", "2"]
    assert main(["data", "show", source, "--count", "3", *crop]) == 0
    assert "Wrote data_show.png (" in capsys.readouterr().out
    drawn = Image.open("data_show.png").convert("RGB")
    assert np.array_equal(drawn, show(Folder(source, crop=64, batch_size=2), count=3))
    assert main(["data", "show", source, "--split", "val", "--index", "2", "--out", "two.png"]) == 0
    assert np.array_equal(Image.open("two.png").convert("RGB"), show(Folder(source), "val", ids=[2]))
    assert main(["data", "show", source, "--augment", "2", "--id", "nowhere", "--out", "x.png"]) == 2
    assert "no sample 'nowhere'" in capsys.readouterr().err
    assert main(["data", "show", source, "--class", "stars", "--out", "x.png"]) == 2
    assert "nearest: star" in capsys.readouterr().err
    assert main(["data", "show", source, "--out", "x.jpg"]) == 2
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.jpg").exists()
