"""The online softmax of the prefill kernels (Milakov and Gimelshein, 2018), and which scores a row sees."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_products import sums_of_columns
from jax_vattention.attention.mosaic_view import ROWS
from jax_vattention.attention.prefill_shape import Shape
from jax_vattention.attention.prefill_split import Tile

_LOG2_E = math.log2(math.e)
NOTHING = -1e30
"""Maximum of no scores. Finite: a row that sees nothing of a tile then needs no care."""


def unmasked(tile: Tile, position, rows: int, shape: Shape, *, behind: int = 0) -> tuple[Any, Any]:
    """Tiles of keys `low .. high - 1` that each of so many rows sees all of, and so many keys `behind` them.

    `position` is that of the first row.
    """
    block_k = shape.tiling.block_k
    seen = jnp.maximum(position + 1, tile.prefix) - behind - tile.begin
    high = jnp.minimum(lax.div(jnp.maximum(seen, 0), block_k), tile.blocks)
    if shape.window is None:
        return jnp.int32(0), high
    hidden = jnp.maximum(position + rows - shape.window - tile.begin, 0)
    return jnp.minimum(lax.div(hidden + block_k - 1, block_k), tile.blocks), high


def factors(shape: Shape) -> tuple[float | None, float]:
    """Scores are products times the one, if there is no cap, and exponents of 2 are scores times the other."""
    if shape.soft_cap is not None:
        return None, 1.0
    # A maximum is one of products only if the factor is positive; then exponents take a multiplication and addition.
    return (1.0, shape.scale * _LOG2_E) if shape.scale > 0 else (shape.scale * _LOG2_E, 1.0)


def denominator(maximum, total, sink, shape: Shape):
    """Of the softmax of each row, in the end."""
    if sink is not None:
        factor = factors(shape)[1]
        total = total + jnp.exp2(sink * _LOG2_E - maximum * factor)
    # A row that sees nothing, of no request, has total 0.
    return jnp.where(total == 0, 1, total)


def softmax_of_tile(products, maximum, total, key, *, tile: Tile, position, shape: Shape, masked: bool):
    """See `softmax`. The first key is number `key`."""
    visible = functools.partial(_visible, tile=tile, position=position, key=key, shape=shape) if masked else None
    sums = functools.partial(sums_of_columns, interpreted=shape.interpreted)
    return softmax(products, maximum, total, shape, visible, sums=sums)


def softmax(
    products, maximum, total, shape: Shape, visible: Callable[..., Any] | None, *, slack: float = 0.0, sums=None
):
    """Returns `(weights, maximum, factor of what was found so far, total)`.

    Args:
      visible: puts minus infinity in the place of scores that a row does not see; None if it sees all.
      sums: adds up some of the columns of weights, if `total` has a few columns of which the sum is the total.
      slack: weights may grow up to 2 to the power of it before a new maximum takes the place of the old one.
    """
    scores, factor = scores_of(products, shape)
    if visible is not None:
        scores = visible(scores)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    if slack:
        # NaN, which is found for rows of no request, changes nothing.
        new_maximum = jnp.where(new_maximum - maximum > slack / factor, new_maximum, maximum)
    shrink = jnp.exp2((maximum - new_maximum) * factor)
    weights = weights_of(scores, factor, new_maximum)
    if sums is None:
        return weights, new_maximum, shrink, total * shrink + weights.sum(axis=1)
    return weights, new_maximum, shrink, total * lax.broadcast_in_dim(shrink, total.shape, [0]) + sums(weights)


def scores_of(products, shape: Shape) -> tuple[Any, float]:
    """Scores, and the factor that makes exponents of 2 of them."""
    first, factor = factors(shape)
    if shape.soft_cap is not None:
        products = jnp.tanh(products * (shape.scale / shape.soft_cap)) * (shape.soft_cap * _LOG2_E)
    elif first != 1.0:
        products = products * first
    return products, factor


def weights_of(scores, factor: float, maximum):
    """Of scores in exponents of 2, less the maximum of each row."""
    return jnp.exp2(scores * factor - lax.broadcast_in_dim(maximum * factor, scores.shape, [0]))


def _visible(scores, *, tile: Tile, position, key, shape: Shape):
    """`scores`, and minus infinity for keys, from number `key` on, that a row does not see."""
    layout = None if shape.interpreted else plgpu.Layout.WGMMA.reduce(1)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout)
    end = jnp.maximum(row + (position + 1 - key), tile.prefix - key)
    if shape.window is None:
        begin = plgpu.layout_cast(jnp.zeros_like(end), layout) if layout else jnp.zeros_like(end)
    else:
        begin = row + (position + 1 - shape.window - key)
    if shape.interpreted:
        column = jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :]
        return jnp.where((column >= begin[:, None]) & (column < end[:, None]), scores, -jnp.inf)
    return _masked(scores, begin, end, has_begin=shape.window is not None)


def _masked(scores, begin, end, *, has_begin: bool):
    """`scores`, and minus infinity in columns other than `begin .. end - 1`.

    As comparisons of constants with bounds that lack the first column of the thread: `jnp.where` would keep the number
    of each column in a register of its own, through all loops.
    """
    wgmma, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def place(i):
        return ir.DenseI64ArrayAttr.get([i])

    def scalar(register, i):
        return vector.extract(register, dynamic_position=[], static_position=place(i))

    @plgpu.inline_mgpu(
        arg_types=(wgmma, row, row), return_type=plgpu.ShapeDtypeStruct(scores.shape, scores.dtype, wgmma)
    )
    def mask(_, scores, begin, end):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        (_, first), *_ = scores.layout.thread_idxs(scores.shape)
        first = arith.index_cast(i32, first)
        bounds = [[arith.subi(scalar(each, 0), first) for each in rows.registers.flat] for rows in (begin, end)]
        hidden = mgpu.c(-math.inf, f32)
        registers = scores.registers.copy()
        for at, register in np.ndenumerate(registers):
            begin, end = (each[at[4]] for each in bounds)  # the thread's upper or lower row
            for i in range(2):
                column = mgpu.c(8 * at[1] + i, i32)
                seen = arith.cmpi(arith.CmpIPredicate.slt, column, end)
                if has_begin:
                    seen = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.sge, column, begin))
                value = arith.select(seen, scalar(register, i), hidden)
                register = vector.insert(value, register, dynamic_position=[], static_position=place(i))
            registers[at] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=scores.layout, _is_signed=None)

    return mask(scores, begin, end)
