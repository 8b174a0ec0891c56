"""Arrays and a JSON header in one safetensors file, which no one can make run code.

The header is in the file's metadata under one key, with a digest over it and all arrays:
safetensors itself notices a truncated file, not a changed number.
"""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_KEY, _DIGEST = "jaxsoftmax", "sha256"
_VERSION = 1


class Contents(NamedTuple):
    """Contents of a file: numeric arrays by name, and values that JSON can express."""

    arrays: dict[str, NDArray[Any]]
    header: dict[str, Any]


def save(path: str | PathLike[str], contents: Contents) -> None:
    """Write `contents`; an object that JSON cannot express is a TypeError that names it."""
    _require_safetensors()
    from safetensors.numpy import save_file

    header = json.dumps({"version": _VERSION, **contents.header})
    arrays = {name: np.ascontiguousarray(array) for name, array in contents.arrays.items()}
    save_file(arrays, path, metadata={_KEY: header, _DIGEST: _digest(header, arrays)})


def load(path: str | PathLike[str]) -> Contents:
    """The contents of a file that `save` wrote; any other file is a ValueError that says why."""
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, no safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, truncated or no safetensors file: {error}") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file of something else: no {_KEY!r} metadata")
    header = metadata[_KEY]
    if metadata.get(_DIGEST) != _digest(header, arrays):
        raise ValueError(f"{path} is damaged: its numbers or its header differ from those written")
    values = json.loads(header)
    if values["version"] > _VERSION:
        raise ValueError(
            f"{path} has format version {values['version']}, this jaxsoftmax reads up to {_VERSION}"
        )
    return Contents(arrays, values)


def encoded(array: NDArray[Any]) -> dict[str, Any]:
    """An array of strings, booleans or numbers as JSON, exactly."""
    values = array.tolist()
    if array.dtype == object and not all(isinstance(value, str) for value in values):
        raise TypeError(f"only strings, booleans and numbers can be saved, got {values!r}")
    return {"dtype": array.dtype.str, "values": values}


def decoded(values: dict[str, Any]) -> NDArray[Any]:
    """The array that `encoded` got."""
    return np.array(values["values"], np.dtype(values["dtype"]))


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'saving and loading need safetensors: pip install "jaxsoftmax[sklearn]"'
        ) from error


def _digest(header: str, arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
