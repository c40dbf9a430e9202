"""Decode attention with queries as the rows of products: Hopper and Blackwell GPUs.

The query heads that share a KV head are rows of one product with a tile of K, and their weights rows of one with a tile
of V. How it is multiplied is the one thing that Blackwell does in another way: see `Products`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import float8_queries
from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece, Work
from jax_vattention.attention.mosaic_compute import (
    LOG2_E,
    Computing,
    Parts,
    Refs,
    State,
    clear_unseen,
    copy_rows,
    inside,
    iota,
    visible,
    wait,
    widen_tile,
)
from jax_vattention.attention.mosaic_products import sums_of_columns
from jax_vattention.attention.mosaic_view import (
    BOX,
    ROWS,
    add_eights,
    as_rows,
    repeat_eights,
    second_eights_of,
    store_rows,
    zero_second_eights,
)

_IDLE = 1e30
"""The maximum of a row that has no query: its weights are 0."""


class Products(Protocol):
    """What the computing warpgroup of one stream multiplies with."""

    def __init__(self, shape: Shape, local: jax.Array, **memory: Any) -> None:
        """Of the stream with this number in its block, with the block's memory."""

    narrow: bool = False
    """Whether it multiplies float8 with float8."""

    @staticmethod
    def scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
        """Memory of a block that it needs besides, and what is to be otherwise; `dtype` is that of the queries."""

    @staticmethod
    def width(shape: Shape) -> int:
        """Columns of each array in which the result is added up."""

    def scores(self, q, k, meanwhile: Callable[[], None]) -> jax.Array:
        """`q @ k.T`, float32 `[ROWS, block_k]`; nothing reads `k` any more. Calls `meanwhile` while it is computed."""

    def add(self, acc: Parts, shrunk: Callable[[jax.Array], jax.Array], weights: jax.Array, v) -> Parts:
        """`shrunk` of each of `acc`, plus `weights @ v`, float32; nothing reads `v` any more."""


class Wgmma(Products):
    """Those of a Hopper GPU, whose tensor cores add up in registers and take their left operand from them, too."""

    narrow = True

    def __init__(self, shape: Shape, local: jax.Array, **_) -> None:
        del local
        self._interpreted = shape.interpreted

    @staticmethod
    def scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
        """Nothing."""
        del shape, dtype
        return {}

    @staticmethod
    def width(shape: Shape) -> int:
        """All, where a thread has registers for it: six warpgroups leave it 80 to begin with, of which compilers say
        that they are too few for a product of 128 columns."""
        few = shape.widens and shape.tiling.streams > 1
        return math.gcd(shape.head_dim, 64) if few else shape.head_dim

    def scores(self, q, k, meanwhile: Callable[[], None]) -> jax.Array:
        """See `Products`."""

        def product(ref):
            plgpu.wgmma(ref, q, k.transpose((1, 0)))
            meanwhile()
            return ref[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))

    def add(self, acc: Parts, shrunk: Callable[[jax.Array], jax.Array], weights: jax.Array, v) -> Parts:
        """See `Products`."""
        return tuple(
            self._add_part(shrunk(part), weights, columns) for part, columns in zip(acc, _parts(v, acc), strict=True)
        )

    def _add_part(self, part: jax.Array, weights: jax.Array, v) -> jax.Array:
        def product(ref):
            if not self._interpreted:  # which has no accumulators that begin with a value
                ref[...] = part
            plgpu.wgmma(ref, weights, v)
            return ref[...] + part if self._interpreted else ref[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, part.shape[1]), jnp.float32))


def _parts(v, acc: Parts) -> list[Any]:
    """The columns of V that each of `acc` is of."""
    if len(acc) == 1:
        return [v]
    return [v.at[:, pl.ds(number * part.shape[1], part.shape[1])] for number, part in enumerate(acc)]


class Rows(Computing):
    """See `Computing`."""

    def __init__(
        self, shape: Shape, local, work: Work, products: type[Products], refs: Refs, *, k_wide=None, v_wide=None,
        wide_ready=None, wide_free=None, **memory,
    ):  # fmt: skip
        def own(array):
            return None if array is None else array.at[local]

        super().__init__(shape, local, work, refs, **memory)
        self.products, self.width = products(shape, local, **memory), products.width(shape)
        self.k_wide, self.v_wide = own(k_wide), own(v_wide)
        self.wide_ready, self.wide_free = own(wide_ready), own(wide_free)

    def prepare(self) -> None:
        """Clears idle rows: a product has more than there are queries, and of zeros it takes less power.

        A GPU that reads memory at full speed may be at its power limit, and then its clocks pay.
        """
        if self.shape.product_rows == ROWS:
            return
        for buffer in range(2):
            nothing = jnp.zeros((ROWS, self.shape.head_dim), self.queries.dtype)
            self.queries[buffer] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
        plgpu.commit_smem()

    def begin(self, piece: Piece) -> tuple[Any, Any]:
        """See `Computing`."""
        shape = self.shape
        q, scale = super().begin(piece)
        if shape.quantized:
            scale = scale * _of_rows(shape, self.refs.scales, self.refs.first_scale + piece.head)
        if self.query_parts is None:
            return q, scale
        return self.query_parts, scale * float8_queries.split(q, self.query_parts, interpreted=shape.interpreted)

    def nothing(self, tiles) -> State:
        """See `Computing`."""
        whole, width = plgpu.Layout.WGMMA, self.width
        maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), whole.reduce(1))
        if self.shape.product_rows < ROWS:
            idle = iota((ROWS,), 0, whole.reduce(1)) >= self.shape.product_rows
            maximum = jnp.where(idle, jnp.full_like(maximum, _IDLE), maximum)
        return State(
            tiles,
            maximum,
            plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), whole),
            tuple(
                plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), whole)
                for _ in range(0, self.shape.head_dim, width)
            ),
        )

    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool) -> State:
        """See `Computing`."""
        shape = self.shape
        if shape.narrow:
            # The second eights of rows hold nothing. What is the same as in the first ones is computed once.
            again = functools.partial(repeat_eights, interpreted=shape.interpreted)
            state = state._replace(maximum=again(state.maximum), total=again(state.total))
        stage = lax.rem(state.tiles, shape.stages)
        barrier = self.local * shape.stages + stage
        k, v = (as_rows(each.at[stage]) for each in (self.k, self.v))
        first = piece.first + tile * shape.tile_tokens
        wait(*self.k_ready, barrier, tile >= whole, masked)
        if self.k_wide is not None:
            widen_tile(k, self.k_wide)
            plgpu.barrier_arrive(self.k_free.at[barrier])
            k = self.k_wide

        def meanwhile():
            if self.v_wide is not None and not shape.widens:
                wait(*self.v_ready, barrier, tile >= whole, masked)
                widen_tile(v, self.v_wide, functools.partial(inside, shape, piece, first) if masked else None)
                plgpu.barrier_arrive(self.v_free.at[barrier])

        qk = self.products.scores(q, k, meanwhile)
        if self.k_wide is None:
            plgpu.barrier_arrive(self.k_free.at[barrier])
        maximum, shrink, total, weights = _weighed(shape, piece, first, qk, scale, state, masked)
        weights = weights.astype(v.dtype if self.v_wide is None else self.v_wide.dtype)
        if self.v_wide is None:
            wait(*self.v_ready, barrier, tile >= whole, masked)
            if masked:
                clear_unseen(shape, v, piece, first)
        if shape.widens:
            plgpu.barrier_wait(self.wide_ready)
        shrunk = functools.partial(_shrunk, shape, shrink)
        acc = self.products.add(state.acc, shrunk, weights, v if self.v_wide is None else self.v_wide)
        if self.v_wide is None:
            plgpu.barrier_arrive(self.v_free.at[barrier])
        if shape.widens:
            plgpu.barrier_arrive(self.wide_free)
        return State(state.tiles + 1, maximum, total, acc)

    def total(self, state: State) -> jax.Array:
        """See `Computing`."""
        return state.total.sum(axis=1)

    def result(self, piece: Piece, acc: Parts, factor: jax.Array) -> Parts:
        """See `Computing`."""
        if self.shape.quantized:
            first = self.refs.first_scale + self.shape.num_kv_heads + piece.head
            factor *= _of_rows(self.shape, self.refs.scales, first)
        return tuple(_times(part, factor) for part in acc)

    def write(self, result: Parts, ref, token, head, low, high, group: int, rows) -> None:
        """See `Computing`."""
        shape, width = self.shape, result[0].shape[1]
        if not shape.interpreted:
            for number, part in enumerate(result):
                part = part.astype(ref.dtype)
                store_rows(
                    part, ref, token, head, low, high, group=group, first_column=number * width,
                    first_eights=shape.narrow,
                )  # fmt: skip
            return
        for number, part in enumerate(result):
            rows[:, number * width : (number + 1) * width] = part.astype(ref.dtype)
        copy_rows(shape, ref, token, head, low, high, group, rows)

    def write_lse(self, segment, lse: jax.Array) -> None:
        """See `Computing`."""
        self.refs.lse[segment] = lse


def _weighed(
    shape: Shape, piece: Piece, first, qk: jax.Array, scale, state: State, masked: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A step of the online softmax (Milakov and Gimelshein, 2018).

    Args:
      first: key with which the tile begins.
      qk: products, `[ROWS, block_k]`.

    Returns:
      The new maximum of each row, by what it shrinks what there was, the new totals, and the weights of the keys.
    """
    if shape.narrow:
        qk = _add_eights(shape, qk)
    qk = _times(qk, scale)
    if shape.soft_cap is not None:
        qk = jnp.tanh(qk) * (shape.soft_cap * LOG2_E)
    if masked:
        qk = jnp.where(visible(shape, piece, first, qk.shape, 1), qk, -jnp.inf)
    if shape.together > 1:
        qk = jnp.where(_own_head(shape), qk, -jnp.inf)
    if shape.narrow:
        qk = repeat_eights(qk, interpreted=shape.interpreted)
    maximum = jnp.maximum(state.maximum, qk.max(axis=1))
    base = maximum
    if not shape.all_see_keys:
        base = jnp.where(maximum == -jnp.inf, jnp.zeros_like(maximum), maximum)
    shrink = jnp.exp2(state.maximum - base)
    weights = jnp.exp2(qk - lax.broadcast_in_dim(base, qk.shape, [0]))
    sums = sums_of_columns(weights, interpreted=shape.interpreted)
    total = state.total * lax.broadcast_in_dim(shrink, state.total.shape, [0]) + sums
    if shape.narrow:
        weights = zero_second_eights(weights, interpreted=shape.interpreted)
    return maximum, shrink, total, weights


def _times(array: jax.Array, factor: Any) -> jax.Array:
    """By a number, or by one for each row."""
    return array * (lax.broadcast_in_dim(factor, array.shape, [0]) if jnp.ndim(factor) else factor)


def _of_rows(shape: Shape, scales, first) -> jax.Array:
    """The scale of each row's KV head: `[ROWS]`, or one number; `first` is where that of the first head of a set is."""
    if shape.together == 1:
        return scales[first]
    layout = plgpu.Layout.WGMMA.reduce(1)
    head = lax.div(lax.rem(shape.row_of(iota((ROWS,), 0, layout)), shape.set_heads), shape.group)
    found = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout)
    for number in range(shape.together):
        found = jnp.where(head == number, scales[first + number], found)
    return found


def _add_eights(shape: Shape, qk: jax.Array) -> jax.Array:
    """The products of whole queries, from those of their two parts."""
    if not shape.interpreted:
        return add_eights(qk, 1 / float8_queries.LOST)
    eights = qk.reshape(-1, 2, BOX, qk.shape[1])
    whole = eights[:, :1] + eights[:, 1:] / float8_queries.LOST
    return jnp.concatenate([whole, whole], axis=1).reshape(qk.shape)


def _shrunk(shape: Shape, shrink: jax.Array, acc: jax.Array) -> jax.Array:
    """By a factor for each row that holds something."""
    shrunk = _times(acc, shrink)
    return second_eights_of(shrunk, acc, interpreted=shape.interpreted) if shape.narrow else shrunk


def _own_head(shape: Shape) -> jax.Array:
    """bool `[ROWS, block_k]`: whether a column of a tile is of the KV head that a row belongs to."""
    sizes = (ROWS, shape.tiling.block_k)
    head = lax.div(lax.rem(shape.row_of(iota(sizes, 0)), shape.set_heads), shape.group)
    return lax.rem(iota(sizes, 1), shape.together) == head
