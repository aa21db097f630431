"""What the verbs of the command line say to wrong words, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seglight.cli import main
from seglight.cli.verb import guarded, take, writable
from seglight.data.findings import DataError


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data sampel x", "seglight data: VERB is 'sampel'. Did you mean sample? Choose from prepare, check"),
        ("data", "seglight data: missing: VERB. See seglight data --help."),
        ("data sample", "seglight data sample: missing: OUT, --format. See seglight data sample --help."),
        ("data sample x --format vocc", "--format is 'vocc'. Did you mean voc? Choose from voc, coco"),
        ("data sample x --format voc --sizes 3", "there is no option --sizes. Did you mean --size? See"),
        ("data sample x --format voc --siz 64 64", "there is no option --siz. Did you mean --size?"),
        ("data sample x --format voc --data.crop 3", "there is no option --data.crop. See seglight data sample"),
        ("data stats x y", "seglight data stats: 'y' is one word too many"),
        ("data stats x --data.crop", "seglight data stats: --data.crop has no value"),
        ("data stats x --data.crop --split val", "--data.crop has no value"),
        ("data show x --split vall", "seglight data show: --split is 'vall'. Did you mean val?"),
        ("submit vok", "seglight submit: BENCHMARK is 'vok'. Did you mean voc?"),
        ("submit voc a b", "seglight submit: 'b' is one word too many"),
        ("submit voc --comb comp5", "there is no option --comb. Did you mean --comp?"),
        ("explain-metric x --sied 3", "there is no option --sied. Did you mean --side?"),
        ("data prepare --list vok", "seglight data prepare: there is no dataset 'vok'. Did you mean voc? There are"),
        ("data stats nosuch", "no file or folder nosuch, and no dataset class of that name. Known: ADE20K"),
        ("data stats file.x", "seglight data stats: file.x is a file that names no dataset. Give an experiment"),
        ("data stats Folder", "seglight data stats: Folder needs root: give --data.root ..."),
        ("data stats Shapes --data.crop abc", "'abc' is no crop for Shapes; it must be int | tuple[int, int] | None."),
        ("data show Shapes --panel 0", "seglight data show: panel is 0; it must be 16 to 4096 pixels."),
        ("data stats Shapes --out file.x", "file.x is not a folder, so nothing can be written into file.x."),
        ("data show Shapes --out file.x/x.png", "file.x is not a folder"),
        ("data cache Shapes --out file.x", "file.x is not a folder"),
        ("data check Shapes --html file.x/x.html", "file.x is not a folder"),
        ("data check Shapes --json file.x/x.json", "file.x is not a folder"),
        ("data sample file.x/x --format voc", "file.x is not a folder"),
        ("explain-metric x --out file.x/x.json", "file.x is not a folder"),
        ("submit voc x --out file.x/x.tgz", "file.x is not a folder"),
        ("explain-metric run", "run is a run folder. Give one of its checkpoints: run/checkpoints/best.ckpt."),
        ("submit voc run --out x.tgz", "run is a run folder. Give one of its checkpoints: run/checkpoints/best.ckpt."),
        ("explain-metric file.x", "file.x is not a readable checkpoint (it ends too early)."),
        ("explain-metric x --device gpu", "seglight explain-metric: --device gpu is not on this machine. Use one of "),
        (
            "explain-metric x --device cuda:99",
            "seglight explain-metric: --device cuda:99 is not on this machine. Use one of ",
        ),
        ("explain-metric x --batch two", "--batch: invalid int value: 'two'. See seglight explain-metric --help."),
    ],
)
def test_one_line_says_what_is_wrong_and_what_was_meant(line, said, capsys, monkeypatch, tmp_path):
    """The same words for every verb, status 2, and nothing is begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.x").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file.x", "run"}


def test_options_of_dataset_and_model_may_stand_anywhere():
    """Also before the source, whose place their values must not take."""
    line = "--data.root here VOC --model.test_flip=true --split val --data.crop 3"
    left, found = take(line.split())
    assert left == ["VOC", "--split", "val"]
    assert found == {"--data.": ["--data.root", "here", "--data.crop", "3"], "--model.": ["--model.test_flip=true"]}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("no."), 2, "x: no.\n"),
        (DataError("bad file."), 1, "x: bad file.\n"),
        (FileNotFoundError("There is no a."), 1, "x: There is no a.\n"),
        (NotADirectoryError(20, "Not a directory", "a/b"), 1, "x: a/b: Not a directory.\n"),
        (KeyboardInterrupt(), 130, "\nx: stopped.\n"),
    ],
)
def test_each_kind_of_end_has_its_status(error, status, said, capsys, monkeypatch):
    """1 failed, 2 wrong usage, 130 stopped by hand; no traceback but on request."""

    def call():
        raise error

    monkeypatch.delenv("SEGLIGHT_TRACEBACK", raising=False)
    assert guarded("x", call) == status
    assert capsys.readouterr().err == said


def test_a_traceback_on_request(monkeypatch):
    """SEGLIGHT_TRACEBACK as in `fit`."""
    monkeypatch.setenv("SEGLIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no"):
        guarded("x", lambda: int("no"))


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"? 3"), ("utf-8", "→ 3".encode())])
def test_signs_that_the_terminal_cannot_show(encoding, shown):
    """Are replaced: an arrow on an old terminal is no reason to stop."""
    call = r"lambda rest: print('\u2192 3', '\udce4') or 0"
    code = f"from seglight.cli import main, models; models.main = {call}; raise SystemExit(main(['models']))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_pipe_that_is_closed_ends_it_quietly():
    """`seglight data ... | head` prints no error."""
    code = "from seglight.cli.verb import guarded; raise SystemExit(guarded('x', lambda: print('line') or 0))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    """Is refused before the work, not after it; the superuser may write everywhere, so the question is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match="may not be written to"):
        writable(tmp_path / "new/deep")
    writable(tmp_path.parent / "other")
