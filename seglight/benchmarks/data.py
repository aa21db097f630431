"""Speed of data: `python -m seglight.benchmarks.data`, all parts or those after `--only`.

voc         files to batches against decoding alone and other libraries, one core
cityscapes  the same for 2048x1024 PNG and a crop of 768, with and without the cache
coco        the same for objects with outlines
loader      batches of 2 worker processes against those of 1
startup     a list of COCO's full size: time and memory of the first start and of later ones
"""

from __future__ import annotations

import argparse
import importlib

PARTS = ("voc", "cityscapes", "coco", "loader", "startup")


def main(argv: list[str] | None = None) -> int:
    """Print the tables of the parts; returns 0."""
    parser = argparse.ArgumentParser(
        prog="seglight bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, help="per call; a multiple of 8 (default: 32, cityscapes 8, coco 16)")
    parser.add_argument("--list", type=int, default=118_287, metavar="N", help="images of the startup list")
    options = parser.parse_args(argv)
    if options.images is not None and (options.images < 8 or options.images % 8):
        parser.error(f"--images is {options.images}; it must be a multiple of 8")
    for part in options.only:
        importlib.import_module(f"seglight.benchmarks.data_{part}").run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
