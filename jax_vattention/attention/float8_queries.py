"""Queries as sums of two float8 numbers, for products with float8 keys.

The tensor cores multiply float8 only with float8. A query is rounded to e4m3, and what that loses, 16 times larger, is
rounded once more: both together are as exact as bfloat16, and use rows of a product that would be idle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_view import BOX, second_eights_of

LOST = 16.0
"""Times the second number is too large."""
_LARGEST = 256.0
"""What the largest of a query becomes: the largest e4m3 is 448, and its smallest normal number 2 ** -6."""
_SMALLEST = 2.0**-100
"""Queries with nothing larger become smaller than that: `_LARGEST` over it is finite."""


def place(row: jax.Array) -> jax.Array:
    """Row of a product of the first number of a query in this row of its tile; that of the second is an eight below."""
    return lax.div(row, BOX) * 2 * BOX + lax.rem(row, BOX)


def row_at(place: jax.Array) -> jax.Array:
    """Row of the tile whose first or second number is in this row of a product."""
    return lax.div(place, 2 * BOX) * BOX + lax.rem(place, BOX)


def split(twice, parts, *, interpreted: bool) -> jax.Array:
    """Splits queries in shared memory.

    Args:
      twice: `[rows, head_dim]`: of a tile each eight of queries twice, one after the other.
      parts: float8, of the same shape. Gets, in their places, the first numbers of queries, each times a factor of its
        own, and the second ones.

    Returns:
      float32 `[rows]`: by what products with these are to be multiplied.
    """
    values = plgpu.load(twice, layout=plgpu.Layout.WGMMA).astype(jnp.float32)  # type: ignore[call-arg]  # jax 0.10
    largest = jnp.maximum(jnp.abs(values).max(axis=1), _SMALLEST)
    values *= lax.broadcast_in_dim(_LARGEST / largest, values.shape, [0])
    lost = (values - values.astype(parts.dtype).astype(jnp.float32)) * LOST
    parts[...] = second_eights_of(values, lost, interpreted=interpreted).astype(parts.dtype)
    # Before a product reads what was written, and a copy overwrites what was read.
    plgpu.commit_smem()
    return largest / _LARGEST
