"""Tile sizes that were measured: `tilings.json`, a row for each kernel, head dim and dtype of K and V.

`python -m benchmarks tune --write` measures them and writes the file. What it has no row for takes the defaults of the
kernel's `Tiling`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any, TypeVar

import jax.numpy as jnp

_Tiling = TypeVar("_Tiling")


def tuned(default: _Tiling, kernel: str, head_dim: int, kv_dtype: Any) -> _Tiling:
    """`default`, a dataclass, with what is known to be faster for these arguments."""
    return dataclasses.replace(default, **_rows().get((kernel, head_dim, jnp.dtype(kv_dtype).name), {}))  # type: ignore[type-var]


@functools.cache
def _rows() -> dict[tuple[str, int, str], dict[str, Any]]:
    text = resources.files(__package__).joinpath("tilings.json").read_text()
    return {(row["kernel"], row["head_dim"], row["kv_dtype"]): row["tiling"] for row in json.loads(text)["rows"]}
