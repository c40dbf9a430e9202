"""A Hugging Face folder's `*.safetensors`: one file, or several with an index.

The format is 8 bytes of header length, a JSON header, and raw little-endian data
(https://github.com/huggingface/safetensors, section Format), so numpy reads it, bfloat16 included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ModelError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),  # buffers that no model reads, such as position ids
    "I32": np.dtype(np.int32),
}
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """In bytes, from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a folder. They stay on disk until they are read.

    Raises:
      FileNotFoundError: no safetensors, or one that the index names is missing.
      ModelError: a file is damaged or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder)
        self._entries: dict[str, _Entry] = {}
        for path in _files(self.path):
            self._entries.update(_read_header(path))

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, last axis contiguous."""
        return self._entries[name].shape

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return self._entries[name].nbytes

    def read(self, name: str) -> np.ndarray:
        """A tensor in the element type that it is stored in, mapped read-only from its file."""
        entry = self._entries[name]
        return np.memmap(entry.path, entry.dtype, mode="r", offset=entry.offset, shape=entry.shape)


def read_json(path: Path) -> Any:
    """The contents of a JSON file, with its name in the error if it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: expected JSON, got something else ({error}). Download it again") from error


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.exists():
        whole = folder / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        raise FileNotFoundError(
            f"{folder}: expected one *.safetensors file, or {_INDEX} beside several; "
            f"found {len(files)} files and no index"
        )
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a 'weight_map' from tensor names to files. Download it again")
    files = sorted({folder / str(name) for name in weight_map.values()})
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {index.name} names it: the download is not complete")
    return files


def _read_header(path: Path) -> dict[str, _Entry]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= file_bytes - 8:
            raise ModelError(
                f"{path}: not a safetensors file, or cut short: its header claims {header_bytes} bytes, "
                f"the file has {file_bytes}. Download it again"
            )
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, values, 8 + header_bytes) for name, values in header.items()}
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: the safetensors header is damaged ({error}). Download it again") from error
    return entries


def _entry(path: Path, name: str, values: dict[str, Any], data_start: int) -> _Entry:
    if values["dtype"] not in _DTYPES:
        raise ModelError(
            f"{path}: tensor '{name}' has the element type {values['dtype']}: supported are {', '.join(_DTYPES)}. "
            "Quantised safetensors are not; use the original checkpoint or a GGUF"
        )
    begin, end = values["data_offsets"]
    entry = _Entry(path, _DTYPES[values["dtype"]], tuple(map(int, values["shape"])), data_start + int(begin))
    if end - begin != entry.nbytes:
        raise ModelError(
            f"{path}: tensor '{name}' needs {entry.nbytes} bytes, the header gives {end - begin}. Download it again"
        )
    if entry.offset + entry.nbytes > path.stat().st_size:
        raise ModelError(
            f"{path}: tensor '{name}' ends at byte {entry.offset + entry.nbytes}, but the file has "
            f"{path.stat().st_size}: it is cut short. Download it again"
        )
    return entry
