"""Large COCO files are read once per machine: their arrays lie in an index folder, which all processes map.

The folder is $SEGLIGHT_CACHE, else $XDG_CACHE_HOME/seglight, else ~/.cache/seglight; it may be deleted at any time. An
index belongs to the content of a json file (its SHA-256) and to the code that reads it, so it cannot be stale. It is
written beside its place and renamed, so it is whole or not there, and its checksums are compared at every start.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from seglight.data.cocojson import check, lists, pieces, quick, reader, stream
from seglight.data.cocojson import document as document_module
from seglight.data.cocojson.document import Document
from seglight.data.findings import Fault
from seglight.data.packed import Packed, Strings
from seglight.data.store import alone, checksum, whole

log = logging.getLogger(__name__)

SMALLEST = 8 << 20
"""Bytes of a file that gets an index; smaller ones are read in less than a second."""
_SETTLED = 2.0  # seconds after which a file that is written again has another time, on any file system
_LEFT = 3600.0  # seconds after which nobody can be writing to a half-written index any more
_BLOCK = 1 << 20


def home() -> Path:
    """The folder of everything that can be made again."""
    if own := os.environ.get("SEGLIGHT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seglight"


def document(path: str | Path, labelled: bool = True) -> Document:
    """As `seglight.data.cocojson.reader.read`, from the index if the file is large.

    Without a folder to write to, the file is read every time, which is logged.
    """
    path = Path(path)
    if path.stat().st_size < SMALLEST:
        return reader.read(path, labelled)
    try:
        return _indexed(path, labelled)
    except OSError as error:
        log.warning("No index for %s (%s). Name a folder with room for it: SEGLIGHT_CACHE.", path, error)
        return reader.read(path, labelled)


def image_faults(found: Document, folder: Path) -> tuple[np.ndarray, list[Fault]]:
    """As `seglight.data.cocojson.check.image_faults`; files that have not changed since are not opened again."""
    if found.index is None:
        return check.image_faults(found, folder)
    name = _short(f"{folder} {folder.resolve()}")
    memo, states = found.index / f"images-{name}.npz", _states(found, folder)
    before, faults = _remembered(memo, len(found))
    changed = (states != before).any(1) | (states[:, 0] < 0)
    bad, fresh = check.image_faults(found, folder, changed)
    listed = iter(fresh)
    of_image = {**faults, **{index: next(listed) for index in np.flatnonzero(bad).tolist()}}
    of_image = {index: fault for index, fault in of_image.items() if bad[index] or not changed[index]}
    if changed.any():
        rows = [[index, *of_image[index]] for index in sorted(of_image)]
        with suppress(OSError), whole(memo) as file:
            np.savez(file, states=states, faults=np.frombuffer(json.dumps(rows).encode(), np.uint8))
    bad = np.zeros(len(found), bool)
    bad[list(of_image)] = True
    return bad, [of_image[index] for index in sorted(of_image)]


def _indexed(path: Path, labelled: bool) -> Document:
    digest, found, _ = _look(path)
    if not found:
        place = home() / "coco"
        place.mkdir(parents=True, exist_ok=True)
        with alone(place / f"{path.stat().st_size}.lock"):
            digest, found, damage = _look(path)  # another process may have written it meanwhile
            if not found:
                why = f"; the index is damaged: {damage}" if damage else ""
                log.warning("Reading %s, once: it is kept in %s%s.", path, place, why)
                folder = _build(path, digest)
                found, damage = _load(folder, path)
    if not found:
        raise OSError(f"{folder} cannot be read back: {damage}")
    return found if found.labelled or not labelled else reader.read(path, labelled)  # which raises


def _look(path: Path) -> tuple[str | None, Document | None, str]:
    """The digest of a file, its document and what is wrong with that; no digest where it would find nothing anyway."""
    digest = _remembered_digest(path)
    if digest is None and any((home() / "coco").glob(f"*-{path.stat().st_size}-{_code()}")):
        digest = _known_digest(path)
    return (digest, *_load(_folder(path, digest), path)) if digest else (None, None, "")


def _folder(path: Path, digest: str) -> Path:
    return home() / "coco" / f"{digest[:24]}-{path.stat().st_size}-{_code()}"


def _build(path: Path, digest: str | None) -> Path:
    """Write an index; the folder that it is in."""
    place, before = home() / "coco", _state(path)
    work = Path(tempfile.mkdtemp(prefix=f"{path.stat().st_size}.", suffix=".part", dir=place))
    try:
        with ThreadPoolExecutor(1) as pool:
            gathered = reader.gather(path, work / "points.npy")
            hashed = pool.submit(lambda: digest or _known_digest(path))  # now that a processor core is idle
            found = reader.assemble(path, gathered, labelled=False)
            bad, faults = check.degenerate(found)
            found.packed.replaced(degenerate=bad).save(work)
            files = sorted(work.glob("*.npy"))
            sums = {file.stem: checksum(file) for file in files}
            sha256 = hashed.result()
        if _state(path) != before:
            raise OSError(f"{path} changed while it was read")
        header = {
            "sha256": sha256,
            "category_ids": found.category_ids,
            "categories": found.categories,
            "labelled": found.labelled,
            "faults": found.faults,
            "degenerate": faults,
            "checksums": sums,
        }
        (work / "document.json").write_text(json.dumps(header))
        os.chmod(work, 0o755)  # others may read it
        folder = _folder(path, sha256)
        for old in (*place.glob(f"{folder.name[:24]}-*"), *place.glob("*.part")):  # of other code, or left by a crash
            with suppress(OSError):
                if old.is_dir() and (not old.suffix or time.time() - old.stat().st_mtime > _LEFT):
                    shutil.rmtree(old)
        try:
            os.replace(work, folder)
        except OSError:
            if not folder.is_dir():  # where there are no locks, another process may have been faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _load(folder: Path, path: Path) -> tuple[Document | None, str]:
    """The document in an index, or None and what is wrong, "" if there is none."""
    if not folder.is_dir():
        return None, ""
    try:
        header = json.loads((folder / "document.json").read_text())
        sums = header["checksums"]
        if broken := [name for name, value in sums.items() if checksum(folder / f"{name}.npy") != value]:
            return None, f"{', '.join(broken)} changed on the disk"
        packed = Packed.map(folder, [name for name in sums if name != "degenerate"])
        faults, degenerate = ([Fault(*fault) for fault in header[name]] for name in ("faults", "degenerate"))
        found = Document(
            path=path,
            category_ids=tuple(header["category_ids"]),
            categories=tuple(header["categories"]),
            packed=packed,
            faults=faults,
            labelled=header["labelled"],
            index=folder,
            sha256=header["sha256"],
            degenerate=(np.load(folder / "degenerate.npy"), degenerate),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, str(error)
    return found, ""


def _code() -> str:
    """Of the code that makes an index."""
    modules = (reader, lists, stream, pieces, quick, document_module, check)
    return hashlib.sha256("".join(inspect.getsource(one) for one in modules).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _remembered_digest(path: Path) -> str | None:
    """The same, known as long as the file's size, times and place on the disk stay the same."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(_memo(path).read_text())
        if found["state"] == _state(path):
            return str(found["sha256"])
    return None


def _known_digest(path: Path) -> str:
    """The same, remembered from now on."""
    state = _state(path)
    digest = file_digest(path)
    if time.time() - max(state[1], state[2]) / 1e9 > _SETTLED:
        with suppress(OSError), whole(_memo(path)) as file:  # an index that one may only read will do
            file.write(json.dumps({"path": str(path.resolve()), "state": state, "sha256": digest}).encode())
    return digest


def _memo(path: Path) -> Path:
    return home() / "coco" / f"{_short(str(path.resolve()))}.json"


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _short(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:24]


def _states(found: Document, folder: Path) -> np.ndarray:
    """int64 (N, 2), bytes and time of change of each image file; -1 where there is none."""
    states = np.full((len(found), 2), -1, np.int64)
    prefix = f"{folder}{os.sep}"
    for index, name in enumerate(Strings(found.packed.names, found.packed.name_starts)):
        with suppress(OSError, ValueError):
            state = os.stat(prefix + name)
            states[index] = state.st_size, state.st_mtime_ns
    return states


def _remembered(memo: Path, count: int) -> tuple[np.ndarray, dict[int, Fault]]:
    """States and faults of an earlier look; nothing matches if there was none."""
    with suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile), np.load(memo) as file:
        states, rows = file["states"], json.loads(file["faults"].tobytes())
        if states.shape == (count, 2):
            return states, {int(index): Fault(*fault) for index, *fault in rows}
    return np.full((count, 2), -2, np.int64), {}
