"""Samples inside zip archives: the same bytes, in any number of processes, and clear words about broken archives."""

import multiprocessing
import os
import pickle
import struct
import threading
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from seglight.data.archive import Archive, Member, files_below, opened, sources
from seglight.data.check import check, fingerprint
from seglight.data.decode import probe, read_image, read_mask
from seglight.data.files import FileDataset
from seglight.data.findings import DataError

RNG = np.random.default_rng(0)


def content(number):
    return RNG.integers(0, 256, 2000 + number, dtype=np.uint8).tobytes() if number % 2 else bytes(3000 + number)


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def packed(request, tmp_path):
    """An archive with 40 files, and what they hold."""
    files = {f"top/{'ab'[i % 2]}/file_{i:02d}.bin": content(i) for i in range(40)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w", request.param) as archive:
        archive.mkdir("top") if hasattr(archive, "mkdir") else None
        for name in sorted(files, reverse=True):
            archive.writestr(name, files[name])
        archive.writestr("__MACOSX/top/a/._file_00.bin", b"junk")
        archive.writestr("top/a/.DS_Store", b"junk")
    return tmp_path / "x.zip", files


def test_members_are_files(packed):
    path, files = packed
    archive = Archive(path)
    assert len(archive) == 42 and list(archive.names) == sorted(archive.names)
    for name, data in files.items():
        member = archive.member(name)
        assert member.read_bytes() == data and member.stat().st_size == len(data)
        assert str(member) == f"{path}/{name}" and member.name == name.rsplit("/", 1)[1]
        assert member.parent == (path / name).parent and (member.stem, member.suffix) == (member.name[:-4], ".bin")
        assert member.is_file() and member.exists()
    below = archive.below("top/a")
    assert list(below) == sorted(name[6:] for name in files if name.startswith("top/a/"))
    assert archive.below("top/") == archive.below("top") and not archive.below("to")
    for name in ("top/a/file_99.bin", "top", "", "zzz"):
        with pytest.raises(FileNotFoundError, match=r"x\.zip holds no"):
            archive.member(name)


def test_members_compare_by_their_place(packed):
    one, other = (Archive(packed[0]).member("top/a/file_00.bin") for _ in range(2))
    assert one == other and len({one, other}) == 1 and one != Archive(packed[0]).member("top/b/file_01.bin")
    assert one < Archive(packed[0]).member("top/b/file_01.bin") and one != str(one)


def test_the_directory_is_read_once(packed, monkeypatch):
    reads = []
    original = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a: reads.append(a) or original(*a))
    found = [opened(packed[0]).below("top/a") for _ in range(3)]
    archive = found[0]["file_00.bin"].archive
    assert len(reads) == 1 and all(member.archive is archive for one in found for member in one.values())
    assert archive.table.nbytes < 100 * len(archive)
    with original(packed[0], "a") as file:
        file.writestr("top/a/new.bin", b"1")
    assert "new.bin" in opened(packed[0]).below("top/a") and len(reads) == 2


def _sum(members, conn):
    conn.send([hash(member.read_bytes()) for _ in range(20) for member in members])


def test_forked_workers_and_threads_do_not_disturb_each_other(packed):
    path, files = packed
    members = [Archive(path).member(name) for name in files]
    expected = [hash(data) for _ in range(20) for data in files.values()]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]
    workers = [context.Process(target=_sum, args=(members, there)) for _, there in pipes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads around
        for worker in workers:
            worker.start()
    results = []
    threads = [threading.Thread(target=lambda: results.append([hash(m.read_bytes()) for m in members])) for _ in "123"]
    for thread in threads:
        thread.start()
    assert all(here.recv() == expected for here, _ in pipes)
    for one in (*threads, *workers):
        one.join()
    assert results == [expected[: len(files)]] * 3


def test_reading_moves_no_position(packed):
    """Forked workers share it with their parent."""
    member = Archive(packed[0]).member("top/b/file_01.bin")
    place = os.lseek(member.archive._file, 0, os.SEEK_CUR)
    assert member.read_bytes() and member.ends(10, 10)
    assert os.lseek(member.archive._file, 0, os.SEEK_CUR) == place


def test_pickled_members_open_their_own_file(packed):
    path, files = packed
    archive = Archive(path)
    members = [archive.member(name) for name in files]
    text = pickle.dumps(members)
    assert len(text) < 100 * len(members), "the directory travels as a file, not in every pickle"
    copies = pickle.loads(text)
    assert len({id(copy.archive) for copy in copies}) == 1 and copies[0].archive._file != archive._file
    assert [copy.read_bytes() for copy in copies] == list(files.values())
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="has changed since"):
        pickle.loads(text)


def test_long_extra_fields_and_a_prefix(tmp_path):
    info = zipfile.ZipInfo("a/x.bin")
    info.extra = struct.pack("<HH", 0x7777, 600) + bytes(600)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, b"content")
    assert Archive(tmp_path / "x.zip").member("a/x.bin").read_bytes() == b"content"
    (tmp_path / "y.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "x.zip").read_bytes())
    assert Archive(tmp_path / "y.zip").member("a/x.bin").read_bytes() == b"content"


def test_of_a_name_that_is_there_twice_the_last_counts(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        warnings.simplefilter("ignore")
        for text in ("first", "second"):
            file.writestr("a/b.txt", text)
    archive = Archive(tmp_path / "x.zip")
    assert archive.member("a/b.txt").read_bytes() == archive.below("a")["b.txt"].read_bytes() == b"second"


def test_archives_larger_than_4_gb(tmp_path):
    """The offsets of zip64, in a file that is a hole but for its ends."""
    path = tmp_path / "x.zip"
    with open(path, "wb") as file:
        file.seek((1 << 32) + 17)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.bin", b"far away")
    assert path.stat().st_size > 1 << 32
    member = Archive(path).member("a.bin")
    assert member.archive.table.offset[0] > 1 << 32 and member.read_bytes() == b"far away"


def test_broken_archives_are_named(packed, tmp_path):
    path, files = packed
    whole = path.read_bytes()
    cut = tmp_path / "cut.zip"
    for data in (b"", b"not a zip", whole[: len(whole) // 2], whole[:-30]):
        cut.write_bytes(data)
        with pytest.raises(DataError, match=r"cut\.zip: no zip archive, or its end is missing.*Download it again"):
            Archive(cut)
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "nowhere.zip")
    name = "top/b/file_01.bin"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset
    for at, word in ((start + 300, "damaged|unpacked"), (start, "not where the directory")):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        cut.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"cut\.zip/{name}: .*({word}).*Download"):
            Archive(cut).member(name).read_bytes()
        assert Archive(cut).member("top/b/file_03.bin").read_bytes() == files["top/b/file_03.bin"]


def test_encrypted_and_other_methods_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/x.bin", b"content" * 100)
    with pytest.raises(DataError, match=r"x\.zip/a/x\.bin: packed by method 12; only.* Unpack"):
        Archive(tmp_path / "x.zip").member("a/x.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("a/x.bin", b"content")
    data = bytearray((tmp_path / "y.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"y\.zip/a/x\.bin: encrypted\. Unpack"):
        Archive(tmp_path / "y.zip").member("a/x.bin").read_bytes()


@pytest.fixture
def pairs(tmp_path):
    """The same four samples as files and in an archive, deflated."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            for kind, array in (
                ("img", RNG.integers(0, 256, (200, 150, 3), dtype=np.uint8)),
                ("lab", RNG.integers(0, 3, (200, 150), dtype=np.uint8)),
            ):
                path = tmp_path / f"{kind}/s{i}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(array).save(path)
                archive.write(path, f"{kind}/s{i}.png")
    return tmp_path


def of(root, archives):
    images, masks = (list(files_below(root, kind, archives).values()) for kind in ("img", "lab"))
    return FileDataset("Test", [path.stem for path in images], images, masks)


def test_a_dataset_reads_both_alike(pairs, tmp_path_factory):
    plain = of(pairs, ("data.zip",))
    assert not sources(plain.image_paths) and "archives" not in plain.fingerprint(), "plain folders win"
    alone = tmp_path_factory.mktemp("alone")
    (pairs / "data.zip").rename(alone / "data.zip")
    zipped = of(alone, ("missing.zip", "data.zip"))
    assert all(isinstance(path, Member) for path in (*zipped.image_paths, *zipped.mask_paths))
    for i in range(4):
        for a, b in zip(plain.read(i), zipped.read(i), strict=True):
            np.testing.assert_array_equal(a, b)
        assert probe(plain.image_paths[i]) == probe(zipped.image_paths[i])
    check(zipped, 3)
    assert fingerprint(zipped) == fingerprint(plain)
    assert zipped.fingerprint() == {**plain.fingerprint(), "archives": ["data.zip"]}
    assert pickle.loads(pickle.dumps(zipped)).read(3)[0].shape == (200, 150, 3)
    assert files_below(alone, "other", ("data.zip",)) is None


def test_faults_in_archives_are_reported_with_their_names(tmp_path):
    names = ["good", "cut", "values", "text"]
    image, labels = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    for kind, array in (("img", image), ("lab", labels)):
        (tmp_path / kind).mkdir()
        for name in names:
            Image.fromarray(array).save(tmp_path / f"{kind}/{name}.png")
    Image.fromarray(labels + 9).save(tmp_path / "lab/values.png")
    (tmp_path / "img/text.png").write_text("hello")
    whole = (tmp_path / "img/cut.png").read_bytes()
    (tmp_path / "img/cut.png").write_bytes(whole[:-20])
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for kind in ("img", "lab"):
            for name in names:
                archive.write(tmp_path / f"{kind}/{name}.png", f"d/{kind}/{name}.png")
    images, masks = (list(opened(tmp_path / "data.zip").below(f"d/{kind}").values()) for kind in ("img", "lab"))
    with pytest.raises(DataError) as error:
        check(FileDataset("Test", sorted(names), images, masks), 3)
    for words in ("3 faults", "truncated", "img/cut.png", "not an image", "img/text.png", "values 9", "lab/values.png"):
        assert words in str(error.value)
    assert f"{tmp_path}/data.zip/d" in str(error.value)
    with pytest.raises(DataError, match=r"data\.zip/d/img/cut\.png: truncated"):
        read_image(images[0])
    with pytest.raises(DataError, match=r"data\.zip/d/img/text\.png: not an image"):
        read_mask(images[2])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_headers_of_large_members(tmp_path, suffix):
    """Looking at a header must not cost reading the file."""
    image = RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "long" * 14000
    options = {"a": {}, "b": {"exif": exif}, "c": {}} if suffix == "jpg" else {"a": {}, "b": {}, "c": {}}
    for name, more in options.items():
        Image.fromarray(image).save(tmp_path / f"{name}.{suffix}", **more)
    cut = tmp_path / f"c.{suffix}"
    cut.write_bytes(cut.read_bytes()[:-100])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
            for name in options:
                archive.write(tmp_path / f"{name}.{suffix}", f"d/{name}.{suffix}")
        members = Archive(tmp_path / "x.zip").below("d")
        for name, member in members.items():
            assert member.stat().st_size > 1 << 16
            expected = probe(tmp_path / name)
            if method == zipfile.ZIP_DEFLATED and name.startswith("c"):
                assert not expected.complete and probe(member).complete
                with pytest.raises(DataError, match="truncated"):
                    read_image(member)
            else:
                assert probe(member) == expected
        with mock.patch("os.pread", wraps=os.pread) as reads:
            probe(members[f"a.{suffix}"])
        assert 0 < sum(call.args[1] for call in reads.call_args_list) < 70_000


def test_unlabelled_samples(tmp_path):
    image = RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    data = FileDataset("Test", ["a", "b"], paths, None, lut=np.zeros(256))
    data.check(3)
    found, mask = data.read(1)
    assert np.array_equal(found, image) and mask.shape == (20, 31) and mask.dtype == np.uint8 and (mask == 255).all()
    assert np.array_equal(data.values(0), mask) and data.fingerprint()["samples"] == 2
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"empty file.*\n.*b\.png"):
        data.check(3)
    with pytest.raises(ValueError, match="2 ids, 2 images and 1 masks"):
        FileDataset("Test", ["a", "b"], paths, paths[:1])
