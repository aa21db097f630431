"""`seglight data prepare` killed at every moment, and started again."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from kits import FILES, make_kit, own, there, voc_archive
from web import Page, Web

from seglight.prepare import Options, PrepareError, prepare
from seglight.prepare.state import survey


@pytest.fixture
def kit(tmp_path):
    return make_kit(tmp_path)


COMMAND = [sys.executable, "-m", "seglight", "data", "prepare", "voc"]


def killed(number, recipe, root, options):
    """Prepare in a process that is killed at its `number`-th change of the disk; whether it was."""
    child = os.fork()
    if not child:
        left = [number]

        def watch(event, arguments):
            opened = (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            prepare(recipe, root, options)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(("verify", "begun"), [(True, True), (False, False)])
def test_killed_at_any_moment_of_unpacking(tmp_path, kit, verify, begun):
    data, recipe = kit
    source = tmp_path / "source"
    source.mkdir()
    (source / "kit.tar").write_bytes(data)
    options, number = Options(source=source, verify=verify), 1
    while True:
        root = tmp_path / f"root{number}"
        mine = {}
        if begun:  # a folder of the archive is there, so that its files are moved one by one
            mine = {"kit/img/own.txt": b"own", "kit/list.txt": FILES["kit/list.txt"]}
            for name, text in mine.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(text)
        if not killed(number, recipe, root, options):
            break
        if survey(recipe, root, replace(options, source=None))[0].complete:
            assert there(root) == {**FILES, **mine}
        prepare(recipe, root, options)
        assert there(root) == {**FILES, **mine}
        assert not {name for name in own(root) if name not in ("lock", "record.json")} - {"kit.tar.unpacking"}
        number += 1
    assert number > 20


def test_killed_while_differing_files_are_found(tmp_path, kit):
    data, recipe = kit
    (source := tmp_path / "source").mkdir()
    (source / "kit.tar").write_bytes(data)
    number = 1
    while True:
        root = tmp_path / f"root{number}"
        (root / "kit/img").mkdir(parents=True)
        (root / "kit/img/a.jpg").write_bytes(b"mine")
        dead = killed_or_refused(number, recipe, root, Options(source=source))
        with pytest.raises(PrepareError, match="Here before"):
            prepare(recipe, root, Options(source=source))
        assert there(root) == {**FILES, "kit/img/a.jpg": b"mine"}
        if not dead:
            break
        number += 1


def killed_or_refused(number, recipe, root, options):
    try:
        return killed(number, recipe, root, options)
    except AssertionError:  # it ended with an error, as it must
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_killed_while_downloading_continues(tmp_path, how):
    web = Web()
    files = voc_archive(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    web.pages["/VOCtrainval_11-May-2012.tar"] = Page(data, faults=["stall 20000"])
    root = tmp_path / "voc2012"
    command = [*COMMAND, "--root", root, "--mirror", web.url, "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let what they start with & ignore it
    )  # fmt: skip
    part = root / "VOCtrainval_11-May-2012.tar.part"
    while not (part.is_file() and part.stat().st_size == 20000):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    _, text = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        assert text.strip() == "Interrupted. What has been done is kept: the same command continues it."
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert web.log[1]["range"] == "bytes=20000-" and there(root) == files
    web.close()
