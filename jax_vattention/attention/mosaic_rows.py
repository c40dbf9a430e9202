"""Decode attention with queries as the rows of products: Hopper and Blackwell GPUs.

The query heads that share a KV head are rows of one product with a tile of K, and their weights rows of one with a tile
of V. How it is multiplied is the one thing that Blackwell does in another way: see `Products`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import float8_queries
from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece, Work
from jax_vattention.attention.mosaic_compute import (
    Computing,
    Parts,
    Refs,
    State,
    clear_unseen,
    copy_rows,
    inside,
    iota,
    wait,
    wgmmas,
    widen_tile,
)
from jax_vattention.attention.mosaic_products import sums_of_columns
from jax_vattention.attention.mosaic_view import (
    BOX,
    ROWS,
    add_eights,
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

    @staticmethod
    def together(shape: Shape) -> tuple[int | None, int | None]:
        """Of K and V as they are copied; see `swizzled`."""
        del shape
        return None, None

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
        """All."""
        return shape.head_dim

    def scores(self, q, k, meanwhile: Callable[[], None]) -> jax.Array:
        """See `Products`."""
        (scores,), _ = wgmmas((q,), k.transpose((1, 0)), meanwhile=meanwhile, interpreted=self._interpreted)
        return scores

    def add(self, acc: Parts, shrunk: Callable[[jax.Array], jax.Array], weights: jax.Array, v) -> Parts:
        """See `Products`."""
        acc, _ = wgmmas((weights,), v, begin=tuple(map(shrunk, acc)), interpreted=self._interpreted)
        return acc


class Rows(Computing):
    """See `Computing`."""

    queries_axis = 0

    def __init__(
        self, shape: Shape, local, work: Work, products: type[Products], refs: Refs, *, k_wide=None, v_wide=None,
        **memory,
    ):  # fmt: skip
        def own(array):
            return None if array is None else array.at[local]

        super().__init__(shape, local, work, refs, **memory)
        self.products, self.width = products(shape, local, **memory), products.width(shape)
        self.k_wide, self.v_wide = own(k_wide), own(v_wide)

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

    def scale_from(self, first) -> Any:
        """See `Computing`."""
        shape = self.shape
        if shape.together == 1:
            return super().scale_from(first)
        layout = plgpu.Layout.WGMMA.reduce(1)
        head = lax.div(lax.rem(shape.row_of(iota((ROWS,), 0, layout)), shape.set_heads), shape.group)
        found = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout)
        for number in range(shape.together):
            found = jnp.where(head == number, self.refs.scales[first + number], found)
        return found

    def begin(self, piece: Piece, k_scale) -> tuple[Any, Any]:
        """See `Computing`."""
        shape = self.shape
        q, scale = super().begin(piece, k_scale)
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

    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool, half: bool = False) -> State:
        """See `Computing`."""
        shape = self.shape
        if shape.narrow:
            # The second eights of rows hold nothing. What is the same as in the first ones is computed once.
            again = functools.partial(repeat_eights, interpreted=shape.interpreted)
            state = state._replace(maximum=again(state.maximum), total=again(state.total))
        at = self.place(piece, whole, tile, state)
        barrier, k, v = at.barrier, at.k, at.v
        wait(*self.k_ready, barrier, at.is_tail, masked)
        if self.k_wide is not None:
            widen_tile(k, self.k_wide)
            plgpu.barrier_arrive(self.k_free.at[barrier])
            k = self.k_wide
        if self.v_wide is not None:
            v = self.v_wide

        def meanwhile():
            if self.v_wide is not None:
                wait(*self.v_ready, barrier, at.is_tail, masked)
                widen_tile(at.v, self.v_wide, functools.partial(inside, shape, piece, at.first) if masked else None)
                plgpu.barrier_arrive(self.v_free.at[barrier])

        scores = self.products.scores(q, k, meanwhile)
        if self.k_wide is None:
            plgpu.barrier_arrive(self.k_free.at[barrier])
        scores = self.times(_add_eights(shape, scores) if shape.narrow else scores, scale)
        maximum, shrink, total, weights = self.weigh(piece, at.first, scores, state, masked=masked)
        if shape.narrow:
            weights = zero_second_eights(weights, interpreted=shape.interpreted)
        weights = weights.astype(v.dtype)
        if self.v_wide is None:
            wait(*self.v_ready, barrier, at.is_tail, masked)
            if masked:
                clear_unseen(shape, v, piece, at.first)
        acc = self.products.add(state.acc, functools.partial(self._shrunk, shrink), weights, v)
        if self.v_wide is None:
            plgpu.barrier_arrive(self.v_free.at[barrier])
        return State(state.tiles + 1, maximum, total, acc)

    def _shrunk(self, shrink: jax.Array, acc: jax.Array) -> jax.Array:
        """By a factor for each row that holds something."""
        shrunk = self.times(acc, shrink)
        return second_eights_of(shrunk, acc, interpreted=self.shape.interpreted) if self.shape.narrow else shrunk

    def own(self, scores: jax.Array) -> jax.Array:
        """See `Computing`."""
        shape = self.shape
        if shape.together > 1:
            scores = jnp.where(_own_head(shape), scores, -jnp.inf)
        return repeat_eights(scores, interpreted=shape.interpreted) if shape.narrow else scores

    def largest(self, maximum: jax.Array, scores: jax.Array) -> jax.Array:
        """See `Computing`."""
        return jnp.maximum(maximum, scores.max(axis=1))

    def sums(self, weights: jax.Array) -> jax.Array:
        """See `Computing`."""
        return sums_of_columns(weights, interpreted=self.shape.interpreted)

    def total(self, state: State) -> jax.Array:
        """See `Computing`."""
        return state.total.sum(axis=1)

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


def _add_eights(shape: Shape, qk: jax.Array) -> jax.Array:
    """The products of whole queries, from those of their two parts."""
    if not shape.interpreted:
        return add_eights(qk, 1 / float8_queries.LOST)
    eights = qk.reshape(-1, 2, BOX, qk.shape[1])
    whole = eights[:, :1] + eights[:, 1:] / float8_queries.LOST
    return jnp.concatenate([whole, whole], axis=1).reshape(qk.shape)


def _own_head(shape: Shape) -> jax.Array:
    """bool `[ROWS, block_k]`: whether a column of a tile is of the KV head that a row belongs to."""
    sizes = (ROWS, shape.tiling.block_k)
    head = lax.div(lax.rem(shape.row_of(iota(sizes, 0)), shape.set_heads), shape.group)
    return lax.rem(iota(sizes, 1), shape.together) == head
