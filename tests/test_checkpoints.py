import resource
import signal
import subprocess
import sys

import pytest
import torch

from seglight.checkpoints import AtomicCheckpointIO


def test_round_trip_leaves_no_part(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    assert torch.load(path, weights_only=True)["x"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A file size limit fails the write in the middle, as a full disk does."""
    path, saver = tmp_path / "last.ckpt", AtomicCheckpointIO()
    saver.save_checkpoint({"x": torch.ones(10)}, path)
    before = path.read_bytes()
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt is untouched.*--resume"):
            saver.save_checkpoint({"x": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_signal)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_kill_while_writing_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    code = (
        "import os, sys, torch\nfrom seglight.checkpoints import AtomicCheckpointIO as A\n"
        "A().save_checkpoint({'x': 1}, sys.argv[1])\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"  # dies when the new bytes are written but not yet in place
        "A().save_checkpoint({'x': 2}, sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=200)
    assert done.returncode == -9
    assert torch.load(path, weights_only=True) == {"x": 1}
