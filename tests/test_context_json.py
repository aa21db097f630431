"""PASCAL-Context from trainval_merged.json: what `Detail.getMask` would paint, which images, what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest

from seglight.cli.data import main
from seglight.data.context import PascalContext
from seglight.data.context_json import ContextFile
from seglight.data.findings import DataError
from seglight.data.formats.context import CONTEXT_LABELS, write_context, write_context_json
from seglight.data.scenes import VOID, split_scenes

coco = pytest.importorskip("pycocotools.mask")
SIZE = (64, 72)
TRAIN, VAL = list(split_scenes("train", 4, 0, SIZE)), list(split_scenes("val", 3, 0, SIZE))
FILE = "VOCdevkit/VOC2010/trainval_merged.json"


@pytest.fixture
def root(tmp_path):
    return write_context_json(tmp_path / "json", {"train": TRAIN, "val": VAL})


def edit(root, change):
    document = json.loads((root / FILE).read_text())
    change(document)
    (root / FILE).write_text(json.dumps(document))


def encoded(mask):
    one = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": one["counts"].decode()}


@pytest.mark.fidelity
def test_the_miniature_has_the_keys_of_the_real_file(root):
    document = json.loads((root / FILE).read_text())
    lists = {"images", "annos_segmentation", "categories", "parts", "annos_occlusion", "annos_boundary", "annos_joints"}
    assert lists <= set(document)
    image, segment = document["images"][0], document["annos_segmentation"][0]
    assert image["image_id"] == 2008000002 and image["file_name"] == "2008_000002.jpg" and image["phase"] == "train"
    assert {"id", "image_id", "category_id", "segmentation", "area", "iscrowd"} <= set(segment)
    assert isinstance(segment["segmentation"]["counts"], str)
    assert len(document["images"]) == 6, "one of the seven is left out, as some are in the real file"


@pytest.mark.fidelity
def test_a_label_map_is_what_getmask_paints(root):
    """Category after category in the order of the file, each over what was there, on a canvas of 0."""
    document = json.loads((root / FILE).read_text())
    file = ContextFile(root / FILE)
    overlaid = 0
    for place, image in enumerate(document["images"]):
        canvas = np.zeros((image["height"], image["width"]))
        for one in document["annos_segmentation"]:
            if one["image_id"] == image["image_id"]:
                inside = coco.decode(one["segmentation"]) > 0
                overlaid += int((canvas[inside] > 0).sum())
                canvas[inside] = one["category_id"]
        found = file.label_map(place)
        assert found.dtype == np.uint16 and np.array_equal(found, canvas) and file.size(place) == canvas.shape
    assert overlaid > 100, "the order matters here"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("order", ["alphabetical", "fcn"])
def test_the_labels_are_those_of_the_mat_files(root, tmp_path, background, order):
    mat = write_context(tmp_path / "mat", {"train": TRAIN, "val": VAL})
    options = {"background": background, "order": order}
    one, two = PascalContext(str(mat), **options), PascalContext(str(root), **options)
    assert (one.kind, two.kind) == ("mat", "json") and one.classes == two.classes
    for split, count in (("train", 4), ("val", 2)):
        a, b = one.dataset(split), two.dataset(split)
        assert a.ids[:count] == b.ids and len(b) == count
        b.check(two.num_classes)
        for index in range(count):
            assert np.array_equal(a.read(index)[1], b.read(index)[1])
            assert np.array_equal(a.read(index)[0], b.read(index)[0])
    expected = two.classes.index(CONTEXT_LABELS[0][1])
    mask = two.dataset("train").read(0)[1]
    assert (mask[TRAIN[0].mask == 0] == expected).all()
    assert (mask[TRAIN[0].mask == VOID] == (0 if background else 255)).all()


def test_which_route_is_recorded(root, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        found = PascalContext(str(root)).dataset("val").fingerprint()
    assert found["labels"] == "json" and found["samples"] == 2 and found["images"] == 6
    assert "PASCAL-Context val (json) has 2 of the 5,104 published samples" in caplog.text
    mat = write_context(tmp_path / "mat", {"train": TRAIN, "val": VAL})
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert PascalContext(str(mat)).dataset("val").fingerprint()["labels"] == "mat"
    assert "PASCAL-Context val (mat) has 3 of the 5,105 published samples" in caplog.text
    data = PascalContext(str(root))
    data.split("train")
    assert data.fingerprint()["train"]["labels"] == "json"


@pytest.mark.parametrize("place", ["", "VOC2010", "VOCdevkit/VOC2010"])
def test_where_the_file_may_be(root, place):
    target = root / place / "trainval_merged.json"
    target.parent.mkdir(exist_ok=True)
    (root / FILE).rename(target)
    if place == "VOC2010":
        for folder in ("JPEGImages", "ImageSets"):
            (root / "VOCdevkit/VOC2010" / folder).rename(root / "VOC2010" / folder)
    PascalContext(str(root)).dataset("train").check(60)
    assert PascalContext(str(root), labels="json").json == target


def test_the_devkit_itself_may_be_the_root(root):
    PascalContext(str(root / "VOCdevkit/VOC2010")).dataset("train").check(60)


def test_both_kinds_in_one_folder(root, tmp_path):
    mat = write_context(tmp_path / "mat", {"train": TRAIN, "val": VAL})
    shutil.copy(root / FILE, mat / FILE)
    assert len(PascalContext(str(mat)).dataset("val")) == 3, "the .mat files first"
    assert len(PascalContext(str(mat), labels="json").dataset("val")) == 2
    with pytest.raises(FileNotFoundError, match=r"trainval_merged\.json"):
        PascalContext(str(tmp_path), labels="json")
    with pytest.raises(FileNotFoundError, match=r"Found none of .*trainval\."):
        PascalContext(str(root), labels="mat")


def test_a_list_of_the_user(root):
    lists, ids = root / "VOCdevkit/VOC2010/ImageSets/Main", PascalContext(str(root)).dataset("val").ids
    (lists / "mine.txt").write_text(f"{ids[1]} 1\n")
    assert PascalContext(str(root), val_split="mine").dataset("val").ids == [ids[1]]
    left_out = sorted(set((lists / "val.txt").read_text().split()) - set(ids))
    (lists / "mine.txt").write_text("\n".join(left_out))
    with pytest.raises(DataError, match=rf"1 images that .* does not hold: {left_out[0]}"):
        PascalContext(str(root), val_split="mine").dataset("val")
    with pytest.raises(DataError, match=r"of the training samples"):
        PascalContext(str(root), val_split="trainval").dataset("train")


def test_it_is_read_once_and_travels_packed(root, monkeypatch):
    reads = []
    made = ContextFile.__init__
    monkeypatch.setattr(ContextFile, "__init__", lambda self, path: reads.append(path) or made(self, path))
    data = PascalContext(str(root), batch_size=2, crop=32, workers=2)
    train, val = data.split("train"), data.split("val")
    assert len(reads) == 1
    copy = pickle.loads(pickle.dumps(train))
    assert len(pickle.dumps(train)) < 4000 and np.array_equal(copy.read(1)[1], train.read(1)[1])
    assert sum(len(batch["image_id"]) for batch in data.val_dataloader()) == len(val)
    assert len(list(data.train_batches(3))) == 3 and len(reads) == 1


def test_uncompressed_run_lengths(root):
    whole = PascalContext(str(root)).dataset("train").read(0)[1]

    def change(document):
        for one in document["annos_segmentation"]:
            flat = coco.decode(one["segmentation"]).ravel(order="F")
            bounds = np.flatnonzero(np.diff(flat, prepend=0, append=2))
            one["segmentation"]["counts"] = np.diff(bounds, prepend=0).tolist()

    shutil.copytree(root, root.with_name("copy"))
    edit(root.with_name("copy"), change)
    assert np.array_equal(PascalContext(str(root.with_name("copy"))).dataset("train").read(0)[1], whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("images"), "has no images, so it is not PASCAL in Detail"),
        (lambda d: d.pop("annos_segmentation"), "has no annos_segmentation"),
        (lambda d: d["images"][2].pop("height"), r"1 entries cannot be used: images\[2\] \(KeyError: 'height'\)"),
        (lambda d: d["annos_segmentation"][1].update(segmentation=[[1, 2, 3]]), r"annos_segmentation\[1\]"),
        (lambda d: d["annos_segmentation"][1].update(image_id=7), "segments of the unknown image 7"),
        (lambda d: d["annos_segmentation"].insert(0, 3), r"annos_segmentation\[0\]"),
    ],
)
def test_broken_files_are_refused(root, change, words):
    edit(root, change)
    with pytest.raises(DataError, match=words):
        PascalContext(str(root)).dataset("train")


def test_a_cut_off_file_is_refused(root):
    path = root / FILE
    path.write_text(path.read_text()[:-2000])
    with pytest.raises(DataError, match=r"line 1.*broken or cut off"):
        PascalContext(str(root)).dataset("train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.update(category_id=460), "category_id holds 460, but the numbers are 1..459"),
        (lambda one: one.update(segmentation=encoded(np.ones((64, 71)))), "is no RLE of 64 x 72 pixels"),
        (lambda one: one["segmentation"].update(counts="P"), "is no RLE of 64 x 72 pixels"),
        (lambda one: one["segmentation"].update(counts="Q\x7f"), "is no RLE of 64 x 72 pixels"),
    ],
)
def test_faults_that_the_check_finds(root, change, words):
    edit(root, lambda document: change(document["annos_segmentation"][0]))
    data = PascalContext(str(root)).dataset("train")
    with pytest.raises(DataError, match=words) as error:
        data.check(60)
    assert "trainval_merged.json" in str(error.value) and "2008_000002" in str(error.value)
    with pytest.raises(DataError, match=words):
        data.read(0)


def test_sizes_are_compared(root):
    edit(root, lambda document: document["images"][0].update(width=71))
    with pytest.raises(DataError, match=r"differ in size"):
        PascalContext(str(root)).dataset("train").check(60)


def test_data_sample_and_its_command(tmp_path, capsys):
    words = ["sample", "--format", "context_json", str(tmp_path / "out"), "--train", "2", "--val", "2"]
    assert main([*words, "--size", "48", "50"]) == 0
    assert "--data PascalContext" in capsys.readouterr().out
    assert len(PascalContext(str(tmp_path / "out")).dataset("val")) == 2
