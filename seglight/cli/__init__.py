"""The `seglight` command: finds the verb and imports only what that verb needs."""

from __future__ import annotations

import difflib
import importlib
import io
import sys

HELP = """usage: seglight VERB [options]

Segmentation experiments on PyTorch Lightning.

  fit        train:     seglight fit -c experiments/shapes/unet.yaml [--KEY VALUE ...]
  test       score:     seglight test --ckpt_path RUN/checkpoints/best.ckpt
  validate   the same on the validation split
  predict    segment:   seglight predict --ckpt_path BEST.ckpt --source PICTURES --out OUT
  data       datasets:  seglight data prepare|check|stats|show|cache|sample ...
  explain-metric        the same predictions by every definition of mIoU in use
  submit     archive:   seglight submit voc|cityscapes|coco|context BEST.ckpt --out FILE
  bench      speed:     seglight bench data|doctor|metric|labels|crf|masks|detectors|networks|step
  models     every architecture: size, cost, published and measured numbers

  seglight VERB --help shows the options of a verb; fit ... --print_config the resolved experiment.
  seglight --version
"""

VERBS = ("fit", "validate", "test", "predict", "data", "explain-metric", "submit", "bench", "models")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb in ("-V", "--version"):
        from importlib import metadata

        from seglight import __version__

        print(f"seglight {__version__} (pytorch-lightning {metadata.version('pytorch-lightning')}, ", end="")
        print(f"torch {metadata.version('torch')}, Python {sys.version.split()[0]})")
        return 0
    for stream in (sys.stdout, sys.stderr):  # a name or a sign that the terminal cannot show must not stop anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream.encoding.lower().startswith("utf") else "replace")
    if verb in VERBS[:4]:
        from seglight.cli import experiment

        return experiment.main(argv)
    if verb in VERBS:
        return importlib.import_module(f"seglight.cli.{verb.replace('-', '_')}").main(rest)
    near = difflib.get_close_matches(verb, VERBS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    print(
        f"seglight: there is no verb {verb!r}.{hint} The verbs are {', '.join(VERBS)}; see seglight --help.",
        file=sys.stderr,
    )
    return 2
