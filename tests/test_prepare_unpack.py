"""Archives with traps, and folders that are killed half-way."""

import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
from kits import content, tar, zipped

from seglight.prepare import download
from seglight.prepare import unpack as module
from seglight.prepare.unpack import merge, unpack
from seglight.prepare.words import PrepareError

FILES = {
    "kit/a.txt": b"a" * 700,
    "kit/deep/b.bin": bytes(range(256)) * 40,
    "kit/deep/empty": b"",
    "list.txt": b"x\ny\n",
}


def targz(path, files=FILES, entries=()):
    return tar(path, files, entries, "w:gz")


KINDS = [tar, targz, zipped]


def refused(tmp_path, archive, *words):
    """The message of the refusal, after a look that nothing is outside the folder."""
    with pytest.raises(PrepareError) as error:
        unpack(archive, tmp_path / "box/in/out")
    outside = [path for path in tmp_path.rglob("*") if "out" not in path.parts and path.is_file()]
    assert outside == [archive]
    for word in (str(archive), *words):
        assert word in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_content(tmp_path, kind):
    archive = kind(tmp_path / "named wrongly", FILES)
    seen = []
    assert unpack(archive, tmp_path / "out", bar=lambda *state: seen.append(state)) == 4
    assert content(tmp_path / "out") == FILES
    assert seen[-1][0] == "unpacking" and seen[-1][1] == seen[-1][2] > 0
    with pytest.raises(FileExistsError):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_it(tmp_path, kind):
    files = {
        "Repo-1/CamVid/t/a.png": b"1",
        "Repo-1/CamVid/l.txt": b"2",
        "Repo-1/x": b"3",
        "y": b"4",
        "Z-1/CamVid/n": b"5",
    }
    assert unpack(kind(tmp_path / "a", files), tmp_path / "out", take="Repo-*/CamVid") == 2
    assert content(tmp_path / "out") == {"t/a.png": b"1", "l.txt": b"2"}
    with pytest.raises(PrepareError, match="holds no file below nothing"):
        unpack(kind(tmp_path / "b", files), tmp_path / "out2", take="nothing/here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["../evil", "kit/../../evil", "/etc/evil", "kit\\..\\..\\evil", "C:/evil", "C:evil/x", "..", "a/.."]
)
def test_names_that_lead_out_are_refused(tmp_path, kind, name):
    refused(tmp_path, kind(tmp_path / "a", {"good": b"1", name: b"2"}), repr(name))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mac_adds_is_left_out(tmp_path, kind):
    files = {"a": b"1", "__MACOSX/._a": b"2", "d/.DS_Store": b"3", "d/._b": b"4"}
    assert unpack(kind(tmp_path / "a", files), tmp_path / "out") == 1


@pytest.mark.parametrize("make", [tar, targz])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "good"])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, make, kind, target):
    info = tarfile.TarInfo("kit/link")
    info.type, info.linkname = kind, target
    refused(tmp_path, make(tmp_path / "a", {"good": b"1"}, [(info, b"")]), "'kit/link' is a link or a device")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused_before_anything_is_written(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good", b"1")
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path, tmp_path / "a.zip", "'link' is a link or a device")
    assert content(tmp_path / "box") == {}


def test_a_link_and_a_file_behind_it_write_nothing_outside(tmp_path):
    (tmp_path / "target").mkdir()
    link, inside = tarfile.TarInfo("kit"), tarfile.TarInfo("kit/evil")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "target")
    refused(tmp_path, tar(tmp_path / "a", {}, [(link, b""), (inside, b"2")]), "a link")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path, kind):
    if kind is zipped:
        archive = zipped(tmp_path / "a", {"kit/a": b"1"})
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("kit/a", b"2")
    else:
        archive = kind(tmp_path / "a", {"kit/a": b"1"}, [(tarfile.TarInfo("kit/a"), b"2")])
    refused(tmp_path, archive, "'kit/a' is there twice")


def test_an_encrypted_zip_is_refused(tmp_path):
    data = bytearray(zipped(tmp_path / "a", {"kit/a": b"1"}).read_bytes())
    for mark, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(mark) + flags] |= 1
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path, tmp_path / "a", "'kit/a' is encrypted")


@pytest.mark.parametrize("kind", [targz, zipped])
def test_a_bomb_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "SMALL", 1 << 20)
    archive = kind(tmp_path / "a", {f"kit/{i}": bytes(1 << 20) for i in range(8)})
    refused(tmp_path, archive, "a bomb")
    written = sum(map(len, content(tmp_path / "box").values()))
    assert written == 0 if kind is zipped else written <= 1 << 20


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    data = bytearray(zipped(tmp_path / "a", {"kit/a": bytes(1 << 20)}).read_bytes())
    for mark, place in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = data.index(mark) + place
        data[at : at + 4] = (100).to_bytes(4, "little")
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path, tmp_path / "a", "damaged")
    assert sum(map(len, content(tmp_path / "box").values())) <= 100


@pytest.mark.parametrize("kind", KINDS)
def test_no_room_to_unpack(tmp_path, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")
    archive = kind(tmp_path / "a", {f"kit/{i}": os.urandom(1 << 20) for i in range(4)})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, download.RESERVE + (1 << 20) - 1))
    with pytest.raises(PrepareError, match=r"Unpacking a needs .* are free there"):
        unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_anywhere_is_never_taken_for_whole(tmp_path, kind):
    whole = kind(tmp_path / "whole", {f"kit/{i}": os.urandom(600) for i in range(5)}).read_bytes()
    entry = 512 + 1024  # in a tar: header and content; behind them are zeros, of which one block is enough
    ends = (
        [*range(0, 5 * entry + 80, 211), *range(0, 5 * entry + 1, entry)] if kind is tar else range(0, len(whole), 97)
    )
    for number, end in enumerate(ends):
        archive = tmp_path / f"cut{number}"
        archive.write_bytes(whole[:end])
        with pytest.raises(PrepareError):
            unpack(archive, tmp_path / f"out{number}")


@pytest.mark.parametrize("kind", [targz, zipped])
def test_damage_is_seen_by_the_checksums(tmp_path, kind):
    files = {f"kit/{i}": os.urandom(3000) for i in range(5)}
    whole = kind(tmp_path / "whole", files).read_bytes()
    for number, place in enumerate(range(60, 15_000, 499)):
        data = bytearray(whole)
        data[place] ^= 0x10
        (archive := tmp_path / f"bad{number}").write_bytes(data)
        try:
            unpack(archive, tmp_path / f"out{number}")
        except PrepareError:
            continue
        assert content(tmp_path / f"out{number}") == files  # a byte that nothing depends on, such as a date in a zip


@pytest.mark.parametrize(
    "data", [b"", b"no archive at all" * 100, b"PK\3\4 no zip", b"\x1f\x8b no gzip", gzip.compress(b"x" * 9999)]
)
def test_no_archive(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    refused(tmp_path, tmp_path / "a", "is damaged or cut off")


def test_an_empty_archive(tmp_path):
    for kind in KINDS:
        with pytest.raises(PrepareError, match="holds no file"):
            unpack(kind(tmp_path / kind.__name__, {}), tmp_path / f"out {kind.__name__}")


def test_owners_and_permissions_stay_behind(tmp_path):
    info = tarfile.TarInfo("tool")
    info.mode = 0o6777
    unpack(tar(tmp_path / "a", {}, [(info, b"1")]), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out/tool").stat().st_mode) & 0o7111 == 0


def test_errors_of_zlib_are_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(zlib.error("bad")))
    with pytest.raises(PrepareError, match="damaged"):
        unpack(tar(tmp_path / "a", FILES), tmp_path / "out")


# ---------------------------------------------------------------- moving files to their places


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_merge_keeps_what_is_there(tmp_path):
    root = write(tmp_path / "root", {"kit/a.txt": b"mine", "kit/deep/b.bin": b"b" * 10240, "own": b"own"})
    differ = merge(write(tmp_path / "new", FILES), root)
    assert differ == {"kit/a.txt": 700}
    assert content(root) == {**FILES, "kit/a.txt": b"mine", "kit/deep/b.bin": b"b" * 10240, "own": b"own"}


def test_merge_follows_a_persons_own_links(tmp_path):
    (tmp_path / "other disk").mkdir()
    root = write(tmp_path / "root", {"own": b"own"})
    (root / "kit").symlink_to(tmp_path / "other disk")
    merge(write(tmp_path / "new", FILES), root)
    assert (tmp_path / "other disk/a.txt").read_bytes() == FILES["kit/a.txt"]
    (root / "list.txt").unlink()
    (root / "list.txt").symlink_to("nowhere")
    with pytest.raises(PrepareError, match=r"list\.txt is in the way"):
        merge(write(tmp_path / "again", FILES), root)


@pytest.mark.parametrize(("there", "what"), [({"kit": b""}, "a folder"), ({"list.txt/x": b""}, "a file")])
def test_merge_says_what_is_in_the_way(tmp_path, there, what):
    with pytest.raises(PrepareError, match=f"is in the way: the archive has {what} there"):
        merge(write(tmp_path / "new", FILES), write(tmp_path / "root", there))


def test_merge_to_another_disk(tmp_path, monkeypatch):
    real = os.rename

    def rename(old, new):
        if "new" in Path(old).parts:
            raise OSError(18, "Invalid cross-device link")
        real(old, new)

    monkeypatch.setattr(module.os, "rename", rename)
    merge(write(tmp_path / "new", FILES), tmp_path / "root")
    assert content(tmp_path / "root") == FILES
