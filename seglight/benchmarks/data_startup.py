"""Start of a COCO-format list of full size: 118,287 images, 7.3 objects each, polygons of 27 corners.

Every start is a process of its own; time and memory are those of the list, without the import of torch. Marks: under
5 s and 500 MB, also for the first on a machine, which is measured five times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PER_IMAGE = 7.27


def run(options: argparse.Namespace) -> None:
    """Print time and memory of first and later starts."""
    with tempfile.TemporaryDirectory() as folder:
        path = coco_list(Path(folder) / "objects.json", options.list)
        print(f"startup: {options.list:,} images, {path.stat().st_size / 1e6:.0f} MB of json")
        first = []
        for number in range(5):
            os.sync()  # the disk is not to be busy with what was written before
            first.append(_measured(path, Path(folder) / f"cache{number}"))
        found = [("first start, fastest of 5", min(first)), ("first start, median", statistics.median_low(first))]
        found += [(name, _measured(path, Path(folder) / "cache0")) for name in ("second start", "third start")]
        for name, (seconds, private, peak) in found:
            met = "met" if seconds < 5 and peak < 500 else "MISSED"
            memory = f"{private:4.0f} MB of its own, {peak:4.0f} MB at most with shared pages"
            print(f"  {name:26}{seconds:6.2f} s, {memory}; marks {met}")


def _measured(path: Path, cache: Path) -> list[float]:
    """Seconds, megabytes that are its own, and the most with shared pages, of a process that opens the list."""
    command = [sys.executable, "-m", "seglight.benchmarks.data_startup", str(path)]
    environment = {**os.environ, "SEGLIGHT_CACHE": str(cache)}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def coco_list(path: Path, images: int) -> Path:
    """Write a json file of objects; the outlines repeat."""
    rng = np.random.default_rng(0)
    outlines = []
    for _ in range(997):
        corners, radius = int(rng.integers(8, 47)), rng.uniform(5, 100)
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        points = np.stack([320 + radius * np.cos(angle), 240 + radius * np.sin(angle)], 1).round(2)
        box = [*points.min(0).tolist(), *np.ptp(points, axis=0).round(2).tolist()]
        outlines.append(
            json.dumps({"bbox": box, "area": 1.5 * radius**2, "segmentation": [points.ravel().tolist()]})[1:]
        )
    owners = np.sort(rng.integers(0, images, round(PER_IMAGE * images))).tolist()
    with open(path, "w") as file:
        listed = ({"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640} for i in range(images))
        file.write('{"images": [' + ", ".join(map(json.dumps, listed)) + '], "annotations": [')
        entries = (
            f'{{"id": {i + 1}, "image_id": {owner}, "category_id": {1 + i % 80}, "iscrowd": 0, {outlines[i % 997]}'
            for i, owner in enumerate(owners)
        )
        file.write(", ".join(entries))
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def _start(path: str) -> None:
    import time

    from seglight.data.cocojson.index import document

    begin = time.perf_counter()
    document(path)
    seconds = time.perf_counter() - begin
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, private / 1e3, int(peak.split()[1]) / 1e3]))


if __name__ == "__main__":
    _start(sys.argv[1])
