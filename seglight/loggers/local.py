"""`RunLogger`: metrics as files in the run folder, without any account."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from seglight.loggers.harmless import never_stops


class RunLogger(Logger):
    """Writes metrics.jsonl (every record) and results.csv (one row per validation) into the run folder, on rank 0.

    A resumed run repeats the steps after its checkpoint. `resume(step)` therefore drops what the killed run wrote
    after that step, so that every curve has one value per step.

    A line of metrics.jsonl is `{"step": ..., "time": ..., name: value, ...}`, time in seconds since 1970, values that
    are not finite as null. A row of results.csv has step, time, all `val/` metrics and the latest `train/` ones; a
    metric that appears later adds a column, empty in the rows before. Lines are buffered: on the disk after each
    validation and every few seconds.

    Args:
        save_dir: the run folder; created with the first record.
    """

    FLUSH_EVERY = 5.0
    """Seconds."""

    def __init__(self, save_dir: str | Path = "."):
        super().__init__()
        self._save_dir = Path(save_dir)
        self._file: IO[str] | None = None
        self._flushed = 0.0
        self._latest: dict[str, float] = {}
        self._rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """Empty, so that Lightning puts nothing between the folder and what it writes there."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._save_dir)

    @property
    def path(self) -> Path:
        """metrics.jsonl."""
        return self._save_dir / "metrics.jsonl"

    @rank_zero_only
    @never_stops
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one record."""
        values = {name: _number(value) for name, value in metrics.items()}
        record = {"step": None if step is None else int(step), "time": round(time.time(), 3), **values}
        self._open().write(json.dumps(record) + "\n")
        self._latest.update({name: value for name, value in values.items() if name.startswith("train/")})
        if any(name.startswith("val/") for name in values):
            self._add_row(record)
        if not all(name.startswith("train/") or name == "epoch" for name in values):
            self.flush()

    def _open(self) -> IO[str]:
        if self._file is None:
            self._save_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 stays open from record to record
            if self._file.tell() and not _ends_a_line(self.path):  # killed in the middle of a line
                self._file.write("\n")
        return self._file

    def flush(self) -> None:
        """Hand what is buffered to the operating system now."""
        if self._file is not None:
            self._file.flush()
        self._flushed = time.monotonic()

    def _add_row(self, record: dict[str, Any]) -> None:
        path = self._save_dir / "results.csv"
        if self._rows is None:
            self._rows = _read_rows(path)
        new = {name: value for name, value in record.items() if name in ("step", "time") or name.startswith("val/")}
        if self._rows and str(self._rows[-1].get("step")) == str(new["step"]):  # logged in two calls
            self._rows[-1].update(new)
        else:
            self._rows.append({**new, **self._latest})
        self._write_rows(path)

    def _write_rows(self, path: Path) -> None:
        """Rewritten whole, so that a new column cannot shift old rows; there is one row per validation."""
        columns = list(dict.fromkeys(name for row in self._rows or () for name in row))
        with _replacing(path, newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows or ())

    @rank_zero_only
    @never_stops
    def resume(self, step: int) -> None:
        """Drop everything beyond a step: what a killed run did after the checkpoint that is now continued."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path.exists():
            kept = [record for record in read_metrics(self.path) if (record.get("step") or 0) <= step]
            with _replacing(self.path) as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
        rows = self._save_dir / "results.csv"
        if rows.exists():
            self._rows = [row for row in _read_rows(rows) if int(row["step"] or 0) <= step]
            self._write_rows(rows)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has config.yaml."""

    @rank_zero_only
    @never_stops
    def save(self) -> None:
        """Lightning calls this after each record; every few seconds it writes to the disk."""
        if time.monotonic() - self._flushed > self.FLUSH_EVERY:
            self.flush()

    @rank_zero_only
    @never_stops
    def finalize(self, status: str) -> None:
        """Close the file; a later record opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl (or of the run folder it lies in); a line cut short by a crash is left out."""
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class _replacing:
    """Open a text file that takes the place of the old one only when it is complete."""

    def __init__(self, path: Path, **options: Any):
        self.path, self.part, self.options = path, path.with_name(f"{path.name}.part"), options

    def __enter__(self) -> IO[str]:
        self.file = open(self.part, "w", encoding="utf-8", **self.options)
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.part, self.path)


def _number(value: Any) -> float | int | None:
    """A JSON number: float32 values without their invented digits, null for nan and inf."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
