"""Large COCO files: read in pieces, kept in an index, equal to what one reader in one go makes of them."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from seglight.data.coco import COCODataset, COCOFormat
from seglight.data.cocojson import check as coco_check
from seglight.data.cocojson import index as coco_index
from seglight.data.cocojson import pieces as coco_pieces
from seglight.data.cocojson import quick
from seglight.data.cocojson import reader as coco_json
from seglight.data.cocojson.lists import Annotations
from seglight.data.findings import DataError
from seglight.data.transforms import Geometry

pytest.importorskip("pycocotools.mask")
HEIGHT, WIDTH = 40, 50
FORK = multiprocessing.get_context("fork")


def content(count=60, images=8):
    """Polygons, several parts, RLE in both forms, crowds, missing parts, and a fault here and there."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        x, y = rng.uniform(0, 30, 2)
        part = (np.tile([x, y], 4) + np.array([0, 0, 9, 0, 9, 9, 0, 9])).round(2).tolist()
        outline = [part] if number % 3 else [part, part[::-1]]
        if number % 10 == 5:
            outline = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
        entry = {"id": number + 1, "image_id": number % images, "category_id": 3, "segmentation": outline}
        if number % 7:
            entry |= {"bbox": [x, y, 9.0, 9.0], "area": 81.0, "iscrowd": int(number % 10 == 5)}
        found.append(entry)
    if count > 40:
        found[17]["segmentation"] = [[1, 2, 3]]
        found[40]["category_id"] = 99
    listed = [{"id": i, "file_name": f"bild_ä{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    return {"info": {"year": 1}, "images": listed, "annotations": found, "categories": [{"id": 3, "name": "Möhre"}]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file; small ones count as large."""
    monkeypatch.setenv("SEGLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco_pieces, "SMALLEST", 0)
    monkeypatch.setattr(coco_pieces, "PIECE", 700)
    monkeypatch.setattr(coco_pieces, "_ENTRY", 16)
    monkeypatch.setattr(coco_index, "SMALLEST", 0)
    monkeypatch.setattr(coco_index, "_SETTLED", -1.0)
    folder = tmp_path / "data"
    folder.mkdir()

    def written(data, name="objects.json", **options):
        path = folder / name
        path.write_text(data if isinstance(data, str) else json.dumps(data, **options), encoding="utf-8")
        return path

    return written


def outlines(packed, rows):
    """The outlines of some rows, as bytes."""
    found = []
    for row in rows.tolist():
        starts = packed.part_starts[packed.parts[row] : packed.parts[row + 1] + 1]
        rle = packed.rle[slice(*packed.rle_starts[row : row + 2])]
        found.append((*(packed.points[a:b].tobytes() for a, b in itertools.pairwise(starts)), rle.tobytes()))
    return found


def same(one, other):
    """Everything is equal; outlines may lie in another order."""
    assert (one.category_ids, one.categories, one.faults) == (other.category_ids, other.categories, other.faults)
    assert one.packed._arrays.keys() == other.packed._arrays.keys()
    for name, array in one.packed._arrays.items():
        theirs = getattr(other.packed, name)
        assert array.dtype == theirs.dtype and array.shape == theirs.shape, name
        if name not in ("rows", "parts", "part_starts", "points", "rle", "rle_starts"):
            assert np.array_equal(array, theirs), name
    assert outlines(one.packed, one.packed.rows) == outlines(other.packed, other.packed.rows)
    every = [sorted(outlines(found.packed, np.arange(len(found.packed.parts) - 1))) for found in (one, other)]
    assert every[0] == every[1], "with those of annotations that were dropped"
    return True


def alone(path, monkeypatch):
    """The document as one process reads it."""
    with monkeypatch.context() as patch:
        patch.setattr(coco_pieces, "SMALLEST", 1 << 40)
        return coco_json.read(path)


# ---------------------------------------------------------------- pieces


def test_pieces_make_the_same_document(write, monkeypatch, tmp_path):
    for number, options in enumerate(({}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")})):
        data = content()
        if number % 2:  # the order of the lists must not matter
            data = {"annotations": data.pop("annotations"), **data}
        path = write(data, **options)
        found = coco_pieces.read_pieces(path, None)
        assert found is not None and len(found[1]["ids"]) == 59 and len(found[2]) == 1
        expected = alone(path, monkeypatch)
        assert len(expected.faults) == 2 and "annotation 18" in str(expected.faults)
        assert same(coco_json.read(path), expected)
        assert same(coco_json.read(path, points=tmp_path / f"points{number}.npy"), expected)
    marked = write("\ufeff" + json.dumps(content()))
    assert same(coco_json.read(marked), alone(marked, monkeypatch)), "a byte order mark"


def ordinary(count=20):
    rng = np.random.default_rng(1)
    return [
        {
            "id": int(rng.integers(1 << 62)) * (-1) ** n,
            "image_id": n,
            "category_id": n % 3,
            "iscrowd": n % 2,
            "area": [7, 0.1, -2.5e-3, 1e22][n % 4],
            "bbox": [n, 0.3, 1.7976931348623157e308, 5e-324],
            "segmentation": [rng.normal(size=6 + 2 * (n % 3)).tolist(), [1, 2, 3, 4, 5, 6]][: 1 + n % 2],
            "more": {"text": "}, {", "id": 0},
        }
        for n in range(count)
    ]


def one_by_one(entries):
    found = Annotations()
    for one in entries:
        found.add(one)
    return found.columns()


def test_ordinary_annotations_are_read_at_once():
    entries = ordinary()
    del entries[3]["iscrowd"]
    for number, counts in ((4, [100, 50, HEIGHT * WIDTH - 150]), (5, "01:00000000000000000")):
        entries[number]["segmentation"] = {"size": [HEIGHT, WIDTH] if number == 4 else [10, 10], "counts": counts}
    for few in (entries, entries[:1]):
        found, expected = quick.columns(json.dumps(few).encode()), one_by_one(few)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert array.dtype == found[name].dtype and np.array_equal(array, found[name]), name


UNUSUAL = {
    "no id": lambda one: one.pop("id"),
    "no image": lambda one: one.pop("image_id"),
    "no box": lambda one: one.pop("bbox"),
    "no area": lambda one: one.pop("area"),
    "no outline": lambda one: one.pop("segmentation"),
    "id as text": lambda one: one.update(id="7"),
    "id true": lambda one: one.update(id=True),
    "id 7.0": lambda one: one.update(id=7.0),
    "id beyond 63 bits": lambda one: one.update(id=1 << 63),
    "id beyond 64 bits": lambda one: one.update(id=1 << 64),
    "crowd 2": lambda one: one.update(iscrowd=2),
    "crowd true": lambda one: one.update(iscrowd=True),
    "area as text": lambda one: one.update(area="1"),
    "area true": lambda one: one.update(area=True),
    "area unknown": lambda one: one.update(area=None),
    "box of three": lambda one: one.update(bbox=[1, 2, 3]),
    "box in a list": lambda one: one.update(bbox=[[1, 2, 3, 4]]),
    "box with a list": lambda one: one.update(bbox=[[1], 2, 3, 4]),
    "box of text": lambda one: one.update(bbox=["1", 2, 3, 4]),
    "box of nothing": lambda one: one.update(bbox=[1, 2, 3, None]),
    "box NaN": lambda one: one.update(bbox=[1, 2, 3, float("nan")]),
    "box a number": lambda one: one.update(bbox=1),
    "RLE of another size": lambda one: one.update(segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 9]}),
    "RLE without counts": lambda one: one.update(segmentation={"size": [HEIGHT, WIDTH]}),
    "RLE with a list in its size": lambda one: one.update(
        segmentation={"size": [[HEIGHT], WIDTH], "counts": [0, 2000]}
    ),
    "no RLE": lambda one: one.update(segmentation={}),
    "no polygon": lambda one: one.update(segmentation=[]),
    "polygon of numbers": lambda one: one.update(segmentation=[1, 2, 3, 4, 5, 6]),
    "polygon of pairs": lambda one: one.update(segmentation=[[[1, 2], [3, 4], [5, 6]]]),
    "polygon with a list": lambda one: one.update(segmentation=[[1, 2, 3, 4, 5, 6, 7, [8]]]),
    "polygon that starts with a list": lambda one: one.update(segmentation=[[[1], 2, 3, 4, 5, 6]]),
    "two points": lambda one: one.update(segmentation=[[1, 2, 3, 4]]),
    "odd": lambda one: one.update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    "polygon with text": lambda one: one.update(segmentation=[[1, 2, 3, 4, 5, "6"]]),
    "outline as text": lambda one: one.update(segmentation="1 2 3 4 5 6"),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_annotations_are_read_one_by_one(write, monkeypatch, case):
    data = content()
    place = len(data["annotations"]) // 2
    UNUSUAL[case](data["annotations"][place])
    text = json.dumps([data["annotations"][place]]).encode()
    assert quick.columns(text) is None
    path = write(data)
    assert same(coco_json.read(path), alone(path, monkeypatch))


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[1]", b"[[]]", b"[null]", b'["id"]', b'[{"id": 1}, ]', b'[{"id": "\xff"}]']
)
def test_what_is_no_list_of_annotations_is_read_one_by_one(text):
    assert quick.columns(text) is None


@pytest.mark.parametrize("case", ["nested", "elsewhere", "twice", "later"])
def test_unusual_files_are_read_in_one_go(write, monkeypatch, case):
    data = content()
    if case == "nested":  # "}, {" inside an annotation
        for entry in data["annotations"]:
            entry["marks"] = [{"at": i} for i in range(60)]
    elif case == "elsewhere":
        data = {"info": {"annotations": [{"id": 1}, {"id": 2}]}, **{k: v for k, v in data.items() if k != "info"}}
    text = json.dumps(data)
    if case == "twice":
        text = text[:-1] + ', "annotations": ' + json.dumps(content(3)["annotations"]) + "}"
    elif case == "later":  # the first entry is fine, a piece in the middle holds nonsense that the reader must name
        comma = text.replace('}, {"id": 30,', '} {"id": 30,')
        for broken, place in ((text.replace('"id": 30,', '"id": 3O,'), 29), (comma, 28)):
            path = write(broken)
            with pytest.raises(DataError) as expected:
                alone(path, monkeypatch)
            with pytest.raises(DataError) as error:
                coco_json.read(path)
            assert str(error.value) == str(expected.value) and f"annotations[{place}]" in str(error.value)
        return
    path = write(text)
    assert coco_json._in_pieces(path, None) is None
    assert same(coco_json.read(path), alone(path, monkeypatch))


@pytest.mark.parametrize("case", ["later list", "full disk", "killed"])
def test_corners_that_belong_to_nobody(write, monkeypatch, tmp_path, case):
    data, points = content(), tmp_path / "points.npy"
    if case == "later list":  # whose entries look like annotations, so that readers of later pieces keep their corners
        data["removed"] = content(300)["annotations"]
        real = coco_pieces.read_piece
        monkeypatch.setattr(coco_pieces, "read_piece", lambda *args: slow_at_the_end(real(*args)))
    elif case == "full disk":
        monkeypatch.setattr(coco_pieces, "open", half_written, raising=False)
    else:
        monkeypatch.setattr(coco_pieces, "read_piece", lambda *_: os.kill(os.getpid(), 9))
    path = write(data)
    assert coco_pieces.read_pieces(path, points) is None and not points.exists()
    assert same(coco_index.document(path), alone(path, monkeypatch))
    assert len(list((tmp_path / "cache/coco").glob("*/points.npy"))) == 1, "the index was written"


def slow_at_the_end(piece):
    if piece and piece.end:
        time.sleep(0.5)
    return piece


def half_written(path, mode, **options):
    """`open`; what is appended is written by half."""

    class Full(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[: data.nbytes // 2])

    return Full(path, mode) if mode == "ab" else open(path, mode, **options)


IMAGES = {
    "no id": lambda one: one.pop("id"),
    "no name": lambda one: one.pop("file_name"),
    "no height": lambda one: one.pop("height"),
    "id as text": lambda one: one.update(id="1"),
    "id true": lambda one: one.update(id=True),
    "id 1.0": lambda one: one.update(id=1.0),
    "id beyond 63 bits": lambda one: one.update(id=1 << 63),
    "id beyond 64 bits": lambda one: one.update(id=1 << 64),
    "id below 63 bits": lambda one: one.update(id=-(1 << 63) - 1),
    "id twice": lambda one: one.update(id=2),
    "name a number": lambda one: one.update(file_name=1),
    "name twice": lambda one: one.update(file_name="bild_ä2.png"),
    "height 0": lambda one: one.update(height=0),
    "width in halves": lambda one: one.update(width=50.5),
    "width of a giant": lambda one: one.update(width=(1 << 20) + 1),
}


@pytest.mark.parametrize("case", IMAGES)
def test_unusual_images_are_read_one_by_one(write, monkeypatch, case):
    data = content()
    IMAGES[case](data["images"][1])
    found = quick.entries(json.dumps(data).encode(), {"images"})
    if case == "id beyond 64 bits" or case == "id below 63 bits":
        with pytest.raises(ValueError, match=r"NUMBER|BIGINT"):
            next(found)
    else:
        assert [number for _, number, _ in found] == [None, *range(8)]
    path = write(data)
    found = coco_json.read(path)
    assert same(found, alone(path, monkeypatch)) and len(found) == 7


def test_ordinary_images_are_read_at_once(write):
    data = content()
    data["images"][0] |= {"id": (1 << 63) - 1, "height": 1 << 20, "width": 1}
    data["images"][1]["id"] = -(1 << 63)
    found = list(quick.entries(json.dumps(data).encode(), {"images"}))
    keys = "id", "file_name", "height", "width"
    assert found == [("images", None, tuple([one[key] for one in data["images"]] for key in keys))]
    assert list(quick.entries(b'{"images": [1, {}]}', {"images"})) == [
        ("images", None, None),
        ("images", 0, 1),
        ("images", 1, {}),
    ]


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_cut_off_files_are_refused_as_ever(write, monkeypatch, cut):
    text = json.dumps(content())
    path = write(text[: int(cut * len(text))])
    with pytest.raises(DataError) as expected:
        alone(path, monkeypatch)
    with pytest.raises(DataError) as error:
        coco_json.read(path)
    assert str(error.value) == str(expected.value) and "cut" in str(error.value)
    with pytest.raises(DataError, match="cut"):
        coco_index.document(path)
    assert not list((path.parent.parent / "cache/coco").glob("*.part")), "nothing half-written stays"


def test_files_without_annotations(write):
    data = content(0 + 50)
    path = write({**data, "annotations": []})
    assert coco_pieces.read_pieces(path, None) is None and len(coco_index.document(path).packed.ids) == 0
    del data["annotations"]
    path = write(data, "info.json")
    assert not coco_index.document(path, labelled=False).labelled
    with pytest.raises(DataError, match="has no annotations"):
        coco_index.document(path)


# ---------------------------------------------------------------- index


def builds(monkeypatch):
    """Times of reading a json, counted."""
    seen, gather = [], coco_json.gather
    monkeypatch.setattr(coco_json, "gather", lambda *args: seen.append(args) or gather(*args))
    return seen


def test_the_index_holds_the_same_document(write, monkeypatch, tmp_path):
    path = write(content())
    expected = alone(path, monkeypatch)
    before = sorted(path.parent.iterdir())
    seen = builds(monkeypatch)
    for _ in range(3):
        found = coco_index.document(path)
        assert same(found, expected) and found.sha256 == coco_index.file_digest(path)
        bad, faults = coco_check.degenerate(found)
        judged = coco_check.degenerate(expected)
        assert np.array_equal(bad, judged[0]) and faults == judged[1] and not found.packed.points.flags.writeable
    assert len(seen) == 1, "read once"
    assert sorted(path.parent.iterdir()) == before, "nothing is written beside the data"
    copy = write(path.read_text(), "copy.json")
    assert same(coco_index.document(copy), expected) and len(seen) == 1, "an index belongs to the content"
    assert coco_index.document(copy).path == copy


def test_datasets_from_json_and_from_the_index_are_equal(write, monkeypatch):
    path = write(content())
    for index in range(8):
        Image.new("RGB", (WIDTH, HEIGHT), (index, 0, 0)).save(path.parent / f"bild_ä{index}.png")
    whole = Geometry((HEIGHT, WIDTH), (0, 0, HEIGHT, WIDTH), (0, 0, HEIGHT, WIDTH))
    old = COCODataset("x", alone(path, monkeypatch), path.parent, "drop")
    new = COCODataset("x", coco_index.document(path), path.parent, "drop")
    again = pickle.loads(pickle.dumps(new))
    for data in (new, again):
        assert list(data.ids) == list(old.ids) and data.fingerprint() == old.fingerprint()
        for index in range(len(old)):
            one, other = old.objects(index), data.objects(index)
            assert np.array_equal(one.masks(whole), other.masks(whole))
            for name in ("boxes", "labels", "iscrowd", "area"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
    kept = [name for name in ("points", "parts", "rle") if name in new.data._files]
    assert kept == ["points", "parts", "rle"], "what lies in the index is not copied to be pickled"


def test_a_changed_file_is_read_again(write, monkeypatch):
    path = write(content())
    coco_index.document(path)
    seen, state = builds(monkeypatch), path.stat()
    path.write_text(path.read_text().replace('"area": 81.0', '"area": 18.0'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size and path.stat().st_mtime_ns == state.st_mtime_ns
    assert 18.0 in coco_index.document(path).packed.area and len(seen) == 1
    os.utime(path)
    assert 18.0 in coco_index.document(path).packed.area and len(seen) == 1, "touched, but the same"
    monkeypatch.setattr(coco_index, "_code", lambda: "other")
    coco_index.document(path)
    assert len(seen) == 2, "read again by other code"
    folders = [one for one in (coco_index.home() / "coco").iterdir() if one.is_dir()]
    assert len([one for one in folders if one.name.endswith("-other")]) == 1
    assert len(folders) == 2, "what the other code left of this content is gone"


def test_a_file_that_was_just_written_is_not_trusted_by_its_time(write, monkeypatch):
    monkeypatch.setattr(coco_index, "_SETTLED", 3600.0)
    path = write(content())
    coco_index.document(path)
    assert not list((coco_index.home() / "coco").glob("*.json"))
    monkeypatch.setattr(coco_index, "_SETTLED", -1.0)
    coco_index.document(path)
    assert len(list((coco_index.home() / "coco").glob("*.json"))) == 1


def test_a_file_that_changes_while_it_is_read_gets_no_index(write, monkeypatch, caplog):
    path, other = write(content()), write(content(50), "other.json")
    gather = coco_json.gather

    def late(*args):
        found = gather(*args)
        if other.exists():
            other.replace(path)
        return found

    monkeypatch.setattr(coco_json, "gather", late)
    with caplog.at_level(logging.WARNING):
        found = coco_index.document(path)
    assert "changed while it was read" in caplog.text and found.index is None
    assert not [one for one in (coco_index.home() / "coco").iterdir() if one.is_dir()]
    assert same(found, alone(path, monkeypatch)) and same(coco_index.document(path), found)
    assert len(found.packed.ids) == 48, "those of the new file"


def test_a_copy_is_known_by_its_content(write, monkeypatch):
    path = write(content())
    coco_index.document(path)
    seen = builds(monkeypatch)
    assert coco_index.document(write(path.read_text(), "copy.json")).index and not seen
    other = write(path.read_text().replace('"area": 81.0', '"area": 18.0'), "other.json")
    assert other.stat().st_size == path.stat().st_size
    assert 18.0 in coco_index.document(other).packed.area and len(seen) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "header", "empty"])
def test_a_damaged_index_is_made_again(write, monkeypatch, caplog, damage):
    path = write(content())
    expected = alone(path, monkeypatch)
    folder = coco_index.document(path).index
    file = folder / ("document.json" if damage == "header" else "points.npy")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "header":
        data = data[:-10]
    elif damage == "empty":
        data = b""
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data)
    seen = builds(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert same(coco_index.document(path), expected)
    assert "damaged" in caplog.text and len(seen) == 1
    assert same(coco_index.document(path), expected) and len(seen) == 1


def test_without_a_place_to_write_the_file_is_read_every_time(write, monkeypatch, caplog, tmp_path):
    path = write(content())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGLIGHT_CACHE", str(tmp_path / "file"))
    seen = builds(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert same(coco_index.document(path), alone(path, monkeypatch))
    assert "SEGLIGHT_CACHE" in caplog.text and len(seen) >= 1
    with pytest.raises(FileNotFoundError):
        coco_index.document(path.with_name("none.json"))


def test_an_index_that_one_may_only_read_is_read(write, monkeypatch):
    path = write(content())
    folder = coco_index.document(path).index
    seen = builds(monkeypatch)
    copy = write(path.read_text(), "copy.json")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(coco_index, "whole", refused)
    assert coco_index.document(copy).index == folder and not seen


def test_small_files_have_no_index(write, monkeypatch):
    path = write(content())
    monkeypatch.setattr(coco_index, "SMALLEST", 1 << 20)
    assert coco_index.document(path).index is None and not coco_index.home().exists()


def test_where_the_index_lies(monkeypatch, tmp_path):
    assert str(coco_index.home()).startswith(os.environ["XDG_CACHE_HOME"])
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert coco_index.home() == tmp_path.__class__("~/.cache/seglight").expanduser()


# ---------------------------------------------------------------- several processes


def _open(path, log, queue):
    gather = coco_json.gather

    def slow(*args):
        with open(log, "a") as file:
            file.write("read\n")
        time.sleep(0.5)
        return gather(*args)

    coco_json.gather = slow
    found = coco_index.document(path)
    queue.put((len(found.packed.ids), float(found.packed.points.sum()), found.index is not None))


def test_one_of_several_processes_reads(write, monkeypatch, tmp_path):
    path, queue = write(content()), FORK.Queue()
    monkeypatch.setattr(coco_pieces, "SMALLEST", 1 << 40)
    expected = coco_json.read(path)
    workers = [FORK.Process(target=_open, args=(path, tmp_path / "log", queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {(len(expected.packed.ids), float(expected.packed.points.sum()), True)}
    assert (tmp_path / "log").read_text().count("read") == 1


def _crash(path):
    coco_check.degenerate = lambda document: os._exit(9)
    coco_index.document(path)


def test_a_crash_in_the_middle_leaves_nothing_that_counts(write, monkeypatch):
    path = write(content())
    worker = FORK.Process(target=_crash, args=(path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    left = list((coco_index.home() / "coco").glob("*.part"))
    assert len(left) == 1 and (left[0] / "points.npy").exists()
    os.utime(left[0], (0, 0))
    assert same(coco_index.document(path), alone(path, monkeypatch))
    assert not left[0].exists(), "leftovers go when nobody can be writing to them any more"


def private_memory(pid="self"):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private"))


def _touch(path, pipe):
    before = private_memory()
    found = coco_index.document(path)
    data = COCODataset("x", found, path.parent, "drop", look=False)
    total = sum(len(data.objects(i)) for i in range(len(data)))
    pipe.send((total, data.data.nbytes, private_memory() - before))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_ranks_share_the_index(write):
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(3000)]
    outline = [[0, 0, 29, 0, 29, 29] * 100]
    entries = [
        {"id": i, "image_id": i, "category_id": 3, "bbox": [0, 0, 29, 29], "area": 9, "segmentation": outline}
        for i in range(3000)
    ]
    path = write({"images": images, "annotations": entries, "categories": [{"id": 3, "name": "a"}]})
    coco_pieces.PIECE = 1 << 20  # put back by the fixture
    coco_index.document(path)
    ours, theirs = FORK.Pipe()
    worker = FORK.Process(target=_touch, args=(path, theirs))
    worker.start()
    total, size, grown = ours.recv()
    worker.join()
    assert total == 3000 and size > 14e6
    assert grown < 7e6, "what a process needs besides the arrays"


# ---------------------------------------------------------------- image files


def looks(monkeypatch):
    seen, probe = [], coco_check.probe
    monkeypatch.setattr(coco_check, "probe", lambda path: seen.append(path.name) or probe(path))
    return seen


def test_images_that_have_not_changed_are_not_opened_again(write, monkeypatch):
    data = content()
    data["annotations"] = [entry for i, entry in enumerate(data["annotations"]) if i not in (17, 40)]
    path = write(data)
    folder = path.parent
    for index in range(8):
        Image.new("RGB", (WIDTH, HEIGHT), (index, 0, 0)).save(folder / f"bild_ä{index}.png")
    (folder / "bild_ä1.png").unlink()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "bild_ä2.png")
    seen = looks(monkeypatch)

    def ids():
        found = coco_index.document(path)
        bad, faults = coco_index.image_faults(found, folder)
        expected = coco_check.image_faults(found, folder)
        assert np.array_equal(bad, expected[0]) and faults == expected[1]
        del seen[-len(found) :]
        dropped = COCODataset("x", found, folder, "drop")
        return list(dropped.ids)

    assert ids() == ["0", "3", "4", "5", "6", "7"]
    assert sorted(seen[:8]) == [f"bild_ä{i}.png" for i in range(8)]
    seen.clear()
    assert ids() == ["0", "3", "4", "5", "6", "7"] and set(seen) == {"bild_ä1.png"}, "only what is missing is sought"
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "bild_ä2.png")
    (folder / "bild_ä5.png").write_bytes(b"no image at all")
    seen.clear()
    assert ids() == ["0", "2", "3", "4", "6", "7"]
    assert set(seen) == {"bild_ä1.png", "bild_ä2.png", "bild_ä5.png"}
    memo = next(coco_index.document(path).index.glob("images-*.npz"))
    memo.write_bytes(b"damaged")
    seen.clear()
    assert ids() == ["0", "2", "3", "4", "6", "7"] and len(set(seen)) == 8
    with pytest.raises(DataError, match="missing"):
        COCODataset("x", coco_index.document(path), folder).check(1)


def test_nobody_looks_at_images_without_the_check(write, monkeypatch):
    path = write(content(24))
    seen = looks(monkeypatch)
    module = COCOFormat(str(path.parent), str(path), faulty="drop", check=False)
    assert len(module.split("train")) + len(module.split("val")) == 8 and not seen
    with pytest.raises(FileNotFoundError):
        module.split("val").image(0)
