"""Queries as sums of two float8 numbers, for products with float8 keys.

The tensor cores multiply float8 only with float8. A query is rounded to e4m3, and what that loses, 16 times larger, is
rounded once more: both together are as exact as bfloat16, and use rows of a product that would be idle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOST = 16.0
"""Times the second number is too large."""


def split(tiles: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Splits queries, `[tiles, rows, head_dim]`.

    Returns:
      float8 `[tiles, 2 * rows, head_dim]`: the first and then the second numbers of a tile, of its queries times a
      power of 2; and float32 `[tiles]`: by what products with them are to be multiplied.
    """
    count, rows, head_dim = tiles.shape
    return pl.pallas_call(
        _split_kernel,
        out_shape=[
            jax.ShapeDtypeStruct((count, 2 * rows, head_dim), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        grid=(count,),
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=interpret,
        name="attention_decode_queries",
    )(tiles)


def _split_kernel(tiles, parts, factors):
    tile = pl.program_id(0)
    rows, columns = tiles.shape[1], jnp.arange(pl.next_power_of_2(tiles.shape[2]))
    inside = jnp.broadcast_to(columns < tiles.shape[2], (rows, columns.size))
    own = jnp.arange(rows)
    values = triton.load(tiles.at[tile, own[:, None], columns[None, :]], mask=inside, other=0).astype(jnp.float32)
    # The largest becomes 128 to 256: the largest e4m3 is 448, and its smallest normal number 2 ** -6.
    largest = jnp.max(jnp.abs(values))
    exponent = jnp.clip(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1.0))), -100.0, 100.0)
    values *= jnp.exp2(7.0 - exponent)
    first = values.astype(jnp.float8_e4m3fn)
    second = ((values - first.astype(jnp.float32)) * LOST).astype(jnp.float8_e4m3fn)
    triton.store(parts.at[tile, own[:, None], columns[None, :]], first, mask=inside)
    triton.store(parts.at[tile, rows + own[:, None], columns[None, :]], second, mask=inside)
    factors[tile] = jnp.exp2(exponent - 7.0)
