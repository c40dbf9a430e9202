"""Decode attention through Pallas' Mosaic GPU backend: Hopper GPUs.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023) with the keys split evenly over the GPU (see `decode_split`), and
joined by the last of those who had keys of a pair, or by a kernel of its own (see `mosaic_join`).

A block holds streams, each a pair of warpgroups: one that copies tiles of K and V into shared memory with the tensor
memory accelerator, and one that multiplies them with the query heads that share the KV head, as rows of one `wgmma`.
How it multiplies is the one thing that other GPUs do in another way: see `Products`.

What is not mapped is never addressed: a last tile is copied in boxes of `KV_TAIL_TOKENS` tokens, up to which the
manager maps, and in the place of a box without a token of the request the first one is copied again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import decode_split, float8_queries, mosaic_copy, mosaic_join, mosaic_pace
from jax_vattention.attention.decode_shape import Shape, Tiling, default_tiling
from jax_vattention.attention.decode_split import GRAIN, Piece, Request, SharedPair, Work
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_products import sums_of_columns
from jax_vattention.attention.mosaic_view import (
    BOX,
    ROWS,
    Columns,
    add_eights,
    as_rows,
    part_of,
    pass_on,
    repeat_eights,
    second_eights_of,
    store_rows,
    swizzled,
    tokens_of,
    zero_second_eights,
)
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_LOG2_E = math.log2(math.e)
_IDLE = 1e30
"""The maximum of a row that has no query: its weights are 0."""
_REGISTERS = {(2, False): (208, 40), (1, True): (240, 96, 144), (2, True): (144, 40, 56)}
"""Of a thread of the warpgroups that multiply, copy and widen, by the streams of a block and whether V is widened by
warpgroups of its own. Where there are two warpgroups only, a thread of each has all that it can have."""

Parts = tuple[jax.Array, ...]
"""An array of `ROWS` rows in parts of `Products.width` columns each."""


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

    def __init__(self, shape: Shape, local: jax.Array) -> None:
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


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of what `mosaic_view.refusal` lets pass; None if it serves these arguments."""
    del features  # all of them
    group, head_dim = q.shape[1] // view.num_kv_heads, q.shape[2]
    slots, slot_tokens = view.k.shape[0], view.slot_tokens
    for refused, what in (
        (view.k.dtype not in (q.dtype, jnp.float8_e4m3fn), f"{q.dtype} queries of a {view.k.dtype} cache"),
        (head_dim not in (64, 96, 128, 192, 256), f"head_dim {head_dim}"),
        (group * batch.max_q_len > ROWS, f"{batch.max_q_len} queries of {group} query heads for a KV head"),
        (slots * slot_tokens // GRAIN * view.num_kv_heads >= 2**31, f"{slots} slots of {slot_tokens} tokens"),
    ):
        if refused:
            return what
    return None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    page_table: jax.Array | None = None,
    products: type[Products] = Wgmma,
    interpret: Any = False,
    interpret_tables: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`.

    Args:
      page_table: int32 `[requests, pages]`: where in its slot each `GRAIN` tokens of a request are, in as many tokens.
        Only to measure what the indirection of a paged cache costs (`benchmarks/decode.py`): ours needs none.
      products: how the GPU multiplies.
    """
    if tiling is None:
        default = default_tiling(view.head_dim, view.k.dtype, batch.num_requests * view.num_kv_heads)
        tiling = tuned(default, "mosaic_decode", view)
    shape = Shape.of(
        q, view, batch, features, scale=scale, tiling=tiling, narrow_products=products.narrow,
        paged=page_table is not None, interpret=interpret,
    )  # fmt: skip
    columns = Columns.of(view, together=shape.together, interpreted=shape.interpreted)
    split = decode_split.split(
        batch, view, features, tokens=q.shape[0], sets=shape.sets, streams=shape.streams, interpret=interpret_tables
    )
    # No float8 is widened to bfloat16; a narrow product splits its queries itself.
    queries = shape.query_tiles(q.astype(jnp.float16) if shape.quantized and not shape.narrow else q, batch)
    pages = jnp.zeros((1, 1), jnp.int32) if page_table is None else page_table
    scales = jnp.ones(1, jnp.float32) if view.scale_table is None else view.scale_table.reshape(-1)
    out_types = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, order))
    out, order, parts, lse = plgpu.kernel(
        functools.partial(_decode, shape=shape, products=products),
        out_type=(*out_types, *shape.parts(batch)),
        scratch_types=scratch_types(shape, queries.dtype, view.k.dtype, q.dtype)
        | products.scratch(shape, queries.dtype),
        grid=(shape.tiling.blocks,),
        grid_names=("block",),
        num_threads=(3 if shape.widens else 2) * shape.tiling.streams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_decode",
    )(
        queries,
        *columns,
        split.requests,
        split.streams,
        split.owners,
        pages,
        view.layer.reshape(1),
        scales,
        order,
    )
    if shape.joins:
        return out, order
    return decode_split.join(
        out, parts, lse, split, order, features, heads=view.num_kv_heads, sets=shape.sets, first_row=shape.first_row,
        product_row=shape.product_row, whole_are_there=shape.direct, interpret=interpret_tables,
    )  # fmt: skip


def scratch_types(shape: Shape, dtype: Any, kv_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory of a block, for each stream."""
    streams, stages, block_k = shape.tiling.streams, shape.stages, shape.tiling.block_k

    def tiles(*sizes: int, dtype: Any = dtype):
        return swizzled((streams, *sizes), dtype)

    def kv():
        return swizzled((streams, stages, *shape.tile), kv_dtype, rank=len(shape.tile))

    many = streams * stages
    whole = shape.copies * shape.arrivals(shape.tile_tokens // shape.copies)
    boxes = shape.tile_tokens // BOX * shape.arrivals(BOX)
    rows = (("out_smem", out_dtype), ("part_smem", jnp.float32))
    return {
        "q_smem": tiles(2, ROWS, shape.head_dim),
        **({"q_parts": tiles(ROWS, shape.head_dim, dtype=kv_dtype)} if shape.narrow else {}),
        "k_smem": kv(),
        "v_smem": kv(),
        **{name: tiles(block_k, shape.head_dim, dtype=jnp.float16) for name in shape.widened},
        **(
            {name: plgpu.SMEM((streams, ROWS, shape.head_dim), each) for name, each in rows}
            if shape.interpreted
            else {}
        ),
        "q_ready": plgpu.Barrier(num_arrivals=2 * shape.rows // BOX if shape.narrow else 1, num_barriers=2 * streams),
        "k_ready": plgpu.Barrier(num_arrivals=whole, num_barriers=many),
        "v_ready": plgpu.Barrier(num_arrivals=whole, num_barriers=many),
        "k_tail_ready": plgpu.Barrier(num_arrivals=boxes, num_barriers=many),
        "v_tail_ready": plgpu.Barrier(num_arrivals=boxes, num_barriers=many),
        "k_free": plgpu.Barrier(num_barriers=many),
        "v_free": plgpu.Barrier(num_barriers=many),
        **({name: plgpu.Barrier(num_barriers=streams) for name in ("wide_ready", "wide_free")} if shape.widens else {}),
        **({"flags": plgpu.SMEM((streams, 2), jnp.int32)} if shape.joins else {}),
    }


def _decode(
    q_ref,
    k_ref,
    v_ref,
    requests,
    streams,
    owners,
    pages,
    layer_ref,
    scales,
    order,
    out_ref,
    order_out,
    parts_ref,
    lse_ref,
    *,
    shape: Shape,
    products: type[Products],
    **scratch,
):
    """One block; `decode_split.Split` has the tables, `scratch_types` and `Products.scratch` the rest.

    Args:
      q_ref: see `Shape.query_tiles`.
      k_ref, v_ref: see `Columns`.
      scales: of each layer those of each head of K, then of V; used if they are float8.
      order: to have it makes the read come after the append that returned it.
      order_out: the same once more: it comes out when the kernel is over.
      out_ref, parts_ref, lse_ref: see `decode_split.join`.
    """
    warpgroup, block, count = lax.axis_index("warpgroup"), lax.axis_index("block"), shape.tiling.streams
    local = lax.rem(warpgroup, count)
    work = Work(requests, streams, block * count + local, shape.together)
    limited = _REGISTERS.get((count, shape.widens), ())

    @pl.when((warpgroup >= count) & (warpgroup < 2 * count))
    def _():
        if limited:
            plgpu.set_max_registers(limited[1], action="decrease")
        copy(shape, local, work, layer_ref[0] * shape.layer_stride, k_ref, v_ref, pages, **scratch)

        @pl.when(local == 0)
        def _():
            pass_on(order, order_out, block)
            if shape.joins:
                mosaic_join.fill(owners, requests, out_ref, block, shape.tiling.blocks, unowned=True)

    def widens():
        plgpu.set_max_registers(limited[2], action="decrease")
        widen(shape, local, work, **scratch)

    if shape.widens:
        pl.when(warpgroup >= 2 * count)(widens)

    @pl.when(warpgroup < count)
    def _():
        if limited:
            plgpu.set_max_registers(limited[0], action="increase")
        first_scale = 2 * shape.num_kv_heads * layer_ref[0]
        refs = Refs(q_ref, scales, first_scale, out_ref, parts_ref, lse_ref)
        multiply(shape, local, work, products, refs, scratch)


class _Progress(NamedTuple):
    """Of the warpgroup that copies: tiles, the first ones of them whose memory others can have, keys, and how many
    tiles may be under way."""

    tiles: jax.Array
    free: jax.Array
    keys: jax.Array
    depth: jax.Array


def copy(
    shape: Shape, local, work: Work, layer, k_ref, v_ref, pages, *, k_smem, v_smem, k_ready, v_ready, k_tail_ready,
    v_tail_ready, k_free, v_free, **_,
):  # fmt: skip
    """The warpgroup that copies K and V for the stream with this number in its block."""
    tokens, stages = shape.tile_tokens, shape.stages
    sides = (
        (k_ref, k_smem, k_ready, k_tail_ready, k_free),
        (v_ref, v_smem, v_ready, v_tail_ready, v_free),
    )

    def wait_until_free(free, first, end):
        def wait(tile, nothing):
            plgpu.barrier_wait(free.at[local * stages + lax.rem(tile, stages)])
            return nothing

        lax.fori_loop(first, end, wait, None)

    def place(piece: Piece, token):
        """Where in its slot a token is."""
        if not shape.paged:
            return token
        return pages[piece.request, lax.div(token, GRAIN)] * GRAIN + lax.rem(token, GRAIN)

    def piece(piece: Piece, state: _Progress):
        base, columns = piece.of.row, (layer, layer + shape.v_column)

        def tile(tile, state: _Progress, *, tail: bool):
            # With this one at most `depth` are under way. Where that has grown, there is nothing to wait for.
            end = jnp.maximum(state.tiles - state.depth + 1, state.free)
            stage = lax.rem(state.tiles, stages)
            barrier = local * stages + stage
            token = piece.first + tile * tokens
            for column, (ref, smem, ready, tail_ready, free) in zip(columns, sides, strict=True):
                smem = smem.at[local, stage]
                wait_until_free(free, state.free, end)
                size = BOX if tail else tokens // shape.copies
                for part in range(0, tokens, size):
                    begin = token + part
                    if tail:
                        begin = jnp.where(begin < piece.end, begin, token)
                    arrived = (tail_ready if tail else ready).at[barrier]
                    _copy(shape, ref, base + place(piece, begin), column, piece.head, smem, part, size, arrived)
            keys, depth = state.keys + (piece.end - token if tail else tokens), state.depth
            if shape.tiling.behind:
                depth = mosaic_pace.depth(shape, work.streams, state.keys, keys, depth)
            return _Progress(state.tiles + 1, end, keys, depth)

        whole = piece.whole_tiles(tokens)
        state = lax.fori_loop(0, whole, functools.partial(tile, tail=False), state)
        return lax.fori_loop(whole, piece.tiles(tokens), functools.partial(tile, tail=True), state)

    state = work.each_piece(piece, _Progress(*map(jnp.int32, (0, 0, 0, shape.tiling.stages))))
    if shape.tiling.behind:
        mosaic_pace.end(shape, work.streams)
    for free in (k_free, v_free):
        wait_until_free(free, state.free, state.tiles)


def widen(
    shape: Shape, local, work: Work, *, v_smem, v_wide, v_ready, v_tail_ready, v_free, wide_ready, wide_free, **_
):  # fmt: skip
    """The warpgroup that converts V for the stream with this number in its block."""

    def until_free():
        plgpu.barrier_wait(wide_free.at[local])

    def piece(piece: Piece, before):
        whole = piece.whole_tiles(shape.tile_tokens)

        def tile(tile, tiles, *, masked: bool):
            stage = lax.rem(tiles, shape.stages)
            barrier, first = local * shape.stages + stage, piece.first + tile * shape.tile_tokens
            _wait(v_ready, v_tail_ready, barrier, tile >= whole, masked)
            pl.when(tiles > 0)(until_free)
            inside = functools.partial(_inside, shape, piece, first) if masked else None
            _widen(as_rows(v_smem.at[local, stage]), v_wide.at[local], inside)
            plgpu.barrier_arrive(v_free.at[barrier])
            plgpu.barrier_arrive(wide_ready.at[local])
            return tiles + 1

        return _each_tile(shape, piece, tile, before)

    pl.when(work.each_piece(piece, jnp.int32(0)) > 0)(until_free)


def _copy(shape: Shape, ref, row, column, head, smem, part: int, size: int, ready) -> None:
    """Copies so many tokens of a set to where token `part` of a tile is."""
    # Partial results and tables stay in L2 then. Where rows are longer, and there is less to join, nothing is gained.
    policy = mosaic_copy.READ_ONCE if shape.quantized else None
    if shape.together == 1:
        tokens = tokens_of(ref, row, size, column, head, interpreted=shape.interpreted)
        smem = part_of(smem, part, size, interpreted=shape.interpreted)
        mosaic_copy.copy(tokens, smem, ready, policy=policy, interpreted=shape.interpreted)
        return
    for token in range(0, size, shape.copied_tokens):
        if shape.interpreted:
            source = ref.at[row + token, column, pl.ds(head, shape.together)]
            target = smem.at[pl.ds((part + token) * shape.together, shape.together)]
        else:
            source = ref.at[lax.div(row + token, BOX), column, :, lax.div(head, shape.together)]
            target = smem.at[pl.ds(part + token, BOX)]
        mosaic_copy.copy(source, target, ready, policy=policy, interpreted=shape.interpreted)


def multiply(shape: Shape, local, work: Work, products: type[Products], refs: Refs, scratch: dict[str, Any]) -> None:
    """The warpgroup that computes for the stream with this number in its block; see `scratch_types`."""
    _Computing(shape, local, work, products, refs, **scratch).run()


class Refs(NamedTuple):
    """What it reads and writes; see `_decode`."""

    q: Any
    scales: Any
    first_scale: Any
    """Where those of this layer begin in `scales`."""
    out: Any
    parts: Any
    lse: Any


class _State(NamedTuple):
    """Of the softmax over the keys of a piece."""

    tiles: jax.Array
    """Of the stream, so far."""
    maximum: jax.Array
    total: jax.Array
    """Sums of every eighth column: a thread adds up its own, and with others in the end only."""
    acc: Parts


class _Computing:
    """See `multiply`."""

    def __init__(
        self, shape: Shape, local, work: Work, products: type[Products], refs: Refs, *, q_smem, k_smem, v_smem, q_ready,
        k_ready, v_ready, k_tail_ready, v_tail_ready, k_free, v_free, q_parts=None, k_wide=None, v_wide=None,
        out_smem=None, part_smem=None, flags=None, wide_ready=None, wide_free=None, **memory,
    ):  # fmt: skip
        def own(array):
            return None if array is None else array.at[local]

        self.shape, self.local, self.work, self.refs = shape, local, work, refs
        self.products, self.width = products(shape, local, **memory), products.width(shape)
        self.queries, self.queries_ready = own(q_smem), q_ready
        self.query_parts, self.k_wide, self.v_wide = own(q_parts), own(k_wide), own(v_wide)
        self.k, self.v = own(k_smem), own(v_smem)
        self.k_ready, self.v_ready = (k_ready, k_tail_ready), (v_ready, v_tail_ready)
        self.k_free, self.v_free = k_free, v_free
        self.out_rows, self.part_rows, self.flags = own(out_smem), own(part_smem), own(flags)
        self.wide_ready, self.wide_free = own(wide_ready), own(wide_free)

    def run(self) -> None:
        """All that the stream has to do."""
        self._clear_idle_rows()

        @pl.when(self.work.num_pairs > 0)
        def _():
            self._load_queries(0, *self.work.first_queries)

        self.work.each_piece(self._piece, jnp.int32(0))
        if self.shape.joins:
            pl.when(self.work.num_pairs > 0)(self._join)

    def _clear_idle_rows(self) -> None:
        """A product has more rows than there are queries. Of zeros it takes less power than of what was there before.

        A GPU that reads memory at full speed may be at its power limit, and then its clocks pay.
        """
        if self.shape.product_rows == ROWS:
            return
        for buffer in range(2):
            nothing = jnp.zeros((ROWS, self.shape.head_dim), self.queries.dtype)
            self.queries[buffer] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
        plgpu.commit_smem()

    def _load_queries(self, number, request, token, head) -> None:
        """For the piece of this number, of those of the stream."""
        tile = self.shape.query_tile(request, token, lax.div(head, self.shape.together))
        buffer, rows = lax.rem(number, 2), self.refs.q.shape[1]
        target, ready = self.queries.at[buffer], self.queries_ready.at[2 * self.local + buffer]
        if self.query_parts is None:
            plgpu.copy_gmem_to_smem(self.refs.q.at[tile], target.at[pl.ds(0, rows)], ready)
            return
        for row in range(0, 2 * rows, BOX):
            eight = self.refs.q.at[tile, pl.ds(row // (2 * BOX) * BOX, BOX)]
            plgpu.copy_gmem_to_smem(eight, target.at[pl.ds(row, BOX)], ready)

    def _piece(self, piece: Piece, before):
        # Ahead of its use: while memory is busy a copy takes microseconds.
        @pl.when(piece.number + 1 < self.work.num_pairs)
        def _():
            self._load_queries(piece.number + 1, *self.work.queries_after(piece))

        tile = functools.partial(self._tile, piece, *self._begin(piece))
        state = _each_tile(self.shape, piece, tile, self._nothing(before))

        total = state.total.sum(axis=1)
        pl.when(piece.first < piece.end)(lambda: self._store(piece, state.maximum, total, state.acc))
        return state.tiles

    def _begin(self, piece: Piece) -> tuple[Any, Any, jax.Array]:
        """The left operand of scores, what they are to be multiplied by, and how many tiles of the piece are whole."""
        shape = self.shape
        buffer = lax.rem(piece.number, 2)
        q = self.queries.at[buffer]
        plgpu.barrier_wait(self.queries_ready.at[2 * self.local + buffer])
        whole = piece.whole_tiles(shape.tile_tokens)
        scale: Any = shape.scale * _LOG2_E if shape.soft_cap is None else shape.scale / shape.soft_cap
        if shape.quantized:
            scale = scale * _of_rows(shape, self.refs.scales, self.refs.first_scale + piece.head)
        if self.query_parts is not None:
            scale = scale * float8_queries.split(q, self.query_parts, interpreted=shape.interpreted)
            q = self.query_parts
        return q, scale, whole

    def _nothing(self, tiles) -> _State:
        """Of no keys yet, after so many tiles of other pieces."""
        whole, width = plgpu.Layout.WGMMA, self.width
        maximum = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), whole.reduce(1))
        if self.shape.product_rows < ROWS:
            idle = _iota((ROWS,), 0, whole.reduce(1)) >= self.shape.product_rows
            maximum = jnp.where(idle, jnp.full_like(maximum, _IDLE), maximum)
        return _State(
            tiles,
            maximum,
            plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), whole),
            tuple(
                plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), whole)
                for _ in range(0, self.shape.head_dim, width)
            ),
        )

    def _tile(self, piece: Piece, q, scale, whole, tile, state: _State, *, masked: bool) -> _State:
        """Adds a tile of K and V."""
        shape = self.shape
        if shape.narrow:
            # The second eights of rows hold nothing. What is the same as in the first ones is computed once.
            again = functools.partial(repeat_eights, interpreted=shape.interpreted)
            state = state._replace(maximum=again(state.maximum), total=again(state.total))
        stage = lax.rem(state.tiles, shape.stages)
        barrier = self.local * shape.stages + stage
        k, v = (as_rows(each.at[stage]) for each in (self.k, self.v))
        first = piece.first + tile * shape.tile_tokens
        _wait(*self.k_ready, barrier, tile >= whole, masked)
        if self.k_wide is not None:
            _widen(k, self.k_wide)
            plgpu.barrier_arrive(self.k_free.at[barrier])
            k = self.k_wide

        def meanwhile():
            if self.v_wide is not None and not shape.widens:
                _wait(*self.v_ready, barrier, tile >= whole, masked)
                _widen(v, self.v_wide, functools.partial(_inside, shape, piece, first) if masked else None)
                plgpu.barrier_arrive(self.v_free.at[barrier])

        qk = self.products.scores(q, k, meanwhile)
        if self.k_wide is None:
            plgpu.barrier_arrive(self.k_free.at[barrier])
        maximum, shrink, total, weights = _weighed(shape, piece, first, qk, scale, state, masked)
        weights = weights.astype(v.dtype if self.v_wide is None else self.v_wide.dtype)
        if self.v_wide is None:
            _wait(*self.v_ready, barrier, tile >= whole, masked)
            if masked:
                _clear_unseen(shape, v, piece, first)
        if shape.widens:
            plgpu.barrier_wait(self.wide_ready)
        shrunk = functools.partial(_shrunk, shape, shrink)
        acc = self.products.add(state.acc, shrunk, weights, v if self.v_wide is None else self.v_wide)
        if self.v_wide is None:
            plgpu.barrier_arrive(self.v_free.at[barrier])
        if shape.widens:
            plgpu.barrier_arrive(self.wide_free)
        return _State(state.tiles + 1, maximum, total, acc)

    def _store(self, piece: Piece, maximum: jax.Array, total: jax.Array, acc: Parts) -> None:
        """Writes what was found for a piece to where it belongs."""
        shape, refs = self.shape, self.refs
        divisor = total if shape.all_see_keys else jnp.where(total == 0, jnp.ones_like(total), total)
        factor = 1 / divisor
        if shape.quantized:
            factor *= _of_rows(shape, refs.scales, refs.first_scale + shape.num_kv_heads + piece.head)
        result = tuple(_times(part, factor) for part in acc)
        is_final = piece.is_whole if shape.direct else False

        @pl.when(is_final)
        def _():
            low = shape.first_row(piece.head, 0)
            high = low + piece.of.queries * shape.set_heads
            at = piece.of.out, piece.head * shape.group
            _store(result, shape, refs.out, *at, low, high, shape.set_heads, self.out_rows)

        @pl.when(jnp.logical_not(is_final))
        def _():
            segment = piece.pair + self.work.stream
            _store(result, shape, refs.parts, segment, 0, 0, shape.rows, shape.rows, self.part_rows)
            refs.lse[segment] = maximum + jnp.log2(total)

    def _join(self) -> None:
        """What this stream, as the last of some, and others have found for a pair."""
        pairs = self.work.shared_pairs

        @pl.when((pairs[0].streams > 1) | (pairs[1].streams > 1))
        def _():
            for pair, is_last in zip(pairs, mosaic_join.arrive(self.work.streams, self.flags, pairs), strict=True):
                pl.when(is_last != 0)(functools.partial(self._join_pair, pair))

    def _join_pair(self, pair: SharedPair) -> None:
        refs, group = self.refs, self.shape.group
        head, request = self.work.set_and_request(pair.pair)  # a set is one head
        of = Request.read(self.work.requests, request)
        mosaic_join.join(
            refs.parts, refs.lse, refs.out, segment=pair.pair + pair.first, count=pair.streams,
            low=self.shape.first_row(head, 0), rows=of.queries * group, token=of.out, head=head * group, group=group,
            first_eights=self.shape.narrow,
        )  # fmt: skip


def _weighed(
    shape: Shape, piece: Piece, first, qk: jax.Array, scale, state: _State, masked: bool
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
        qk = jnp.tanh(qk) * (shape.soft_cap * _LOG2_E)
    if masked:
        qk = jnp.where(_visible(shape, piece, first), qk, -jnp.inf)
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


def _store(result: Parts, shape: Shape, ref, token, head, low, high, group: int, rows) -> None:
    """Writes rows `low .. high - 1` of a result to `ref`, as `store_rows` says; `rows` is for the interpreter only."""
    width = result[0].shape[1]
    if not shape.interpreted:
        for number, part in enumerate(result):
            part = part.astype(ref.dtype)
            store_rows(
                part, ref, token, head, low, high, group=group, first_column=number * width, first_eights=shape.narrow
            )
        return
    for number, part in enumerate(result):
        rows[:, number * width : (number + 1) * width] = part.astype(ref.dtype)
    plgpu.commit_smem()

    def row(i, _):
        plgpu.copy_smem_to_gmem(
            rows.at[shape.product_row(low + i)], ref.at[token + lax.div(i, group), head + lax.rem(i, group)]
        )

    lax.fori_loop(0, high - low, row, None)
    plgpu.wait_smem_to_gmem(0)


def _times(array: jax.Array, factor: Any) -> jax.Array:
    """By a number, or by one for each row."""
    return array * (lax.broadcast_in_dim(factor, array.shape, [0]) if jnp.ndim(factor) else factor)


def _of_rows(shape: Shape, scales, first) -> jax.Array:
    """The scale of each row's KV head: `[ROWS]`, or one number; `first` is where that of the first head of a set is."""
    if shape.together == 1:
        return scales[first]
    layout = plgpu.Layout.WGMMA.reduce(1)
    head = lax.div(lax.rem(shape.row_of(_iota((ROWS,), 0, layout)), shape.set_heads), shape.group)
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
    head = lax.div(lax.rem(shape.row_of(_iota(sizes, 0)), shape.set_heads), shape.group)
    return lax.rem(_iota(sizes, 1), shape.together) == head


def _wait(ready, tail_ready, barrier, is_tail, masked: bool) -> None:
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


def _each_tile(shape: Shape, piece: Piece, tile: Callable[..., Any], state: Any) -> Any:
    """`state = tile(number, state, masked=...)` for every tile of a piece."""
    masked_before, plain_end, tiles = _tile_kinds(shape, piece)
    masked, plain = functools.partial(tile, masked=True), functools.partial(tile, masked=False)
    if shape.window is not None:
        state = lax.fori_loop(0, masked_before, masked, state)
    state = lax.fori_loop(masked_before, plain_end, plain, state)
    return lax.fori_loop(plain_end, tiles, masked, state)


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


def _visible(shape: Shape, piece: Piece, first) -> jax.Array:
    """bool `[ROWS, block_k]`: which keys of the tile that begins with key `first` each row sees, of its head."""
    sizes = (ROWS, shape.tiling.block_k)
    keys = first + lax.div(_iota(sizes, 1), shape.together)
    seen = keys < piece.end
    if shape.one_limit:
        return seen if shape.window is None else seen & (keys >= piece.of.lower)
    last = piece.of.length - piece.of.queries + lax.div(shape.row_of(_iota(sizes, 0)), shape.set_heads)
    if shape.window is not None:
        seen &= (keys > last - shape.window) & (keys >= piece.of.lower)
    if shape.prefixes:
        last = jnp.maximum(last, piece.of.prefix - 1)
    return seen & (keys <= last)


def _clear_unseen(shape: Shape, v, piece: Piece, first) -> None:
    """Whatever lies around the request's tokens, NaN too, times a weight of 0 must be 0."""
    # In a piece that ends within the request all boxes are of its tokens.
    outside = jnp.logical_or(
        jnp.logical_and(first + shape.tile_tokens > piece.end, lax.rem(piece.end, BOX) != 0), first < piece.of.lower
    )

    @pl.when(outside)
    def _():
        values = plgpu.load(v, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]  # jax 0.10 has another signature
        v[...] = jnp.where(_inside(shape, piece, first, v.shape, plgpu.Layout.WGMMA), values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _widen(narrow, wide, inside: Any = None) -> None:
    """Converts a tile in shared memory; what is not `inside`, a function of shape and layout, becomes 0."""
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    values = plgpu.load(narrow, layout=layout).astype(wide.dtype)  # type: ignore[call-arg]  # as above
    if inside is not None:
        values = jnp.where(inside(wide.shape, layout), values, jnp.zeros_like(values))
    wide[...] = values
    # Before the copying warpgroup may overwrite what was read here, and before a product reads what was written.
    plgpu.commit_smem()


def _inside(shape: Shape, piece: Piece, first, sizes: tuple[int, ...], layout: Any) -> jax.Array:
    """bool `sizes`, `[block_k, head_dim]`: whether a token is the request's, and not behind its window."""
    tokens = first + lax.div(_iota(sizes, 0, layout), shape.together)
    return (tokens < piece.end) & (tokens >= piece.of.lower)


def _iota(sizes: tuple[int, ...], axis: int, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, sizes, axis, layout=layout)
