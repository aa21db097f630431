"""Datasets as they are downloaded: in zip archives."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def zip_folders(root: Path, archives: Mapping[str, Sequence[str]], packed: bool = True) -> None:
    """Move folders of a new dataset into zip archives beside them.

    Args:
        root: of the dataset.
        archives: name of each archive, and the folders that it gets, relative to the root. Folders that are not there
            are passed over.
        packed: deflate the members; otherwise they are stored.
    """
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    for name, folders in archives.items():
        there = [root / folder for folder in folders if (root / folder).exists()]
        if not there:
            continue
        with zipfile.ZipFile(root / name, "w", method) as archive:
            for folder in there:
                for path in sorted(folder.rglob("*")):
                    archive.write(path, path.relative_to(root))
        for folder in there:
            shutil.rmtree(folder)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if not any(folder.iterdir()):
            folder.rmdir()
