"""`seglight data prepare`, from archives on a server or on the disk to folders that the DataModules read."""

import hashlib
import os
import re
import signal
import threading
import time
from collections import namedtuple
from dataclasses import replace

import pytest
from kits import COUNTS, FILES, make_kit, own, packed, there, voc_archive, zipped
from web import Page, Web

from seglight.cli.data import main
from seglight.prepare import RECIPES, Options, PrepareError, prepare
from seglight.prepare import download as downloads
from seglight.prepare.folder import OWN, Record, alone
from seglight.prepare.recipe import Archive, Count
from seglight.prepare.state import survey


@pytest.fixture
def kit(tmp_path):
    return make_kit(tmp_path)


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0.001)
    monkeypatch.setattr(downloads, "LONGEST", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 1.0)


def one(recipe, **changes):
    """The recipe with its first archive changed."""
    return replace(recipe, archives=(replace(recipe.archives[0], **changes), *recipe.archives[1:]))


# ---------------------------------------------------------------- from nothing to complete


def test_from_a_server(tmp_path, kit, web):
    data, recipe = kit
    web.pages["/mirror/kit.tar"] = Page(data, faults=["stall 700", "cut 300", "corrupt"])
    root, said = tmp_path / "out/deep", []
    states = prepare(recipe, root, Options(mirrors=[web.url + "/mirror/"]), said.append)
    assert there(root) == FILES and [state.found for state in states] == [[2, 2]] and states[0].complete
    assert (root / "kit.tar").read_bytes() == data and own(root) == ["lock", "record.json"]
    assert [request["range"] for request in web.log[:3]] == [None, "bytes=700-", "bytes=1000-"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    asked = len(web.log)
    assert prepare(recipe, root, Options())[0].complete
    assert len(web.log) == asked and before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_from_archives_that_are_there(tmp_path, kit):
    data, recipe = kit
    root, source = tmp_path / "root", tmp_path / "downloads"
    for folder in (root, source):
        folder.mkdir()
        (folder / "kit.tar").write_bytes(data)
    prepare(recipe, root, Options())
    prepare(recipe, tmp_path / "other", Options(source=source))
    assert there(root) == there(tmp_path / "other") == FILES
    assert not (tmp_path / "other/kit.tar").exists() and (source / "kit.tar").read_bytes() == data


@pytest.mark.parametrize("base", ["kit", ""])
def test_what_was_unpacked_by_hand_is_recognised_and_nothing_is_written(tmp_path, kit, base):
    for name, data in FILES.items():
        path = tmp_path / "root" / base / name.removeprefix("kit/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert prepare(kit[1], tmp_path / "root", Options())[0].complete
    assert not (tmp_path / "root" / OWN).exists()


@pytest.mark.parametrize("name", ["kit/img/a.jpg", "kit/deep/er/c.png"], ids=["counted", "not counted"])
def test_a_half_unpacked_folder_is_completed_and_what_differs_is_kept_and_named(tmp_path, kit, name):
    data, recipe = kit
    root = tmp_path / "root"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(b"cut off")
    (root / "kit.tar").write_bytes(data)
    for _ in range(2):
        with pytest.raises(PrepareError, match=rf"{name} \(7 bytes, {len(FILES[name])} in it\).*They were kept"):
            prepare(recipe, root, Options())
        assert there(root) == {**FILES, name: b"cut off"}
    (root / name).rename(tmp_path / "away")
    assert prepare(recipe, root, Options())[0].complete and there(root) == FILES


def test_a_file_that_vanished_is_put_back(tmp_path, kit):
    data, recipe = kit
    root = tmp_path / "root"
    root.mkdir()
    (root / "kit.tar").write_bytes(data)
    prepare(recipe, root, Options())
    (root / "kit/img/b.jpg").unlink()
    assert not survey(recipe, root, Options())[0].complete
    prepare(recipe, root, Options())
    assert there(root) == FILES


def test_archives_are_removed_when_asked_and_only_then(tmp_path, kit):
    data, recipe = kit
    root = tmp_path / "root"
    root.mkdir()
    for verify in (False, True):
        (root / "kit.tar").write_bytes(data)
        prepare(recipe, root, Options(verify=verify))
        assert (root / "kit.tar").exists()
        prepare(recipe, root, Options(verify=verify, remove=True))
        assert (root / "kit.tar").exists() != verify
    assert prepare(recipe, root, Options())[0].complete


# ---------------------------------------------------------------- wrong content


def test_an_archive_of_another_content_is_neither_used_nor_touched(tmp_path, kit):
    data, recipe = kit
    root = tmp_path / "root"
    root.mkdir()
    for wrong, words in (
        (data[:-9], "rename it to kit.tar.part"),
        (data[:-1] + b"x", "has md5"),
        (data + b"x", "bytes"),
    ):
        (root / "kit.tar").write_bytes(wrong)
        with pytest.raises(PrepareError, match=words):
            prepare(recipe, root, Options())
        assert (root / "kit.tar").read_bytes() == wrong and there(root) == {}


def test_a_part_that_a_person_renamed_is_continued(tmp_path, kit, web):
    data, recipe = kit
    web.pages["/kit.tar"] = Page(data)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/kit.tar.part").write_bytes(data[:1000])
    prepare(recipe, tmp_path / "root", Options(mirrors=[web.url]))
    assert there(tmp_path / "root") == FILES and web.log[0]["range"] == "bytes=1000-"


def test_more_is_as_wrong_as_less_unless_it_may_be_more():
    assert [Count("", "", 2).fits(number) for number in (1, 2, 3)] == [False, True, False]
    assert [Count("", "", 2, more=True).fits(number) for number in (1, 2, 3)] == [False, True, True]


def test_wrong_numbers_are_named_all_at_once(tmp_path, kit):
    data, recipe = kit
    recipe = one(recipe, counts=(Count("images", "img/*.jpg", 5), COUNTS[1], Count("masks", "m/*.png", 1_234)))
    (tmp_path / "kit.tar").write_bytes(data)
    with pytest.raises(PrepareError) as error:
        prepare(recipe, tmp_path / "root", Options(source=tmp_path))
    assert "images: 2 instead of 5" in str(error.value) and "masks: 0 instead of 1,234" in str(error.value)
    assert "lines" not in str(error.value)


def test_without_verification(tmp_path, kit, web):
    _, recipe = kit
    other = packed(tmp_path / "other", {"kit/img/x.jpg": b"1", "kit/list.txt": b"x\n"})
    web.pages["/kit.tar"] = Page(other)
    root, mirrors = tmp_path / "root", [web.url]
    with pytest.raises(PrepareError, match=r"(?s)has md5.*--no-verify"):
        prepare(recipe, root, Options(mirrors=mirrors))
    for _ in range(2):
        assert prepare(recipe, root, Options(mirrors=mirrors, verify=False))[0].found == [1, 1]
    assert len(web.log) == 2
    assert Record(root)["kit.tar"]["verified"] is False
    with pytest.raises(PrepareError, match="as the official one has"):
        prepare(recipe, root, Options())
    (root / "kit/img/x.jpg").unlink()
    assert prepare(recipe, root, Options(verify=False))[0].found == [1, 1]


# ---------------------------------------------------------------- what a person has to get


def test_all_that_is_missing_is_listed_at_once(tmp_path, kit, web):
    _, recipe = kit
    recipe = replace(
        recipe,
        archives=(
            replace(recipe.archives[0], urls=()),
            Archive("second.zip", COUNTS, page="http://page", about=2e9),
            Archive("third.zip", COUNTS, page="http://elsewhere", about=3e6),
            Archive("free.zip", COUNTS, (web.url + "/free.zip",)),
            Archive("extra.zip", COUNTS, page="http://elsewhere", part="extra"),
        ),
        extras={"extra": "more"},
    )
    with pytest.raises(PrepareError) as error:
        prepare(recipe, tmp_path / "root", Options())
    text = str(error.value)
    for words in (
        "kit.tar",
        "second.zip  (about 2.0 GB)",
        "third.zip  (about 3.0 MB)",
        f"into {tmp_path / 'root'}",
        "--from",
    ):
        assert words in text
    assert text.count("http://page") == text.count("http://elsewhere") == 1
    assert "extra.zip" not in text and "free.zip" not in text and web.log == [] and not (tmp_path / "root").exists()
    with pytest.raises(PrepareError, match=r"extra\.zip"):
        prepare(recipe, tmp_path / "root", Options(parts=["extra"]))


def test_options_that_cannot_be(tmp_path, kit):
    with pytest.raises(ValueError, match=r"kit has no part more\. Its parts: none"):
        prepare(kit[1], tmp_path / "root", Options(parts=["more"]))
    with pytest.raises(ValueError, match="is no folder"):
        prepare(kit[1], tmp_path / "root", Options(source=tmp_path / "none"))


def test_a_zip_that_is_read_as_it_is(tmp_path, kit):
    files = {"top/" + name.removeprefix("kit/"): data for name, data in FILES.items()}
    zipped(tmp_path / "kit.zip", files)
    recipe = one(kit[1], name="kit.zip", zipped="top", bases=("top", ""), urls=(), size=None, digest=None)
    states = prepare(recipe, tmp_path, Options())
    assert states[0].complete and states[0].found == [2, 2] and sorted(os.listdir(tmp_path)) == ["kit.zip"]
    prepare(recipe, tmp_path, Options(unpack=True))
    assert there(tmp_path / "top") == {name.removeprefix("top/"): data for name, data in files.items()}
    prepare(recipe, tmp_path, Options(remove=True))
    assert not (tmp_path / "kit.zip").exists() and prepare(recipe, tmp_path, Options())[0].complete
    prepare(recipe, tmp_path / "other", Options(source=zipped(tmp_path / "kit.zip", files).parent))
    assert (tmp_path / "other/top/img/a.jpg").is_file() and not (tmp_path / "other/kit.zip").exists()
    data = (tmp_path / "kit.zip").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/kit.zip").write_bytes(data[:-30])
    with pytest.raises(PrepareError, match="its end is missing"):
        prepare(recipe, tmp_path / "cut", Options())
    prepare(recipe, tmp_path / "top/..", Options(remove=True))


def test_a_zip_that_is_the_only_copy_is_not_removed(tmp_path, kit):
    zipped(tmp_path / "kit.zip", {"top/" + name.removeprefix("kit/"): data for name, data in FILES.items()})
    recipe = one(kit[1], name="kit.zip", zipped="top", bases=("top", ""), urls=(), size=None, digest=None)
    said = []
    prepare(recipe, tmp_path, Options(remove=True), said.append)
    assert (tmp_path / "kit.zip").exists() and "read as it is" in said[-1]


def test_a_zip_with_a_checksum_is_compared_once(tmp_path, kit, monkeypatch):
    data = zipped(
        tmp_path / "kit.zip", {"top/" + name.removeprefix("kit/"): d for name, d in FILES.items()}
    ).read_bytes()
    changes = {"name": "kit.zip", "zipped": "top", "bases": ("top", ""), "size": None}
    good = one(kit[1], **changes, digest="sha1:" + hashlib.sha1(data).hexdigest())
    with pytest.raises(PrepareError, match="has sha1"):
        prepare(one(kit[1], **changes, digest="sha1:00"), tmp_path, Options())
    assert prepare(one(kit[1], **changes, digest="sha1:00"), tmp_path, Options(verify=False))[0].complete
    read = []
    for _ in range(2):
        prepare(good, tmp_path, Options(), bar=lambda verb, *_: read.append(verb))
    assert read == ["checking"]


def test_a_plain_file_is_copied_and_checked(tmp_path, kit):
    (tmp_path / "from").mkdir()
    (tmp_path / "from/a.json").write_text("[]")
    archive = Archive(
        "a.json",
        (Count("file", "sub/a.json", 1),),
        plain=True,
        into="sub",
        digest="md5:" + hashlib.md5(b"[]").hexdigest(),
    )
    recipe = replace(kit[1], archives=(archive,))
    prepare(recipe, tmp_path / "root", Options(source=tmp_path / "from"))
    prepare(recipe, tmp_path / "root", Options(remove=True))
    assert there(tmp_path / "root") == {"sub/a.json": b"[]"}
    strange = one(recipe, digest="md5:00")
    prepare(strange, tmp_path / "unverified", Options(source=tmp_path / "from", verify=False))
    with pytest.raises(PrepareError, match="has md5"):
        prepare(strange, tmp_path / "unverified", Options())
    (tmp_path / "root/sub/a.json").write_text("[1]")
    with pytest.raises(PrepareError, match="has md5"):
        prepare(recipe, tmp_path / "root", Options())


# ---------------------------------------------------------------- disk, other processes, interruptions


def test_no_room_is_said_before_anything_is_fetched(tmp_path, kit, web, monkeypatch):
    data, recipe = kit
    web.pages["/kit.tar"] = Page(data)
    usage = namedtuple("usage", "total used free")
    free = [downloads.RESERVE + 2 * len(data) - 1]
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    with pytest.raises(
        PrepareError, match=r"This needs 20 kB in .* are free there\. Make room, or choose another disk"
    ):
        prepare(recipe, tmp_path / "root", Options(mirrors=[web.url]))
    assert web.log == []
    free[0] += 1
    prepare(recipe, tmp_path / "root", Options(mirrors=[web.url]))


def test_two_at_once(tmp_path, kit, web):
    data, recipe = kit
    web.pages["/kit.tar"] = Page(data, faults=["stall 100"])
    begun, refused, done = threading.Event(), threading.Event(), []

    def say(_):
        begun.set()
        refused.wait()

    first = threading.Thread(target=lambda: done.append(prepare(recipe, tmp_path, Options(mirrors=[web.url]), say)))
    first.start()
    begun.wait()
    try:
        with pytest.raises(PrepareError, match=rf"by another process \(process {os.getpid()}\)"):
            prepare(recipe, tmp_path, Options(mirrors=[web.url]))
    finally:
        refused.set()
        first.join()
    assert there(tmp_path) == FILES and done


def test_the_lock_of_a_killed_process_is_free(tmp_path, kit):
    child = os.fork()
    if not child:
        with alone(tmp_path, print):
            (tmp_path / "ready").touch()
            time.sleep(60)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(PrepareError, match=rf"process {child}"), alone(tmp_path, print):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with alone(tmp_path, print):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path, kit):
    tmp_path.chmod(0o500)
    with pytest.raises(PrepareError, match="cannot be written to"):
        prepare(kit[1], tmp_path, Options())


# ---------------------------------------------------------------- the command


def test_the_acceptance_run(tmp_path, web, capsys, monkeypatch):
    from seglight.data import VOC

    files = voc_archive(tmp_path / "a.tar")
    web.pages["/VOCtrainval_11-May-2012.tar"] = Page((tmp_path / "a.tar").read_bytes())
    monkeypatch.setenv("SEGLIGHT_DATA", str(tmp_path / "data"))
    root = tmp_path / "data/voc2012"
    assert main(["prepare", "voc", "--mirror", web.url]) == 1
    assert "has another file" in capsys.readouterr().err and there(root) == {}
    for second in (False, True):
        began = time.process_time()
        assert main(["prepare", "voc", "--mirror", web.url, "--no-verify"]) == 0
        assert not second or time.process_time() - began < 0.5
        text = capsys.readouterr().out
        assert re.search(r"lines of train.txt +3 +1,464 +not compared", text) and "not verified" in text
        assert "Use it:   --data VOC\n" in text
    assert there(root) == files
    assert len(VOC().dataset("train")) == len(VOC(root=str(root)).dataset("train")) == 3
    assert main(["prepare", "voc"]) == 1
    assert "as the official one has" in capsys.readouterr().err


def test_the_official_numbers_are_said_when_they_are_there(tmp_path, capsys, kit, monkeypatch):
    data, recipe = kit
    monkeypatch.setitem(RECIPES, "kit", recipe)
    (tmp_path / "kit.tar").write_bytes(data)
    assert main(["prepare", "kit", "--root", str(tmp_path / "my data"), "--from", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"images +2 +2 +ok", text) and "Complete: the numbers are the official ones." in text
    assert f"--data.root '{tmp_path}/my data'" in text and "--remove-archives" not in text
    (tmp_path / "kit.tar").rename(tmp_path / "my data/kit.tar")
    assert main(["prepare", "kit", "--root", str(tmp_path / "my data")]) == 0
    assert "Archives are kept (10 kB); --remove-archives removes them." in capsys.readouterr().out
    assert main(["prepare", "kit", "--root", str(tmp_path / "my data"), "--remove-archives"]) == 0
    assert "Archives are kept" not in capsys.readouterr().out and not (tmp_path / "my data/kit.tar").exists()


def test_wrong_usage(capsys, tmp_path):
    for arguments, words in (
        (["vov"], "Did you mean voc"),
        ([], "which dataset?"),
        (["voc", "--with", "stuff", "--root", str(tmp_path / "r")], "voc has no part stuff. Its parts: test"),
        (["voc", "--from", str(tmp_path / "none"), "--root", str(tmp_path / "r")], "is no folder"),
    ):
        assert main(["prepare", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_list(capsys, tmp_path, monkeypatch, kit):
    monkeypatch.setenv("SEGLIGHT_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    data, recipe = kit
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit/kit.tar").write_bytes(data)
    prepare(recipe, tmp_path / "kit", Options())
    monkeypatch.setitem(RECIPES, "kit", recipe)
    (tmp_path / "sbd").mkdir()
    (tmp_path / "sbd/benchmark.tgz.part").write_bytes(bytes(5_000_000))
    (tmp_path / "ade20k").mkdir()
    (tmp_path / "ade20k/ADEChallengeData2016.zip").write_bytes(b"")
    assert main(["prepare", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    for name, end in (
        ("kit", "yes        complete"),
        ("sbd", "5.0 MB downloaded"),
        ("ade20k", "archive here"),
        ("voc", "-"),
    ):
        assert lines[name].rstrip().endswith(end), lines[name]
    assert re.search(r"12 GB +yes +none", lines["cityscapes"]) and re.search(r"1.3 GB +no +1 of 2", lines["context"])
    assert not (tmp_path / "voc2012").exists()


def test_secrets_of_a_mirror_are_not_shown(tmp_path, web, capsys, kit, monkeypatch):
    data, recipe = kit
    monkeypatch.setitem(RECIPES, "kit", recipe)
    host = web.url.removeprefix("http://")
    arguments = ["prepare", "kit", "--root", str(tmp_path / "a"), "--mirror", f"http://me:s3cret@{host}/x?key=k3y"]
    assert main(arguments) == 1
    web.pages["/x/kit.tar"] = Page(data)
    assert main(arguments) == 0
    text = "".join(capsys.readouterr()) + "".join(path.read_text() for path in (tmp_path / "a" / OWN).iterdir())
    assert web.log[-1]["auth"] and "s3cret" not in text and "k3y" not in text
