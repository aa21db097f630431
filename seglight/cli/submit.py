"""`seglight submit`: the archive that a benchmark's server takes, checked against the dataset's list."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from seglight.cli.verb import Parser, console, guarded, take, writable
from seglight.submit import BENCHMARKS

DESCRIPTION = """Write the archive that a benchmark's server takes, and check it file by file before it is there:
  voc         PASCAL VOC: palette PNGs in a tgz
  cityscapes  pixel level (semantic model) or instance level (instance model): zip
  coco        instance segmentation, detections_test-dev2017_ALG_results.zip
  context     PASCAL-Context, which has no server: label PNGs and classes.txt in a zip

  seglight submit voc RUN/checkpoints/best.ckpt --data.root VOCdevkit --out results.tgz
  seglight submit voc RUN/checkpoints/best.ckpt --split val --out rehearsal.tgz     prints the score, too
  seglight submit voc --check results.tgz --data.root VOCdevkit                     only looks at an archive

Further options are those of the dataset and the test-time ones of the model: --data.root DIR, --model.test_flip true.
One process does it all. Nothing is overwritten."""


def main(argv: list[str]) -> int:
    """Run `seglight submit ...`; returns the exit status of `seglight.cli.verb.guarded`."""

    def call() -> int:
        words, found = take(argv)
        return run(_parser().parse_args(words), found["--data."], found["--model."])

    return guarded("seglight submit", call)


def _parser() -> Parser:
    parser = Parser(prog="seglight submit", description=DESCRIPTION)
    parser.add_argument(
        "benchmark",
        metavar="BENCHMARK",
        choices=tuple(BENCHMARKS),
        help="whose server, see above",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="a trained model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the archive to make: .tgz for voc, else .zip")
    parser.add_argument("--check", type=Path, metavar="ARCHIVE", help="only look at an archive")
    parser.add_argument("--split", choices=("test", "val"), help="default: test; context: val")
    parser.add_argument("--comp", choices=("comp5", "comp6"), help="of voc: trained on VOC alone, or not (comp6)")
    parser.add_argument("--task", choices=("semantic", "instance"), help="of cityscapes --check (semantic)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the best one there is")
    return parser


def run(options: argparse.Namespace, data_options: list[str], model_options: list[str]) -> int:
    """Make or check; returns the exit status."""
    from seglight import submit

    kind = getattr(submit, BENCHMARKS[options.benchmark])
    split = options.split or next(iter(kind.splits))
    if split not in kind.splits:
        raise ValueError(f"{kind.title} has no {split} split to submit; give --split {' or '.join(kind.splits)}.")
    if options.comp and options.benchmark != "voc":
        raise ValueError(f"--comp is of voc; {options.benchmark} has no such thing.")
    submission = kind(split, options.comp) if options.comp else kind(split)
    if options.check is not None:
        if options.checkpoint or options.out or model_options:
            raise ValueError("--check looks at an archive that is there: leave out the checkpoint, --out and --model.")
        return _check(submission, options, data_options)
    if options.checkpoint is None or options.out is None:
        raise ValueError("give a checkpoint and --out FILE, or --check ARCHIVE.")
    if options.task:
        raise ValueError("--task is of --check; otherwise the checkpoint says which it is.")
    return _make(submission, options, data_options, model_options)


def _make(submission: Any, options: argparse.Namespace, data_options: list[str], model_options: list[str]) -> int:
    from seglight.checkpoints import read
    from seglight.cli.explain_metric import load_model, refuse_run_folder
    from seglight.predict import overrides
    from seglight.submit import make

    writable(options.out.parent)
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists. Nothing is overwritten: choose another --out.")
    refuse_run_folder(options.checkpoint)
    task = read(options.checkpoint).get("seglight", {}).get("task", "semantic")
    data = _data(submission, task, options.checkpoint, data_options)
    model = load_model(options.checkpoint, options.device, overrides(model_options))
    verdict = make(submission, model, data, options.out)
    _report(submission, verdict, data, options.out)
    print(f"Wrote {options.out}, {options.out.stat().st_size / 1e6:.1f} MB.")
    if submission.split == next(iter(submission.splits)):
        print(f"Next: {submission.upload}.")
    else:
        print("This is a rehearsal, the server wants --split test.")
    return 0


def _check(submission: Any, options: argparse.Namespace, data_options: list[str]) -> int:
    from seglight.submit import check

    task = options.task or next(iter(submission.datasets))
    data = _data(submission, task, None, data_options)
    return _report(submission, check(submission, options.check, data), data, options.check)


def _data(submission: Any, task: str, checkpoint: Path | None, options: list[str]) -> Any:
    """The datamodule of the benchmark: as the checkpoint has it, if it was trained on that one."""
    from seglight.checkpoints import of_run, read
    from seglight.cli.datamodule import resolve

    if task not in submission.datasets:
        raise ValueError(
            f"{submission.title} takes a model for {' or '.join(submission.datasets)} segmentation, and this one is "
            f"for {task} segmentation."
        )
    name = submission.datasets[task]
    source: str | Path = name
    if checkpoint is not None:
        import yaml

        stored = of_run(read(checkpoint)).get("config")
        tree = yaml.safe_load(stored) if stored else {}
        if str((tree.get("data") or {}).get("class_path", "")).rpartition(".")[2] == name:
            source = checkpoint
    return resolve(source, ["--data.test_split", submission.splits[submission.split], *options])


def _report(submission: Any, verdict: Any, data: Any, archive: Path) -> int:
    from seglight.submit.run import findings

    images = len(data.split("test"))
    if verdict.faults:
        print(f"{archive}: {len(verdict.faults)} faults, {submission.title} {submission.split}, {images:,} images:")
        print("\n".join(findings(verdict)))
        return 1
    if verdict.score is not None:
        console().print(verdict.score)
    files = f"{verdict.files:,} file{'s' if verdict.files != 1 else ''}"
    print(f"{archive}: good. {submission.title} {submission.split}, {images:,} images, {files} looked at.")
    return 0
