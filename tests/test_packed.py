"""Lists of full size: strings and paths in flat arrays, and how fast folders are listed."""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from seglight.data import files
from seglight.data.archive import Archive
from seglight.data.files import FileDataset, find
from seglight.data.packed import Packed, Paths, Strings, pack_bytes


def test_paths_are_those_that_were_packed():
    paths = [Path("/a/b c.png"), None, Path("rel/ä.jpg"), Path(os.fsdecode(b"/odd/\xff.png"))]
    packed = Paths.of(paths)
    assert isinstance(packed, Paths) and len(packed) == 4 and list(packed) == paths and packed == paths
    assert packed[-1] == paths[-1] and packed[1:3] == paths[1:3] and packed != paths[:3]
    assert list(pickle.loads(pickle.dumps(packed))) == paths
    for wrong in (4, -5):
        with pytest.raises(IndexError, match="holds 4"):
            packed[wrong]
    assert list(Paths([])) == []


def test_members_of_archives_stay_as_they_are(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x/1.png", b"1")
    member = Archive(tmp_path / "a.zip").member("x/1.png")
    assert Paths.of([Path("a"), member]) == [Path("a"), member]


def test_replaced_arrays_keep_the_files_of_the_others(tmp_path):
    for name in ("one", "two"):
        np.save(tmp_path / f"{name}.npy", np.arange(100))
    packed = Packed.map(tmp_path, ("one", "two"))
    other = packed.replaced(two=np.arange(5), three=np.arange(3))
    copy = pickle.loads(pickle.dumps(other))
    assert copy.one.tolist() == list(range(100)) and copy.two.tolist() == [0, 1, 2, 3, 4] and len(copy.three) == 3
    assert copy._files["one"] == tmp_path / "one.npy" and copy._files["two"].parent != tmp_path
    assert packed.two.tolist() == list(range(100))
    del other
    assert not copy._files["two"].exists() and (tmp_path / "one.npy").exists(), "files of others are not deleted"


def test_replaced_arrays_outlive_the_original():
    packed = Packed(one=np.arange(1000), two=np.arange(5))
    pickle.dumps(packed)  # puts the arrays into files that go with it
    other = packed.replaced(two=np.arange(3))
    del packed
    assert pickle.loads(pickle.dumps(other)).one.tolist() == list(range(1000))


def test_linked_folders_are_looked_into(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.png").touch()
    (tmp_path / "images/city").symlink_to(tmp_path / "elsewhere")
    assert list(find(tmp_path / "images", (".png",))) == ["city/1"]


def test_files_are_found_as_pathlib_lists_them(tmp_path):
    for name in (
        "b/2.jpg",
        "b.x/1.png",
        "b-c/3.JPG",
        "a.png",
        ".hidden.png",
        "b/.h.png",
        ".dir/4.png",
        "no.txt",
        "c.d.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = {
        path.relative_to(tmp_path).with_suffix("").as_posix(): path
        for path in sorted(tmp_path.rglob("*"))
        if path.suffix.lower() in (".png", ".jpg") and not path.name.startswith(".")
    }
    found = find(tmp_path, (".png", ".jpg"))
    assert found == expected and list(found) == list(expected) and len(found) == 6


def private_memory():
    with open("/proc/self/smaps_rollup") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private"))


def _touch(data, pipe):
    """Reads every sample, from nowhere."""
    total, one = 0, np.zeros((1, 1), np.uint8)

    def noted(path):
        nonlocal total
        total += len(path)
        return one

    files.read_image = files.read_mask = noted
    before = private_memory()
    for index in range(len(data)):
        data.read(index)
    pipe.send((total, private_memory() - before))


def _in_a_worker():
    """What a forked worker that reads 30,000 pairs of files takes for itself."""
    names = [f"{i:012}" for i in range(30_000)]
    images, masks = ([Path(f"/data/set/{kind}/{name}.png") for name in names] for kind in ("images", "masks"))
    length = sum(len(str(path)) for path in images + masks)
    data = FileDataset("x", names, images, masks)
    del images, masks
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=_touch, args=(data, theirs))
    worker.start()
    total, grown = ours.recv()
    worker.join()
    return total == length, grown


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_forgotten_pages_are_read_again(tmp_path):
    Packed(big=np.arange(4_000_000), small=np.arange(3)).save(tmp_path)
    data = Packed.map(tmp_path, ["big", "small"])

    def resident():
        with open("/proc/self/status") as file:
            return sum(1024 * int(line.split()[1]) for line in file if line.startswith(("RssFile", "RssShmem")))

    before = resident()
    total = data.big.sum()
    assert resident() - before > 30e6
    data.forget("big")
    data.forget("small")
    assert resident() - before < 5e6 and data.big.sum() == total and data.small.tolist() == [0, 1, 2]
    Packed(array=np.arange(3)).forget("array")
    written = np.load(tmp_path / "big.npy", mmap_mode="c")
    written[5] = -1
    Packed(array=written).forget("array")
    assert written[5] == -1


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_workers_share_the_lists():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # whose memory is not full of holes
        whole, grown = fresh.submit(_in_a_worker).result()
    assert whole
    assert grown < 1e6, "as Path objects they take 25 MB"


def test_strings():
    strings = Strings(*pack_bytes(text.encode() for text in ("", "ä", "abc")))
    assert list(strings) == ["", "ä", "abc"] and strings[-1] == "abc" and strings.raw(1) == "ä".encode()
