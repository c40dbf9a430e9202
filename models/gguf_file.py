"""A GGUF file: metadata and tensors, read with the package `gguf`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelError, require

_MAGIC = b"GGUF"


class GGUFFile:
    """An open GGUF file. Tensors have the order of numpy, `[out, in]`, and stay on disk until they are read.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: no such file.
      ModelError: not a GGUF, or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _check_magic(self.path)
        self._gguf = require("gguf")
        try:
            reader = self._gguf.GGUFReader(self.path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        # The reader does not check what it reads: a short or damaged file ends in whatever numpy raises.
        except Exception as error:
            raise ModelError(
                f"{self.path}: the GGUF cannot be read; it is cut short or damaged ({self.path.stat().st_size} bytes, "
                f"{type(error).__name__}: {error}). Download or convert it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._check_extents()

    def _check_extents(self) -> None:
        file_bytes = self.path.stat().st_size
        for tensor in self._tensors.values():
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > file_bytes:
                raise ModelError(
                    f"{self.path}: tensor '{tensor.name}' ends at byte {end}, but the file has {file_bytes}: "
                    "it is cut short. Download it again"
                )

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, last axis contiguous."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file."""
        return int(self._tensors[name].n_bytes)

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32."""
        tensor = self._tensors[name]
        try:
            values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor '{name}' is quantised as {tensor.tensor_type.name}, which the package gguf "
                "cannot dequantise: convert the model to another quantisation, for example Q8_0 or F16"
            ) from error
        return np.asarray(values, np.float32).reshape(self.shape(name))


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(
            f"{path}: not a GGUF file: expected it to start with {_MAGIC!r}, got {magic!r}. "
            "Pass a .gguf file, or the folder that holds config.json and *.safetensors"
        )
