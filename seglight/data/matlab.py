"""Reads MATLAB files, in which some datasets keep their labels."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from seglight.data.findings import DataError


def read_mat(path: Path, name: str, field: str | None = None, advice: str = "Unpack its archive again.") -> np.ndarray:
    """One array of a MATLAB file (version 5 or 7, not HDF5).

    Args:
        path: the file.
        name: of the variable.
        field: of the variable, if that is a structure.
        advice: what to do about a broken file, for messages.

    Raises:
        FileNotFoundError: no such file.
        DataError: not a MATLAB file, or no such array with two axes of whole numbers in it.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    broken = (MatReadError, OSError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, zlib.error)
    try:
        content = loadmat(path, variable_names=(name,))
    except broken as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error}). {advice}") from error
    value = content.get(name)
    if value is not None and field is not None:
        inside = value.dtype.names and field in value.dtype.names and value.size
        value = value[field].flat[0] if inside else None
    if value is None:
        raise DataError(f"{path}: has no {name}{'.' + field if field else ''}. {advice}")
    if value.ndim != 2 or value.dtype.kind not in "ui":
        raise DataError(
            f"{path}: {name}{'.' + field if field else ''} is {value.dtype} with {value.ndim} axes, not a map of "
            f"whole numbers. {advice}"
        )
    return value
