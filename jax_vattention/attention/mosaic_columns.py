"""Decode attention with queries as the columns of products: Hopper GPUs.

The rows of a `wgmma` are 64, its columns as many as one likes, in eights. As the query heads of a KV head are few, most
rows would be idle (see `mosaic_rows`), in the softmax too. Here rows are keys and then dimensions of V, all of them in
use: an eighth of the products, and an eighth of the softmax. But a query's scores are in all warps, so its maximum goes
through shared memory, and so do the weights, to where the second product reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.mlir.dialects import arith
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import float8_queries, mosaic_transposed
from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece
from jax_vattention.attention.mosaic_compute import (
    Computing,
    Parts,
    State,
    Tile,
    clear_unseen,
    copy_rows,
    wait,
    wgmmas,
)
from jax_vattention.attention.mosaic_transposed import OF_COLUMNS, WARPS
from jax_vattention.attention.mosaic_view import ROWS, swizzled

_WGMMA = plgpu.Layout.WGMMA


def scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Shared memory that it needs besides, for each stream; `dtype` is that of the weights."""
    streams = shape.tiling.streams
    dtype = jnp.float16 if shape.quantized else dtype
    return {
        "weights": swizzled((streams, shape.rows, shape.tiling.block_k), dtype),
        "partial": plgpu.SMEM((streams, WARPS, shape.rows), jnp.float32),
        **({"factors": plgpu.SMEM((streams, shape.product_rows), jnp.float32)} if shape.quantized else {}),
    }


class Columns(Computing):
    """See `Computing`. Scores are `[block_k, queries]`, results `[head_dim, queries]`."""

    queries_axis = 1

    def __init__(self, shape: Shape, local, work, refs, *, weights, partial, factors=None, **memory) -> None:
        super().__init__(shape, local, work, refs, **memory)
        self.weights, self.partial = weights.at[local], partial.at[local]
        self.factors: Any = None if factors is None else factors.at[local]

    def prepare(self) -> None:
        """Nothing: there are no columns but those of the query tile, all of which is copied."""

    def begin(self, piece: Piece, k_scale) -> tuple[Any, Any]:
        """See `Computing`."""
        shape = self.shape
        q, scale = super().begin(piece, k_scale)
        if not shape.quantized:
            return q, scale
        float8_queries.split_eights(q, self.query_parts, self.factors, interpreted=shape.interpreted)
        factors = plgpu.load(self.factors, layout=OF_COLUMNS)  # type: ignore[call-arg]  # jax 0.10
        return self.query_parts, factors * scale

    def nothing(self, tiles) -> State:
        """See `Computing`."""
        queries, head_dim = self.shape.rows, self.shape.head_dim
        rows = ROWS if self.shape.quantized else head_dim
        return State(
            tiles,
            plgpu.layout_cast(jnp.full((queries,), -jnp.inf, jnp.float32), OF_COLUMNS),
            plgpu.layout_cast(jnp.zeros((ROWS, queries), jnp.float32), _WGMMA),
            tuple(plgpu.layout_cast(jnp.zeros((rows, queries), jnp.float32), _WGMMA) for _ in range(0, head_dim, rows)),
        )

    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool, half: bool = False) -> State:
        """See `Computing`."""
        shape, at, right = self.shape, self.place(piece, whole, tile, state), self.weights
        if half:
            first = pl.ds(0, shape.tiling.block_k // 2)
            at, right = at._replace(k=at.k.at[first], v=at.v.at[first]), right.at[:, first]
        wait(*self.k_ready, at.barrier, at.is_tail, masked)
        values = functools.partial(self._values, piece, at, masked)
        # There are registers for V of float8 as soon as it is there, and so it is widened while scores are computed.
        meanwhile = values if shape.quantized else lambda: None
        (scores,), v = wgmmas((at.k,), q.transpose((1, 0)), meanwhile=meanwhile, interpreted=shape.interpreted)
        plgpu.barrier_arrive(self.k_free.at[at.barrier])
        maximum, shrink, total, weights = self.weigh(piece, at.first, self._scaled(scores, scale), state, masked=masked)
        weights = weights.astype(self.weights.dtype)
        mosaic_transposed.store_transposed(weights, self.weights, interpreted=shape.interpreted)
        plgpu.commit_smem()  # where all warps meet, too: they are done with what they have read
        if shape.quantized:
            plgpu.barrier_arrive(self.v_free.at[at.barrier])
        begin = tuple(self.times(part, shrink) for part in state.acc)
        lefts = v if shape.quantized else values()
        acc, _ = wgmmas(lefts, right.transpose((1, 0)), begin=begin, interpreted=shape.interpreted)
        if not shape.quantized:
            plgpu.barrier_arrive(self.v_free.at[at.barrier])
        return State(state.tiles + 1, maximum, total, acc)

    def _values(self, piece: Piece, at: Tile, masked: bool) -> tuple[Any, ...]:
        """V as left operands: in shared memory, or of float8 in registers."""
        shape = self.shape
        wait(*self.v_ready, at.barrier, at.is_tail, masked)
        if not shape.quantized:
            if masked:
                clear_unseen(shape, at.v, piece, at.first)
            return (at.v.transpose((1, 0)),)
        first = piece.of.lower - at.first if masked and shape.window is not None else None
        end = piece.end - at.first if masked else None
        return mosaic_transposed.widened(at.v, first, end, interpreted=shape.interpreted)

    def _scaled(self, scores: jax.Array, scale) -> jax.Array:
        scores = self.times(scores, scale)
        if not self.shape.quantized:
            return scores
        # Of each query there are two numbers.
        lost = 1 / float8_queries.LOST
        return mosaic_transposed.add_second_eights(scores, lost, interpreted=self.shape.interpreted)

    def largest(self, maximum: jax.Array, scores: jax.Array) -> jax.Array:
        """See `Computing`."""
        return self._across(arith.maximumf, jnp.max, maximum, scores)

    def sums(self, weights: jax.Array) -> jax.Array:
        """See `Computing`."""
        return mosaic_transposed.sums_of_rows(weights, interpreted=self.shape.interpreted)

    def total(self, state: State) -> jax.Array:
        """See `Computing`."""
        nothing = plgpu.layout_cast(jnp.zeros(state.maximum.shape, jnp.float32), OF_COLUMNS)
        total = self._across(arith.addf, jnp.sum, nothing, state.total)
        plgpu.commit_smem()  # before the next piece writes what was read here
        return total

    def _across(self, combine: Callable[..., Any], of_jax: Callable[..., Any], begin: jax.Array, array: jax.Array):
        """See `mosaic_transposed.across`; `of_jax` combines the rows of an array."""
        if self.shape.interpreted:
            return of_jax(jnp.concatenate([begin[None], array]), axis=0)
        return mosaic_transposed.across(combine, begin, array, self.partial)

    def write(self, result: Parts, ref, token, head, low, high, group: int, rows) -> None:
        """See `Computing`."""
        if self.shape.interpreted:
            whole = jnp.concatenate(result)
            rows[: whole.shape[1], :] = whole.T.astype(ref.dtype)
            copy_rows(self.shape, ref, token, head, low, high, group, rows)
            return
        result = tuple(part.astype(ref.dtype) for part in result)
        mosaic_transposed.store_columns(result, ref, token, head, low, high, group=group, in_fours=self.shape.quantized)

    def write_lse(self, segment, lse: jax.Array) -> None:
        """See `Computing`."""
        if self.shape.interpreted:
            self.refs.lse[segment, pl.ds(0, self.shape.rows)] = lse
            return
        mosaic_transposed.store_line(lse, self.refs.lse, segment)
