"""`seglight models`: every architecture with its size, its cost, its checks, and published beside measured numbers."""

from __future__ import annotations

import argparse
import difflib
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MARKS = "<!-- models: written by `make models` -->", "<!-- /models -->"
HEAD = ("architecture", "parameters", "GFLOPs", "crop", "checks", "published, %", "measured, %")


def main(argv: list[str]) -> int:
    """Print the table, or put it into a Markdown file."""
    parser = argparse.ArgumentParser(prog="seglight models", description=__doc__)
    parser.add_argument("names", nargs="*", help="families or architectures; all without")
    parser.add_argument(
        "--fidelity", help="junit file of `pytest -m fidelity --junitxml FILE`: fills the column of checks"
    )
    parser.add_argument("--readme", help="Markdown file whose table between the two comments is replaced")
    options = parser.parse_args(argv)
    known = {name for family, entry in published().items() for name in (family, *entry["variants"])}
    if unknown := [name for name in options.names if name not in known]:
        near = {name: difflib.get_close_matches(name, known, 3, 0.3) for name in unknown}
        hints = "; ".join(f"{name!r} (nearest: {', '.join(found) or 'none'})" for name, found in near.items())
        print(f"seglight: there is no architecture {hints}.", file=sys.stderr)
        return 2
    checks = passed(options.fidelity) if options.fidelity else None
    table = list(rows(published(), options.names, checks))
    if options.readme:
        path = Path(options.readme)
        path.write_text(replaced(path.read_text(), markdown(table)))
    else:
        _show(table, list(results(published(), options.names)) if options.names else [])
    return 0


def published() -> dict[str, Any]:
    """The content of published.yaml: per family its paper, its test files, its variants and the papers' results."""
    return yaml.safe_load((Path(__file__).parents[1] / "published.yaml").read_text())


def cost(model: str, num_classes: int, crop: int, init_args: dict[str, Any] | None = None) -> tuple[int, float | None]:
    """Parameters, and 1e9 floating point operations of a forward pass in training, computed without weights or pixels.

    A multiplication and its addition count as two operations; only those of convolutions and matrix products count.
    None for detectors, whose operations depend on what they find.

    Args:
        model: class name in `seglight.models`.
        num_classes: K.
        crop: side of the square input in pixels.
        init_args: further arguments of the class.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from seglight import models

    with torch.device("meta"):
        built = getattr(models, model)(num_classes=num_classes, **(init_args or {}))
        parameters = sum(p.numel() for p in built.network.parameters())
        if built.task == "instance":
            return parameters, None
        image = built.normalize(torch.zeros(2, 3, crop, crop))  # two: batch norm after a global pooling needs them
        with FlopCounterMode(display=False) as counter:
            built.network.train()(image)
    return parameters, counter.get_total_flops() / 2 / 1e9


def passed(junit: str) -> Counter[str]:
    """Fidelity tests that passed, per test file, from pytest's junit report."""
    cases = ET.parse(junit).getroot().iter("testcase")
    good = (case for case in cases if not any(case.find(kind) is not None for kind in ("failure", "error", "skipped")))
    return Counter(case.get("classname", "").split(".")[-1].removeprefix("test_") for case in good)


def rows(families: dict[str, Any], names: list[str], checks: Counter[str] | None = None) -> Iterator[tuple[str, ...]]:
    """One line of text per architecture, in the order of `HEAD`; of all families and variants, or of `names`."""
    for family, entry in families.items():
        for variant, how in entry["variants"].items():
            if names and not {family, variant} & set(names):
                continue
            parameters, gflops = cost(**how)
            count = "" if checks is None else str(sum(checks[name] for name in entry["tests"]))
            mine = [result for result in entry["results"] if result["variant"] == variant]
            numbers = "; ".join(f"{_value(result)} {result['dataset']} {result['split']}" for result in mine)
            runs = "; ".join(
                f"{_value(run)} {run['dataset']} {run['split']}" for run in entry.get("measured", {}).get(variant, [])
            )
            operations = "–" if gflops is None else f"{gflops:,.1f}"
            yield (
                variant, f"{parameters:,}", operations, f"{how['crop']}²", count, numbers or "none",
                runs or "not run yet",
            )  # fmt: skip


def results(families: dict[str, Any], names: list[str]) -> Iterator[str]:
    """What is known of each published number and of each run of ours, as text."""
    for family, entry in families.items():
        for result in entry["results"]:
            if {family, result["variant"]} & set(names):
                yield (
                    f"{result['variant']}: {_value(result)} {result['metric']} on {result['dataset']} {result['split']}"
                    f"{' (a row of the review)' if result.get('review') else ''}\n"
                    f"    protocol {result['protocol']}\n    with public data {result['reachable']}\n"
                    f"    experiments/{result['experiment']}"
                )
        for variant, runs in entry.get("measured", {}).items():
            if {family, variant} & set(names):
                for run in runs:
                    yield (
                        f"{variant}: measured {_value(run)} {run['metric']} on {run['dataset']} {run['split']}, "
                        f"{run['steps']} steps, seed {run['seed']}, {run['hardware']}\n"
                        f"    experiments/{run['experiment']}"
                    )


def _value(number: dict[str, Any]) -> str:
    """With its metric, unless that is the usual one."""
    return f"{number['value']}" + (f" {number['metric']}" if number["metric"] != "mIoU" else "")


def markdown(table: list[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    lines = [HEAD, ("---", "---:", "---:", "---:", "---:", "---", "---"), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replaced(text: str, table: str) -> str:
    """`text` with `table` between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = text.find(MARKS[0]), text.find(MARKS[1])
    if begin < 0 or end < begin:
        raise ValueError(f"The file has no place for the table; put the lines {MARKS[0]} and {MARKS[1]} where it goes.")
    return text[: begin + len(MARKS[0])] + "\n" + table + "\n" + text[end:]


def _show(table: list[tuple[str, ...]], details: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(caption="GFLOPs of a training crop's forward pass; a multiplication and its addition are two.")
    keep = [i for i in range(len(HEAD)) if any(line[i] for line in table)]
    for i in keep:
        shown.add_column(HEAD[i], justify="right" if 0 < i < 5 else "left", no_wrap=i < 5)
    for line in table:
        shown.add_row(*(line[i] for i in keep))
    console = Console()
    console.print(shown)
    for text in details:
        console.print(text, markup=False, highlight=False)
    if not details:
        console.print("seglight models NAME tells the protocol of each published number and the experiment for it.")
