"""Tile sizes that were measured: `tilings.json`, a row for each kernel, head dim and dtype of K and V.

A row may be of one GPU, by the name that JAX has for it, of one layout, or of both. It goes before one that is for all.

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
from jax_vattention.cache import LayerView

_Tiling = TypeVar("_Tiling")


def tuned(default: _Tiling, kernel: str, view: LayerView) -> _Tiling:
    """`default`, a dataclass, with what is known to be faster for a view on the GPU that is traced for."""
    what = {
        "kernel": kernel,
        "head_dim": view.head_dim,
        "kv_dtype": jnp.dtype(view.k.dtype).name,
        "gpu": target.kind(),
        "layout": view.layout,
    }
    rows = (row for row in _rows() if all(row.get(name, value) == value for name, value in what.items()))
    nothing: dict[str, Any] = {"tiling": {}}
    best = max(rows, key=lambda row: ("gpu" in row, "layout" in row), default=nothing)
    return dataclasses.replace(default, **best["tiling"])  # type: ignore[type-var]


@functools.cache
def _rows() -> list[dict[str, Any]]:
    text = resources.files(__package__).joinpath("tilings.json").read_text()
    return json.loads(text)["rows"]
