"""Queries as sums of two float8 numbers, for products with float8 keys.

The tensor cores multiply float8 only with float8. A query is rounded to e4m3, and what that loses, 16 times larger, is
rounded once more: both together are as exact as bfloat16, and use rows of a product that would be idle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOST = 16.0
"""Times the second number is too large."""
_EIGHT = 8
"""Rows of a product that are above others in the registers of one thread."""


def place(row: jax.Array) -> jax.Array:
    """Row of a product of the first number of a query in this row of its tile; that of the second is an eight below."""
    return lax.div(row, _EIGHT) * 2 * _EIGHT + lax.rem(row, _EIGHT)


def row_at(place: jax.Array) -> jax.Array:
    """Row of the tile whose first or second number is in this row of a product."""
    return lax.div(place, 2 * _EIGHT) * _EIGHT + lax.rem(place, _EIGHT)


def split(tiles: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Splits queries, `[tiles, rows, head_dim]`.

    Returns:
      float8 `[tiles, 2 * rows, head_dim]`: of each eight rows of a tile the first numbers and then the second ones, of
      its queries times a power of 2; and float32 `[tiles]`: by what products with them are to be multiplied.
    """
    count, rows, head_dim = tiles.shape
    return pl.pallas_call(
        _split_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((count, 2 * rows, head_dim), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        grid=(count,),
        compiler_params=triton.CompilerParams(num_warps=pl.next_power_of_2(pl.cdiv(rows, _EIGHT))),
        interpret=interpret,
        name="attention_decode_queries",
    )(tiles)


def _split_kernel(tiles, parts, factors):
    tile = pl.program_id(0)
    rows, columns = tiles.shape[1], jnp.arange(pl.next_power_of_2(tiles.shape[2]))
    own = jnp.arange(pl.next_power_of_2(rows))
    inside = (own < rows)[:, None] & (columns < tiles.shape[2])[None, :]
    values = triton.load(tiles.at[tile, own[:, None], columns[None, :]], mask=inside, other=0).astype(jnp.float32)
    # The largest becomes 128 to 256: the largest e4m3 is 448, and its smallest normal number 2 ** -6.
    largest = jnp.max(jnp.abs(values))
    exponent = jnp.clip(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1.0))), -100.0, 100.0)
    values *= jnp.exp2(7.0 - exponent)
    first = values.astype(jnp.float8_e4m3fn)
    second = ((values - first.astype(jnp.float32)) * LOST).astype(jnp.float8_e4m3fn)
    rows_of_first = place(own)[:, None]
    triton.store(parts.at[tile, rows_of_first, columns[None, :]], first, mask=inside)
    triton.store(parts.at[tile, rows_of_first + _EIGHT, columns[None, :]], second, mask=inside)
    factors[tile] = jnp.exp2(exponent - 7.0)
