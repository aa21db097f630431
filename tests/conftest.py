"""No test touches the network or the user's home, and every test has the same number of threads."""

import os
import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _isolated(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    changed = {
        "HOME": home,
        "XDG_CACHE_HOME": home / "cache",
        "TORCH_HOME": home / "torch",
        "HF_HOME": home / "hf",
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": home / "mpl",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": home / "wandb",
        "WANDB_CACHE_DIR": home / "wandb",
        "WANDB_DATA_DIR": home / "wandb",
        "WANDB_DIR": home / "wandb",
        "NETRC": home / "netrc",
        "NO_PROXY": "127.0.0.1",  # the servers of our own
        "no_proxy": "127.0.0.1",
        "COLUMNS": "80",
    }
    before = dict(os.environ)
    os.environ.update({key: str(value) for key, value in changed.items()})
    jobs = [name for name in os.environ if name.startswith("SLURM_")]  # Lightning starts no ranks in a job of SLURM
    for name in ("WANDB_API_KEY", "SEGLIGHT_TRACEBACK", "SEGLIGHT_CACHE", *jobs):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def real_data():
    """The folder of small real datasets, named by SEGLIGHT_DATA."""
    path = os.environ.get("SEGLIGHT_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("SEGLIGHT_DATA does not name a folder with the small real datasets")
    return Path(path)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A small dataset in each format, written once: their folders by name. For reading; `copy` is for breaking."""
    from clinic import write_originals

    return write_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def copy(originals, tmp_path):
    """A dataset of one's own to break."""
    return lambda name: Path(shutil.copytree(originals[name], tmp_path / name))
