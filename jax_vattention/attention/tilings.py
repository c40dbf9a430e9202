"""Tile sizes that were measured: `tilings.json`, a row for each kernel, head dim and dtype of K and V.

A row that names a GPU is for GPUs of this name, and for them it goes before one that names none.

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

from jax_vattention.attention import target

_Tiling = TypeVar("_Tiling")


def tuned(default: _Tiling, kernel: str, head_dim: int, kv_dtype: Any) -> _Tiling:
    """`default`, a dataclass, with what is known to be faster for these arguments on the GPU that is traced for."""
    what = kernel, head_dim, jnp.dtype(kv_dtype).name
    found = next((row for gpu in (target.kind(), None) if (row := _rows().get((*what, gpu))) is not None), {})
    return dataclasses.replace(default, **found)  # type: ignore[type-var]


@functools.cache
def _rows() -> dict[tuple[str, int, str, str | None], dict[str, Any]]:
    text = resources.files(__package__).joinpath("tilings.json").read_text()
    rows = json.loads(text)["rows"]
    return {(row["kernel"], row["head_dim"], row["kv_dtype"], row.get("gpu")): row["tiling"] for row in rows}
