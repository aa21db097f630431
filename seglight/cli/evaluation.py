"""What a command line that evaluates leaves out: the checkpoint of an experiment, or the experiment of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml

from seglight.checkpoints import STARTS, of_run, read
from seglight.cli.errors import LINKED
from seglight.cli.experiment_file import UsageError


def option(argv: list[str], *names: str) -> str | None:
    """The value of `--name value` or `--name=value`, before there is a parser."""
    for i, word in enumerate(argv):
        for name in names:
            if word == name and i + 1 < len(argv):
                return argv[i + 1]
            if word.startswith(f"{name}="):
                return word.split("=", 1)[1]
    return None


def _is_ensemble(argv: list[str]) -> bool:
    """Whether the model is made of other runs' checkpoints, so that it is complete without one of its own."""
    name, config = option(argv, "--model"), option(argv, "-c", "--config")
    if name is None and config is not None and Path(config).is_file():
        tree = yaml.safe_load(Path(config).read_text())
        name = tree.get("model") if isinstance(tree, dict) else None
        name = name.get("class_path") if isinstance(name, dict) else name
    return str(name).rpartition(".")[2] == "MaskEnsemble"


def complete(argv: list[str]) -> list[str]:
    """For evaluation, find the checkpoint of an experiment, or the experiment of a checkpoint.

    Raises:
        UsageError: neither leads to the other.
    """
    if argv[0] == "fit" or "--help" in argv or "-h" in argv or "--print_config" in argv:
        return argv
    config, checkpoint = option(argv, "-c", "--config"), option(argv, "--ckpt_path")
    if checkpoint is None:
        if _is_ensemble(argv):
            return argv
        if config is None:
            raise UsageError(f"{argv[0]} needs a trained model: give --ckpt_path RUN/checkpoints/best.ckpt.")
        run = Path(option(argv, "--out") or f"runs/{Path(config).resolve().parent.name}/{Path(config).stem}")
        best = run / "checkpoints" / "best.ckpt"
        if not best.is_file():
            raise UsageError(f"{argv[0]} needs a trained model, and {best} does not exist. Give --ckpt_path FILE.")
        return [*argv, "--ckpt_path", str(best)]
    content = read(checkpoint)
    if config is not None:
        return argv
    stored = of_run(content).get("config")
    if stored is None and option(argv, "--data") is None:
        raise UsageError(f"{checkpoint} was not made by `seglight fit` and stores no dataset. Give --data NAME.")
    tree = yaml.safe_load(stored) if stored else {}
    model = content.get("seglight") or {}
    tree = {key: tree[key] for key in ("seed_everything", "data", "model") if key in tree}
    tree.setdefault("model", {"class_path": model.get("class_path"), "init_args": model.get("init_args", {})})
    arguments = tree["model"].get("init_args") or {}
    for name in LINKED:
        arguments.pop(name, None)
    arguments.update({name: none for name, none in STARTS.items() if name in arguments})
    return [argv[0], "--config", yaml.safe_dump(tree), *argv[1:]]  # a text is as good as a file
