"""Images/s of the data doctor on VOC-like files against decoding alone: `seglight bench doctor`.

Files as in `seglight bench data`. Both sides use the same number of processes. Mark: at least 0.7 of decoding.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from seglight.benchmarks.data_voc import voc_like
from seglight.benchmarks.timing import paired
from seglight.data.decode import read_image, read_mask
from seglight.data.scenes import CLASSES
from seglight.doctor.case import Case, Part
from seglight.doctor.crew import each
from seglight.doctor.examination import Examination


def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="seglight bench doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = voc_like(Path(folder) / "voc", options.images)

        def doctor() -> None:
            case = Case("Folder", folder, CLASSES, own=True, parts=[Part("train", data)])
            Examination(case, options.workers).run()

        def decode() -> None:
            list(each(_decode, data, len(data), options.workers))

        rows = paired(
            {"doctor": doctor, "decode only": decode},
            baseline="doctor",
            rounds=options.rounds,
            marks={"decode only": ">= 0.70: every pixel decoded, and nothing looked at"},
            title=f"{options.images} images and masks, {options.workers or 'all'} processes",
        )
    print("images/s: " + ", ".join(f"{row.name} {options.images / row.ms * 1000:.0f}" for row in rows))
    return 0


def _decode(data: Any, index: int) -> None:
    read_image(data.image_paths[index])
    read_mask(data.mask_paths[index])
