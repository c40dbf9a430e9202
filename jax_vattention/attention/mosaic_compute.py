"""What the warpgroups of decode kernels that compute have in common: Hopper and Blackwell GPUs.

A stream goes through its pieces tile by tile, with the next queries already on their way. Queries may be the rows of
its products (`mosaic_rows`) or their columns (`mosaic_columns`): what differs is in those two.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import mosaic_join
from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece, Queries, Request, SharedPair, Work
from jax_vattention.attention.mosaic_view import BOX, ROWS, as_rows

LOG2_E = math.log2(math.e)

Parts = tuple[jax.Array, ...]
"""An array of results in parts: its rows or columns of each query."""


class Refs(NamedTuple):
    """What it reads and writes; see `mosaic_decode`."""

    q: Any
    scales: Any
    first_scale: Any
    """Where those of this layer begin in `scales`."""
    out: Any
    parts: Any
    lse: Any


class State(NamedTuple):
    """Of the softmax over the keys of a piece."""

    tiles: jax.Array
    """Of the stream, so far."""
    maximum: jax.Array
    total: jax.Array
    """Sums of what each thread has of a query: they are added up in the end only."""
    acc: Parts


class Tile(NamedTuple):
    """Of K and V, in shared memory."""

    k: Any
    """`[block_k, head_dim]`"""
    v: Any
    barrier: jax.Array
    """Which of each kind is its."""
    first: jax.Array
    """Key."""
    is_tail: Any
    """Whether it was copied in boxes."""


class Computing(abc.ABC):
    """The warpgroup that computes for the stream with this number in its block; see `mosaic_decode.scratch_types`."""

    def __init__(
        self, shape: Shape, local, work: Work, refs: Refs, *, q_smem, k_smem, v_smem, q_ready, k_ready, v_ready,
        k_tail_ready, v_tail_ready, k_free, v_free, q_parts=None, out_smem=None, part_smem=None, flags=None, **_,
    ):  # fmt: skip
        def own(array):
            return None if array is None else array.at[local]

        self.shape, self.local, self.work, self.refs = shape, local, work, refs
        self.queries, self.queries_ready, self.query_parts = own(q_smem), q_ready, own(q_parts)
        self.k, self.v = own(k_smem), own(v_smem)
        self.k_ready, self.v_ready = (k_ready, k_tail_ready), (v_ready, v_tail_ready)
        self.k_free, self.v_free = k_free, v_free
        self.out_rows, self.part_rows, self.flags = own(out_smem), own(part_smem), own(flags)

    # What differs

    queries_axis: int
    """Of scores and of results. The other one is that of keys or dimensions."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Before all pieces."""

    def scale_from(self, first) -> Any:
        """Of the heads of a set, for each query or for all; `first` is where that of the first head is."""
        return self.refs.scales[first]

    def begin(self, piece: Piece, k_scale) -> tuple[Any, Any]:
        """For a piece whose queries are there: the operand of scores, and what these are to be multiplied by."""
        shape = self.shape
        scale = shape.scale * LOG2_E if shape.soft_cap is None else shape.scale / shape.soft_cap
        return self.queries.at[lax.rem(piece.number, 2)], k_scale * scale

    @abc.abstractmethod
    def nothing(self, tiles) -> State:
        """Of no keys yet, after so many tiles of other pieces."""

    @abc.abstractmethod
    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool, half: bool = False) -> State:
        """Adds a tile of K and V, or the first half of it; the first `whole` ones of a piece were copied as a whole."""

    def own(self, scores: jax.Array) -> jax.Array:
        """Scores, without those of keys that are not of a query's head, if a tile has several."""
        return scores

    @abc.abstractmethod
    def largest(self, maximum: jax.Array, scores: jax.Array) -> jax.Array:
        """Of each query, of what it was and these."""

    @abc.abstractmethod
    def sums(self, weights: jax.Array) -> jax.Array:
        """Of what each thread has of a query."""

    @abc.abstractmethod
    def total(self, state: State) -> jax.Array:
        """Of each query."""

    @abc.abstractmethod
    def write(self, result: Parts, ref, token, head, low, high, group: int, rows) -> None:
        """Writes that of queries `low .. high - 1` to `ref`, as `mosaic_view.store_rows` says; `rows` is for the
        interpreter only."""

    @abc.abstractmethod
    def write_lse(self, segment, lse: jax.Array) -> None:
        """Writes the logarithms of a segment."""

    # What does not

    def run(self) -> None:
        """All that the stream has to do."""
        self.prepare()

        @pl.when(self.work.num_pairs > 0)
        def _():
            self._load_queries(0, self.work.first_queries)

        self.work.each_piece(self._piece, jnp.int32(0))
        if self.shape.joins:
            pl.when(self.work.num_pairs > 0)(self._join)

    def _load_queries(self, number, of: Queries) -> None:
        """For the piece of this number, of those of the stream."""
        tile = self.shape.query_tile(of.request, of.token, lax.div(of.head, self.shape.together))
        buffer, rows = lax.rem(number, 2), self.refs.q.shape[1]
        target, ready = self.queries.at[buffer], self.queries_ready.at[2 * self.local + buffer]
        if not self.shape.in_eights:
            plgpu.copy_gmem_to_smem(self.refs.q.at[tile], target.at[pl.ds(0, rows)], ready)
            return
        for row in range(0, 2 * rows, BOX):
            eight = self.refs.q.at[tile, pl.ds(row // (2 * BOX) * BOX, BOX)]
            plgpu.copy_gmem_to_smem(eight, target.at[pl.ds(row, BOX)], ready)

    def _piece(self, piece: Piece, before):
        # Ahead of its use: while memory is busy a copy takes microseconds.
        @pl.when(jnp.logical_not(piece.is_last))
        def _():
            self._load_queries(piece.number + 1, piece.next_queries)

        k_scale, v_scale = self._scales(piece)
        plgpu.barrier_wait(self.queries_ready.at[2 * self.local + lax.rem(piece.number, 2)])
        whole = piece.whole_tiles(self.shape.tile_tokens)
        tile = functools.partial(self.tile, piece, *self.begin(piece, k_scale), whole)
        state = each_tile(self.shape, piece, tile, self.nothing(before))

        total = self.total(state)
        pl.when(piece.first < piece.end)(lambda: self._store(piece, v_scale, state.maximum, total, state.acc))
        return state.tiles

    def _scales(self, piece: Piece) -> tuple[Any, Any]:
        """Of K and of V."""
        if not self.shape.quantized:
            return 1.0, 1.0
        first = self.refs.first_scale + piece.head
        return self.scale_from(first), self.scale_from(first + self.shape.num_kv_heads)

    def place(self, piece: Piece, whole, number, state: State) -> Tile:
        """Of the tile of this number, in a piece with so many whole ones."""
        shape = self.shape
        stage = lax.rem(state.tiles, shape.stages)
        k, v = (as_rows(each.at[stage]) for each in (self.k, self.v))
        first = piece.first + number * shape.tile_tokens
        return Tile(k, v, self.local * shape.stages + stage, first, number >= whole)

    def weigh(
        self, piece: Piece, first, scores: jax.Array, state: State, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A step of the online softmax (Milakov and Gimelshein, 2018).

        Args:
          first: key with which the tile begins.
          scores: what `begin` says was applied.

        Returns:
          The new maximum of each query, by what it shrinks what there was, the new totals, and the weights of the keys.
        """
        shape = self.shape
        if shape.soft_cap is not None:
            scores = jnp.tanh(scores) * (shape.soft_cap * LOG2_E)
        if masked:
            seen = visible(shape, piece, first, scores.shape, 1 - self.queries_axis)
            scores = jnp.where(seen, scores, -jnp.inf)
        scores = self.own(scores)
        maximum = self.largest(state.maximum, scores)
        base = maximum
        if not shape.all_see_keys:
            base = jnp.where(maximum == -jnp.inf, jnp.zeros_like(maximum), maximum)
        shrink = jnp.exp2(state.maximum - base)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(base, scores.shape, [self.queries_axis]))
        sums = self.sums(weights)
        return maximum, shrink, self.times(state.total, shrink) + sums, weights

    def times(self, array: jax.Array, factor: Any) -> jax.Array:
        """By a number, or by one for each query."""
        many = lax.broadcast_in_dim(factor, array.shape, [self.queries_axis]) if jnp.ndim(factor) else factor
        return array * many

    def _store(self, piece: Piece, v_scale, maximum: jax.Array, total: jax.Array, acc: Parts) -> None:
        """Writes what was found for a piece to where it belongs."""
        shape, refs = self.shape, self.refs
        divisor = total if shape.all_see_keys else jnp.where(total == 0, jnp.ones_like(total), total)
        factor = 1 / divisor * v_scale
        result = tuple(self.times(part, factor) for part in acc)
        is_final = piece.is_whole if shape.direct else False

        @pl.when(is_final)
        def _():
            low = shape.first_row(piece.head, 0)
            high = low + piece.of.queries * shape.set_heads
            at = piece.of.out, piece.head * shape.group
            self.write(result, refs.out, *at, low, high, shape.set_heads, self.out_rows)

        @pl.when(jnp.logical_not(is_final))
        def _():
            segment = piece.pair + self.work.stream
            self.write(result, refs.parts, segment, 0, 0, shape.rows, shape.rows, self.part_rows)
            self.write_lse(segment, maximum + jnp.log2(total))

    def _join(self) -> None:
        """What this stream, as the last of some, and others have found for a pair."""
        pairs = self.work.shared_pairs

        @pl.when((pairs[0].streams > 1) | (pairs[1].streams > 1))
        def _():
            # Read while what was written is waited for.
            joins = [self._join_of(pair) for pair in pairs]
            for join, is_last in zip(joins, mosaic_join.arrive(self.work.streams, self.flags, pairs), strict=True):
                pl.when(is_last != 0)(join)

    def _join_of(self, pair: SharedPair) -> Callable[[], None]:
        refs, group = self.refs, self.shape.group
        head, request = self.work.set_and_request(pair.pair)  # a set is one head
        of = Request.read(self.work.requests, request)
        return functools.partial(
            mosaic_join.join, refs.parts, refs.lse, refs.out, segment=pair.pair + pair.first, count=pair.streams,
            low=self.shape.first_row(head, 0), rows=of.queries * group, token=of.out, head=head * group, group=group,
            first_eights=self.shape.in_eights,
        )  # fmt: skip


def wgmmas(
    lefts: tuple[Any, ...],
    right,
    *,
    begin: Parts = (),
    meanwhile: Callable[[], Any] = lambda: None,
    interpreted: bool,
) -> tuple[Parts, Any]:
    """`left @ right` of each, float32, in sum with what it begins with, if anything; and what `meanwhile` gives, which
    is called while they are computed."""

    def multiply(*sums):
        if not interpreted:  # which has no accumulators that begin with a value
            for ref, part in zip(sums, begin, strict=bool(begin)):
                ref[...] = part
        for ref, left in zip(sums, lefts, strict=True):
            plgpu.wgmma(ref, left, right)
        found = meanwhile()
        parts = tuple(ref[...] for ref in sums)
        if interpreted and begin:
            parts = tuple(one + other for one, other in zip(parts, begin, strict=True))
        return parts, found

    return pl.run_scoped(multiply, *(plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32) for left in lefts))


def copy_rows(shape: Shape, ref, token, head, low, high, group: int, rows) -> None:
    """Writes rows of shared memory, as `mosaic_view.store_rows` does those of registers, in the interpreter."""
    plgpu.commit_smem()

    def row(i, _):
        plgpu.copy_smem_to_gmem(
            rows.at[shape.product_row(low + i)], ref.at[token + lax.div(i, group), head + lax.rem(i, group)]
        )

    lax.fori_loop(0, high - low, row, None)
    plgpu.wait_smem_to_gmem(0)


def wait(ready, tail_ready, barrier, is_tail, masked: bool) -> None:
    """Until a tile is there, whole or in boxes; one that is in boxes is always masked."""
    if not masked:
        plgpu.barrier_wait(ready.at[barrier])
        return

    @pl.when(is_tail)
    def _():
        plgpu.barrier_wait(tail_ready.at[barrier])

    @pl.when(jnp.logical_not(is_tail))
    def _():
        plgpu.barrier_wait(ready.at[barrier])


def each_tile(shape: Shape, piece: Piece, tile: Callable[..., Any], state: Any) -> Any:
    """`state = tile(number, state, masked=...)` for every tile of a piece, with `half` for a last one of few keys."""
    masked_before, plain_end, tiles = _tile_kinds(shape, piece)
    masked, plain = functools.partial(tile, masked=True), functools.partial(tile, masked=False)
    if shape.window is not None:
        state = lax.fori_loop(0, masked_before, masked, state)
    state = lax.fori_loop(masked_before, plain_end, plain, state)
    if not shape.halves:
        return lax.fori_loop(plain_end, tiles, masked, state)
    tokens = shape.tile_tokens
    in_last = piece.end - piece.first - (tiles - 1) * tokens
    full = jnp.maximum(plain_end, tiles - (in_last <= tokens // 2).astype(jnp.int32))
    state = lax.fori_loop(plain_end, full, masked, state)
    return lax.fori_loop(full, tiles, functools.partial(tile, masked=True, half=True), state)


def _tile_kinds(shape: Shape, piece: Piece) -> tuple[Any, jax.Array, jax.Array]:
    """Tiles `0 .. a - 1` need a mask, as `b .. c - 1` do; the ones between do not. Returns `(a, b, c)`."""
    tokens = shape.tile_tokens
    tiles, whole = piece.tiles(tokens), piece.whole_tiles(tokens)
    before: Any = 0
    if shape.window is not None:
        all_from = piece.of.length - shape.window  # the first key that the last query sees
        before = jnp.clip(lax.div(all_from - piece.first + tokens - 1, tokens), 0, tiles)
        before = jnp.where(piece.of.lower > piece.first, jnp.maximum(before, jnp.minimum(1, tiles)), before)
    if shape.one_limit:
        return before, jnp.maximum(whole, before), tiles
    all_until = jnp.maximum(piece.of.length - piece.of.queries + 1, piece.of.prefix)
    plain_end = lax.div(jnp.maximum(jnp.minimum(all_until, piece.end) - piece.first, 0), tokens)
    return before, jnp.maximum(plain_end, before), tiles


def visible(shape: Shape, piece: Piece, first, sizes: tuple[int, ...], keys_axis: int) -> jax.Array:
    """bool: which keys of the tile that begins with key `first` each row of a product sees, of its head.

    Args:
      sizes: those of scores, whose axis of this number is that of keys, the other one that of product rows.
    """
    keys = first + lax.div(iota(sizes, keys_axis), shape.together)
    seen = keys < piece.end
    if shape.one_limit:
        return seen if shape.window is None else seen & (keys >= piece.of.lower)
    last = piece.of.length - piece.of.queries + lax.div(shape.row_of(iota(sizes, 1 - keys_axis)), shape.set_heads)
    if shape.window is not None:
        seen &= (keys > last - shape.window) & (keys >= piece.of.lower)
    if shape.prefixes:
        last = jnp.maximum(last, piece.of.prefix - 1)
    return seen & (keys <= last)


def clear_unseen(shape: Shape, v, piece: Piece, first) -> None:
    """Whatever lies around the request's tokens, NaN too, times a weight of 0 must be 0."""
    outside = jnp.logical_or(first + shape.tile_tokens > piece.end, first < piece.of.lower)

    @pl.when(outside)
    def _():
        for row in range(0, v.shape[0], ROWS):  # a thread has registers for so many
            part, layout = v.at[pl.ds(row, ROWS)], plgpu.Layout.WGMMA
            values = plgpu.load(part, layout=layout)  # type: ignore[call-arg]  # jax 0.10 has another signature
            own = inside(shape, piece, first + row // shape.together, part.shape, layout)
            part[...] = jnp.where(own, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def widen_tile(narrow, wide, own: Any = None) -> None:
    """Converts a tile in shared memory; what is not `own`, a function of shape and layout, becomes 0."""
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    values = plgpu.load(narrow, layout=layout).astype(wide.dtype)  # type: ignore[call-arg]  # as above
    if own is not None:
        values = jnp.where(own(wide.shape, layout), values, jnp.zeros_like(values))
    wide[...] = values
    # Before the copying warpgroup may overwrite what was read here, and before a product reads what was written.
    plgpu.commit_smem()


def inside(shape: Shape, piece: Piece, first, sizes: tuple[int, ...], layout: Any) -> jax.Array:
    """bool `sizes`: whether the token of a row is the request's, and not behind its window."""
    tokens = first + lax.div(iota(sizes, 0, layout), shape.together)
    return (tokens < piece.end) & (tokens >= piece.of.lower)


def iota(sizes: tuple[int, ...], axis: int, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """int32: the number of each element along an axis."""
    return plgpu.broadcasted_iota(jnp.int32, sizes, axis, layout=layout)
