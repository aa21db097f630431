"""Every fault that would waste a training run is found before it, all of them at once."""

import re

import numpy as np
import pytest
from PIL import Image

from seglight.data.check import check, fingerprint
from seglight.data.files import FileDataset, find
from seglight.data.findings import DataError, listing

RNG = np.random.default_rng(0)


def photo(path, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def mask(path, values=(0, 1, 2), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.array(values, np.uint8), size[::-1])
    Image.fromarray(labels).save(path)
    return path


def dataset(folder, count=4, values=(0, 1, 2, 255), **options):
    names = [f"s{i}" for i in range(count)]
    images = [photo(folder / "img" / f"{name}.jpg") for name in names]
    masks = [mask(folder / "lab" / f"{name}.png", values) for name in names]
    return FileDataset("Test train", names, images, masks, **options)


def fault(data, num_classes=3):
    with pytest.raises(DataError) as error:
        check(data, num_classes)
    return str(error.value)


def test_a_sound_dataset_passes(tmp_path):
    data = dataset(tmp_path)
    check(data, 3)
    data.check(3)
    image, labels = data.read(2)
    assert image.shape == (30, 40, 3) and sorted(np.unique(labels)) == [0, 1, 2, 255]


def test_a_fault_is_a_value_error():
    assert issubclass(DataError, ValueError)


def test_missing_files_are_listed_at_once(tmp_path):
    data = dataset(tmp_path, 14)
    for path in data.image_paths[:12] + data.mask_paths[13:]:
        path.unlink()
    text = fault(data)
    assert "13 faults" in text and "- 13 files: missing" in text and "and 3 more" in text
    assert "img/s0.jpg" in text and str(tmp_path) in text and text.count(str(tmp_path)) == 1


def test_faults_are_collected_worst_first(tmp_path):
    data = dataset(tmp_path, 8)
    data.image_paths[0].unlink()
    data.image_paths[1].write_bytes(data.image_paths[1].read_bytes()[:-9])
    mask(data.mask_paths[2], size=(41, 30))
    mask(data.mask_paths[3], (0, 7, 9))
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(data.mask_paths[4])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(data.image_paths[5], exif=exif)
    data.mask_paths[6].write_bytes(b"")
    lines = [line for line in fault(data).splitlines() if line.startswith("- ")]
    order = ["missing. Copy the", "empty file", "16 bits", "rotated", "truncated", "differ in size", "values 7, 9"]
    found = [next(word for word in order if word in line) for line in lines]
    assert sorted(found) == sorted(order)
    assert found[:2] == order[:2] and set(found[2:5]) == set(order[2:5]) and found[5:] == order[5:]
    assert all(line.startswith("- 1 file: ") for line in lines)
    assert "s2.png (41x30, image 40x30)" in fault(data) and "s3.png (7, 9)" in fault(data)


def test_a_truncated_mask_is_found(tmp_path):
    data = dataset(tmp_path)
    Image.fromarray(RNG.integers(0, 3, (300, 400), dtype=np.uint8)).save(data.mask_paths[1])
    photo(data.image_paths[1], (400, 300))
    check(data, 3)
    whole = data.mask_paths[1].read_bytes()
    data.mask_paths[1].write_bytes(whole[: len(whole) // 2])
    assert "truncated" in fault(data) and "lab/s1.png" in fault(data)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    data.mask_paths[1].write_bytes(damaged)
    assert "lab/s1.png" in fault(data)


def test_labels_beyond_the_classes_name_file_and_value(tmp_path):
    data = dataset(tmp_path)
    mask(data.mask_paths[2], (0, 1, 37))
    text = fault(data)
    assert "values 37 in the masks" in text and "3 classes" in text and "0..2" in text and "s2.png (37)" in text
    assert "s1.png" not in text and "data.ignore" in text
    check(data, 38)


def test_labels_from_one_are_recognised(tmp_path):
    text = fault(dataset(tmp_path, values=(1, 2, 3)))
    assert "start at 1" in text and "data.values: {1:" in text


def test_a_mask_of_0_and_255_is_not_what_it_seems(tmp_path):
    text = fault(dataset(tmp_path, values=(0, 255)), 2)
    assert "0 and 255 only" in text and "data.values: {0: background, 255: object}" in text
    lut = np.full(256, 2)
    lut[0], lut[255] = 0, 1
    data = dataset(tmp_path, values=(0, 255), lut=lut)
    check(data, 2)
    assert sorted(np.unique(data.read(0)[1])) == [0, 1]


def test_a_mask_of_0_and_128_gets_the_same_advice(tmp_path):
    assert "data.values: {0: background, 128: object}" in fault(dataset(tmp_path, values=(0, 128)), 2)


def test_a_little_void_in_a_scene_of_one_class_is_fine(tmp_path):
    check(dataset(tmp_path, values=(0,) * 30 + (255,)), 2)


def test_values_without_a_class_are_named_as_the_file_has_them(tmp_path):
    lut = np.full(256, 2)
    lut[10], lut[20] = 0, 1
    text = fault(dataset(tmp_path, values=(10, 20, 30), lut=lut), 2)
    assert "values 30 in the masks" in text and "data.values" in text


def test_rgb_masks_need_a_colour_map(tmp_path):
    data = dataset(tmp_path)
    for path in data.mask_paths:
        photo(path)
    text = fault(data)
    assert "- 4 files: mode RGB" in text and "data.colors" in text


def test_colours_become_labels(tmp_path):
    colours = {(10, 20, 30): 0, (30, 20, 10): 1, (0, 0, 0): 255}
    data = dataset(tmp_path, 1, colours=colours)
    labels = np.resize(np.array([0, 1, 255, 1]), (30, 40))
    table = {label: colour for colour, label in colours.items()}
    painted = np.array([table[v] for v in labels.ravel()], np.uint8).reshape(30, 40, 3)
    Image.fromarray(painted).save(data.mask_paths[0])
    np.testing.assert_array_equal(data.read(0)[1], labels)
    check(data, 2)
    painted[3, 4:6] = (11, 20, 30)
    Image.fromarray(painted).save(data.mask_paths[0])
    assert "(11, 20, 30) in 2 pixels" in fault(data, 2)
    with pytest.raises(DataError, match=r"s0\.png: colours that are not in the colour map"):
        data.read(0)
    Image.fromarray(painted).save(data.mask_paths[0].with_suffix(".jpg"))
    jpeg = FileDataset("Test", ["a"], data.image_paths, [data.mask_paths[0].with_suffix(".jpg")], colours=colours)
    assert "JPEG changes values" in fault(jpeg, 2)
    with pytest.raises(DataError, match="JPEG changes values"):
        jpeg.read(0)


def test_sizes_are_compared_when_reading_too(tmp_path):
    data = dataset(tmp_path)
    mask(data.mask_paths[1], size=(30, 40))
    with pytest.raises(DataError, match=r"s1\.jpg.*s1\.png.*differ in size"):
        data.read(1)


def test_an_empty_split_and_double_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="Test has no samples"):
        FileDataset("Test", [], [], [])
    with pytest.raises(DataError, match="more than once: b"):
        FileDataset("Test", ["a", "b", "b"], [tmp_path] * 3, [tmp_path] * 3)


def test_two_files_of_one_name_are_refused(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "deep/a.JPG")
    assert list(find(tmp_path, (".png", ".jpg"))) == ["a", "deep/a"]
    photo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png"):
        find(tmp_path, (".png", ".jpg"))


def test_fingerprint_knows_content_and_not_place(tmp_path):
    first = fingerprint(dataset(tmp_path / "one"))
    assert first["samples"] == 4 and re.fullmatch("[0-9a-f]{64}", first["sha256"])
    copy = tmp_path / "two"
    (tmp_path / "one").rename(copy)
    names = [f"s{i}" for i in range(4)]
    moved = FileDataset("x", names, [copy / f"img/{n}.jpg" for n in names], [copy / f"lab/{n}.png" for n in names])
    assert fingerprint(moved) == first == moved.fingerprint()
    moved.mask_paths[0].write_bytes(moved.mask_paths[0].read_bytes() + b"1")
    assert fingerprint(moved)["sha256"] != first["sha256"] and fingerprint(moved)["bytes"] == first["bytes"] + 1


def test_listing():
    assert listing("abc", 3) == "a, b, c" and listing("abcde", 3) == "a, b, c and 2 more"
