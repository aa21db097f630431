"""Downloads from a server that misbehaves."""

import hashlib
import json
import os
import random
import resource
import signal
from collections import namedtuple

import pytest
from web import Page, Web

from seglight.prepare import download as module
from seglight.prepare.download import Download, download, fault
from seglight.prepare.words import PrepareError, shown, size

DATA = random.Random(0).randbytes(3_000_000)
MD5 = "md5:" + hashlib.md5(DATA).hexdigest()
SIZE = len(DATA)
OTHER = random.Random(1).randbytes(len(DATA))


@pytest.fixture
def web():
    server = Web()
    server.pages["/a.tar"] = Page(DATA)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.001)
    monkeypatch.setattr(module, "LONGEST", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 10.0)


def get(tmp_path, web, *paths, digest=MD5, size=SIZE, said=None, bar=None):
    urls = [path if "://" in path else web.url + path for path in paths or ("/a.tar",)]
    said = [] if said is None else said
    job = Download(tmp_path / "a.tar", urls, size, digest)
    return job, (lambda: download(job, said.append, bar or (lambda *_: None)))


def whole(tmp_path):
    """Whether the file is there, right, and alone."""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
    return (tmp_path / "a.tar").read_bytes() == DATA


def ranges(web):
    return [request["range"] for request in web.log]


# ---------------------------------------------------------------- what a download goes through


def test_whole(tmp_path, web):
    seen = []
    _, go = get(tmp_path, web, bar=lambda *state: seen.append(state))
    assert go() == tmp_path / "a.tar" and whole(tmp_path)
    assert seen[0] == ("downloading", 0, len(DATA)) and ("downloading", len(DATA), len(DATA)) in seen
    assert seen[-1] == ("checking", len(DATA), len(DATA))
    with pytest.raises(FileExistsError, match="Nothing is overwritten"):
        go()


@pytest.mark.parametrize("kind", ["stall", "cut"])
def test_a_stall_or_a_cut_continues_where_it_stopped(tmp_path, web, kind, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.6 if kind == "stall" else 10.0)
    web.pages["/a.tar"].faults = [f"{kind} 1000000", f"{kind} 500000"]
    said = []
    get(tmp_path, web, said=said)[1]()
    assert whole(tmp_path)
    assert ranges(web) == [None, "bytes=1000000-", "bytes=1500000-"]
    assert web.log[1]["if_range"] == '"one"'
    assert ("nothing came for 1 s" if kind == "stall" else "ended after 1,000,000 of 3,000,000") in said[0]
    assert "from 1.0 MB" in said[0]


def test_a_trickle_counts_as_a_stall(tmp_path, web, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.6)
    web.pages["/a.tar"].faults = ["slow"]
    said = []
    get(tmp_path, web, said=said)[1]()
    assert whole(tmp_path) and "less than 1024 bytes came" in said[0]
    assert 0 < int(ranges(web)[1].removeprefix("bytes=").removesuffix("-")) < 1024


def test_passing_errors_are_waited_out_and_lasting_ones_are_not(tmp_path, web):
    web.pages["/a.tar"].faults = ["status 503 Retry-After=0", "status 500", "status 429"]
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and len(web.log) == 4


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_missing_file_is_not_asked_for_twice(tmp_path, web, status):
    web.pages["/a.tar"].faults = [f"status {status}"] * 9
    with pytest.raises(PrepareError, match=f"answers {status}") as error:
        get(tmp_path, web)[1]()
    assert len(web.log) == 1 and ("wants a login" in str(error.value)) == (status in (401, 403))
    assert list(tmp_path.iterdir()) == []


def test_attempts_end(tmp_path, web):
    web.pages["/a.tar"].faults = ["status 503"] * 99
    with pytest.raises(PrepareError, match=r"answers 503 .*given up after 6 attempts"):
        get(tmp_path, web)[1]()
    assert len(web.log) == 6


def test_progress_gives_new_attempts(tmp_path, web, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS", 200_000)
    web.pages["/a.tar"].faults = ["cut 200000"] * 12
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and len(web.log) == 13


def test_retry_after_is_obeyed_within_reason(tmp_path, web, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    monkeypatch.setattr(module, "LONGEST", 30.0)
    web.pages["/a.tar"].faults = ["status 503 Retry-After=20", "status 503 Retry-After=86400", "status 503"]
    get(tmp_path, web)[1]()
    assert slept == [20.0, 60.0, module.WAIT * 4]


def test_several_mirrors_in_order(tmp_path, web):
    web.pages["/c.tar"] = Page(DATA)
    said = []
    get(tmp_path, web, "/none.tar", "http://127.0.0.1:1/a.tar", "/c.tar", "/a.tar", said=said)[1]()
    assert whole(tmp_path) and [request["path"] for request in web.log] == ["/none.tar", "/c.tar"]
    assert "404" in said[0] and "next: http://127.0.0.1:1/a.tar" in said[0]


def test_the_next_mirror_continues_what_the_first_began(tmp_path, web):
    web.pages["/a.tar"].faults = ["cut 1200000", "status 404"]
    web.pages["/b.tar"] = Page(DATA, etag='"its own"')
    get(tmp_path, web, "/a.tar", "/b.tar")[1]()
    assert whole(tmp_path)
    assert web.log[-1] == {"path": "/b.tar", "range": "bytes=1200000-", "if_range": None, "auth": None}


def test_without_checksum_two_servers_are_not_mixed(tmp_path, web):
    web.pages["/a.tar"].faults = ["cut 1200000", "status 404"]
    web.pages["/b.tar"] = Page(DATA)
    get(tmp_path, web, "/a.tar", "/b.tar", digest=None)[1]()
    assert whole(tmp_path) and web.log[-1]["range"] is None


# ---------------------------------------------------------------- wrong content


def test_a_corrupt_file_is_thrown_away_and_the_next_mirror_asked(tmp_path, web):
    web.pages["/a.tar"].faults = ["corrupt"]
    web.pages["/b.tar"] = Page(DATA)
    said = []
    get(tmp_path, web, "/a.tar", "/b.tar", said=said)[1]()
    assert (
        whole(tmp_path) and "instead of" in said[0] and web.log[-1] == {**web.log[-1], "path": "/b.tar", "range": None}
    )


def test_corrupt_everywhere_leaves_nothing(tmp_path, web):
    web.pages["/a.tar"].faults = ["corrupt"] * 9
    with pytest.raises(PrepareError, match=f"has md5 [0-9a-f]+ instead of {MD5[4:]}"):
        get(tmp_path, web)[1]()
    assert list(tmp_path.iterdir()) == []


def test_a_rotten_part_is_started_anew_once(tmp_path, web):
    (tmp_path / "a.tar.part").write_bytes(OTHER[:1000])
    said = []
    get(tmp_path, web, said=said)[1]()
    assert whole(tmp_path) and ranges(web) == ["bytes=1000-", None] and "starting it anew" in said[-1]


def test_a_file_that_changes_between_attempts_is_not_mixed(tmp_path, web):
    page = web.pages["/a.tar"] = Page(OTHER, faults=["cut 1000000"])
    said = []

    def change(text):
        said.append(text)
        page.data, page.etag = DATA, '"two"'

    download(Download(tmp_path / "a.tar", [web.url + "/a.tar"]), change)
    assert whole(tmp_path)
    assert web.log[1]["range"] == "bytes=1000000-" and web.log[1]["if_range"] == '"one"'
    assert "from its beginning" in said[1]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"etag": '"one"'}, {"etag": '"two"'}),
        ({"etag": 'W/"one"'}, {"etag": 'W/"two"'}),
        ({"etag": None, "date": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"date": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({}, {"data": DATA[:-1]}),
    ],
)
def test_a_server_that_ignores_if_range_is_compared_by_us(tmp_path, web, first, then):
    page = web.pages["/a.tar"] = Page(OTHER, if_range=False, faults=["cut 1000000"], **first)
    new = {"data": DATA, **then}
    job = Download(tmp_path / "a.tar", [web.url + "/a.tar"])
    download(job, lambda text: [setattr(page, name, value) for name, value in new.items()])
    assert job.path.read_bytes() == new["data"]
    assert [one is None for one in ranges(web)] == [True, False, True]


def test_the_date_serves_where_there_is_no_etag(tmp_path, web):
    date = "Mon, 01 Jan 2024 00:00:00 GMT"
    web.pages["/a.tar"] = Page(DATA, etag=None, date=date, faults=["cut 1000000"])
    get(tmp_path, web, digest=None)[1]()
    assert whole(tmp_path) and web.log[1]["if_range"] == date and ranges(web)[1] == "bytes=1000000-"


def test_without_any_mark_or_checksum_nothing_is_continued(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA, etag=None, faults=["cut 1000000"])
    get(tmp_path, web, digest=None)[1]()
    assert whole(tmp_path) and ranges(web) == [None, None]


def test_a_server_without_ranges_starts_again(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA, ranges=False, faults=["cut 1000000"])
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and ranges(web) == [None, "bytes=1000000-"]


def test_another_part_than_asked_for_is_refused(tmp_path, web):
    web.pages["/a.tar"].faults = ["cut 1000000", "shift"]
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and ranges(web) == [None, "bytes=1000000-", None]


def test_too_much_is_cut_off_early(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA + OTHER, length=False)
    seen = []
    with pytest.raises(PrepareError, match="sends more than the 3,000,000 bytes"):
        get(tmp_path, web, bar=lambda verb, done, total: seen.append(done))[1]()
    assert SIZE < max(seen) <= SIZE + module.BLOCK
    assert list(tmp_path.iterdir()) == []


def test_another_length_is_refused_before_it_is_fetched(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA[:-5], faults=["stall 0"])
    with pytest.raises(PrepareError, match="has another file: 2,999,995 bytes instead of 3,000,000"):
        get(tmp_path, web)[1]()
    assert list(tmp_path.iterdir()) == []


def test_no_length_at_all(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA, length=False)
    get(tmp_path, web, size=None)[1]()
    assert whole(tmp_path)


def test_cut_without_a_length_is_seen_by_the_checksum(tmp_path, web):
    web.pages["/a.tar"] = Page(DATA, length=False, faults=["cut 1000"])
    with pytest.raises(PrepareError, match="has md5"):
        get(tmp_path, web, size=None)[1]()
    assert not (tmp_path / "a.tar").exists()


def test_a_web_page_is_no_archive(tmp_path, web):
    web.pages["/a.tar"].faults = ["html"]
    with pytest.raises(PrepareError, match="a web page instead of the file"):
        get(tmp_path, web, digest=None, size=None)[1]()


def test_what_was_whole_but_not_named_is_not_fetched_again(tmp_path, web):
    (tmp_path / "a.tar.part").write_bytes(DATA)
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and web.log == []
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.part")
    note = {"url": f"{web.url}/a.tar", "version": '"one"', "total": SIZE}
    (tmp_path / "a.tar.part.json").write_text(json.dumps(note))
    get(tmp_path, web, digest=None, size=None)[1]()
    assert whole(tmp_path) and web.log == []


@pytest.mark.parametrize("note", ["", "no json", "[]", '{"url": 5}'])
def test_a_broken_note_is_no_note(tmp_path, web, note):
    (tmp_path / "a.tar.part").write_bytes(OTHER[:1000])
    (tmp_path / "a.tar.part.json").write_text(note)
    get(tmp_path, web, digest=None)[1]()
    assert whole(tmp_path)


def test_a_part_beyond_the_end_is_thrown_away(tmp_path, web):
    (tmp_path / "a.tar.part").write_bytes(DATA + b"x")
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and ranges(web) == [None]
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.part")
    with open(tmp_path / "a.tar.part", "ab") as file:
        file.write(b"x")
    get(tmp_path, web, size=None)[1]()
    assert whole(tmp_path) and ranges(web)[1:] == ["bytes=3000001-", None]


# ---------------------------------------------------------------- addresses


def test_redirections(tmp_path, web):
    web.pages["/moved.tar"] = Page(b"", faults=["redirect /a.tar", "redirect /a.tar"])
    web.pages["/a.tar"].faults = ["cut 1000000"]
    get(tmp_path, web, "/moved.tar")[1]()
    assert whole(tmp_path)
    assert [(r["path"], r["range"]) for r in web.log][2:] == [
        ("/moved.tar", "bytes=1000000-"),
        ("/a.tar", "bytes=1000000-"),
    ]


def test_redirections_in_a_circle_or_to_a_file_end(tmp_path, web):
    web.pages["/moved.tar"] = Page(b"", faults=["redirect /moved.tar"] * 99)
    with pytest.raises(PrepareError, match="answers 302"):
        get(tmp_path, web, "/moved.tar")[1]()
    assert len(web.log) < 15
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        web.pages["/moved.tar"].faults = [f"redirect {place}"] * 9
        with pytest.raises(PrepareError):
            get(tmp_path, web, "/moved.tar")[1]()
    for url in ("file:///etc/passwd", "ftp://x/y", "nothing"):
        with pytest.raises(PrepareError, match="http"):
            download(Download(tmp_path / "a.tar", [url]))


def test_secrets_are_sent_to_their_host_and_shown_to_nobody(tmp_path, web):
    other = Web()
    other.pages["/a.tar"] = Page(DATA, faults=["cut 1000000", "status 503"])
    web.pages["/moved.tar"] = Page(b"", faults=[f"redirect {other.url}/a.tar?key=k3y"] * 3)
    host = web.url.removeprefix("http://")
    said = []
    get(tmp_path, web, f"http://me:s3cret%21@{host}/none.tar?key=k3y", f"http://me:s3cret%21@{host}/moved.tar?key=k3y",
        said=said)[1]()  # fmt: skip
    assert whole(tmp_path)
    assert [request["auth"] for request in web.log] == ["Basic bWU6czNjcmV0IQ=="] * 4
    assert [request["auth"] for request in other.log] == [None] * 3
    assert said and not any("s3cret" in text or "k3y" in text or "me:" in text for text in said)
    web.pages["/a.tar"].faults = ["cut 1000"] * 9
    (tmp_path / "a.tar").unlink()
    with pytest.raises(PrepareError) as error:
        get(tmp_path, web, f"http://me:s3cret@{host}/a.tar?key=k3y")[1]()
    assert "s3cret" not in str(error.value) and "k3y" not in str(error.value)
    assert "s3cret" not in (tmp_path / "a.tar.part.json").read_text() and "k3y" not in shown("http://a/b?k3y")
    other.close()


# ---------------------------------------------------------------- disk and interruption


def test_no_room(tmp_path, web, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, module.RESERVE + len(DATA) - 1))
    with pytest.raises(PrepareError, match=r"needs 3.0 MB in .*, but 70 MB are free there. Make room"):
        get(tmp_path, web)[1]()
    assert not (tmp_path / "a.tar").exists()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, module.RESERVE + len(DATA)))
    get(tmp_path, web)[1]()
    assert whole(tmp_path)


def test_a_disk_that_fills_up_leaves_a_part_that_continues(tmp_path, web):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        try:
            get(tmp_path, web)[1]()
        except PrepareError as error:
            os._exit(7 if "could not be written" in str(error) and "is kept" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "a.tar.part").stat().st_size == 1_500_000
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and ranges(web)[-1] == "bytes=1500000-"


def test_an_interruption_leaves_a_part_that_continues(tmp_path, web):
    def interrupt(verb, done, total):
        if done > 1_000_000:
            raise KeyboardInterrupt

    job, go = get(tmp_path, web, bar=interrupt)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert 1_000_000 < job.done < 3_000_000 and not job.path.exists()
    get(tmp_path, web)[1]()
    assert whole(tmp_path) and ranges(web) == [None, f"bytes={ranges(web)[1][6:-1]}-"] and ranges(web)[1] != "bytes=0-"


def test_nothing_is_named_before_it_is_checked(tmp_path, web):
    seen = []
    job, go = get(tmp_path, web, bar=lambda verb, *_: seen.append((verb, job.path.exists())))
    go()
    assert {verb for verb, _ in seen} == {"downloading", "checking"} and not any(there for _, there in seen)


def test_fault(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert fault(path, len(DATA), MD5) is None
    assert fault(path, None, "sha1:" + hashlib.sha1(DATA).hexdigest()) is None
    assert fault(path, None, "sha256:" + hashlib.sha256(DATA).hexdigest()) is None
    assert fault(path, 5, MD5) == "has 3,000,000 bytes instead of 5"
    assert fault(path, None, "md5:00").endswith("instead of 00")


def test_words():
    assert [size(n) for n in (0, 999, 1500, 31e6, 2e9, 19.3e9)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "31 MB",
        "2.0 GB",
        "19 GB",
    ]
