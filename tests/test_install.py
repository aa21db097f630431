import configparser
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def requirements(text):
    return {line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")}


def test_conda_environment_has_the_same_dependencies():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    ours = requirements(config["options"]["install_requires"]) | requirements(config["options.extras_require"]["test"])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert set(next(item["pip"] for item in conda if isinstance(item, dict))) == ours


def test_compromised_lightning_is_excluded():
    for name in ("setup.cfg", "environment.yml"):
        assert re.search(r"pytorch-lightning\S*!=2\.6\.2,!=2\.6\.3", (ROOT / name).read_text())


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom seglight.cli import main\n"
        "for verb in (['--help'], ['--version'], ['data', '--help'], ['bench', '--help']):\n"
        "    try: main(verb)\n    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pytorch_lightning', 'timm', 'wandb', 'cv2', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert run("-c", code).returncode == 0


def test_help_answers_at_once():
    start = time.perf_counter()
    done = run("-m", "seglight", "--help")
    assert done.returncode == 0 and "seglight VERB" in done.stdout
    assert time.perf_counter() - start < 5  # about 0.1 s on an idle machine; importing Lightning alone takes 6 s


def test_unknown_verb_names_the_nearest():
    done = run("-m", "seglight", "fitt")
    assert done.returncode == 2 and "Did you mean 'fit'" in done.stderr
