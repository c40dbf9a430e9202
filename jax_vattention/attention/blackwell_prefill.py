"""Prefill attention through Pallas' Mosaic GPU backend: Blackwell datacentre GPUs (compute capability 10.0).

In the manner of FlashAttention-4: scores, weights and results stay in tensor memory. A block has two tiles of 128
queries at a time and four warpgroups: two compute the softmax of a tile each, a row in each thread; one issues the
products of both tiles; and one copies Q, K and V into shared memory. While one tile's products are computed, the other
tile's softmax is.

The schedule, the copies and the masks' bounds are those of the Hopper kernel: see `mosaic_prefill`. What is not mapped
is never addressed here either.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, nvvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import mosaic_prefill, mosaic_softmax
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_prefill import Work
from jax_vattention.attention.mosaic_view import as_rows, pass_on
from jax_vattention.attention.prefill_shape import Shape, Tiles
from jax_vattention.attention.prefill_split import Tile
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

BLOCKS = 148
"""Multiprocessors of a B200; a block fills one."""
ROWS = 128
"""Of a product: lanes of tensor memory, and threads of a warpgroup."""
_TILES = 2
"""Tiles of queries of a block, and warpgroups that compute their softmax."""
_COPIES, _MULTIPLIES = _TILES, _TILES + 1
"""The other warpgroups."""
_SLACK = 8.0
"""Results are scaled down only if weights would exceed 2 to the power of this: after the first tiles, hardly ever."""

_NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE
"""A row in each thread."""
_WIDE = plgpu.Layout.TCGEN05_TMEM_NATIVE(8)
"""The same, in registers of 16 bytes of results."""
_ROW = _NATIVE.reduce(1)
"""A number of each row."""


@dataclasses.dataclass(frozen=True)
class Tiling(Tiles):
    """What may be tuned here."""

    q_stages: int = 1
    blocks: int = BLOCKS
    registers: tuple[int, int] = (40, 216)
    """Of a thread that copies or issues products, and of one that computes softmax."""


_TILINGS = {64: Tiling(stages=4, q_stages=2), 128: Tiling()}
"""Of each head_dim: as much as fits."""


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of what `mosaic_view.refusal` lets pass; None if it serves these arguments."""
    return mosaic_prefill.refusal(q, view, batch, features)


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    tiling = tiling or _TILINGS[q.shape[2]]
    shape = Shape.of(q, view, features, block_q=ROWS * _TILES, scale=scale, tiling=tiling, interpret=interpret)
    kernel = functools.partial(_prefill, shape=shape, tiling=tiling, has_sinks=features.sinks is not None)
    scratch = _scratch(shape, q.dtype)
    return mosaic_prefill.launch(
        kernel, scratch, _MULTIPLIES + 1, shape, q, view, order, batch, features, interpret=interpret
    )


def _scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Shared and tensor memory of a block.

    A tile's weights take the place of its scores, in the first half of their columns.
    """
    tiling, block_k = shape.tiling, shape.tiling.block_k

    def barriers(count: int, arrivals: int = 1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count, orders_tensor_core=True)

    return mosaic_prefill.buffers(shape, dtype) | {
        "score_tmem": plgpu.RefUnion(
            plgpu.TMEM((ROWS, _TILES * block_k), jnp.float32),
            plgpu.TMEM((ROWS, _TILES * 2 * block_k), dtype, packed=True),
        ),
        "acc_tmem": plgpu.TMEM((ROWS, _TILES * shape.head_dim), jnp.float32),
        "row_smem": plgpu.SMEM((_TILES, ROWS, shape.head_dim), dtype) if shape.interpreted else None,
        # Queries are read by products, and the numbers of their tile by each warpgroup that computes.
        "q_free": barriers(tiling.q_stages, _TILES + 1),
        "k_free": barriers(tiling.stages),
        "v_free": barriers(tiling.stages),
        "scores_ready": barriers(_TILES),
        "weights_ready": barriers(_TILES),
        "acc_ready": barriers(_TILES),
    }


def _prefill(q_ref, k_ref, v_ref, tiles, gaps, counts, layer_ref, order, *refs, shape: Shape, tiling: Tiling,
             has_sinks: bool, **scratch):  # fmt: skip
    """One block. Arguments are those of the Hopper kernel."""
    *sinks, out_ref, order_out = refs
    warpgroup, work = lax.axis_index("warpgroup"), Work.of(tiles, counts[0], shape)

    @pl.when(warpgroup < _TILES)
    def _():
        plgpu.set_max_registers(tiling.registers[1], action="increase")
        _weigh(work, warpgroup, sinks[0] if has_sinks else None, out_ref, **scratch)

    @pl.when(warpgroup == _COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")
        pass_on(order, order_out, work.block)
        layer = layer_ref[0] * shape.layer_stride
        fill = functools.partial(mosaic_prefill.fill_gaps, work, gaps, counts[1], out_ref, scratch["zero_smem"])
        mosaic_prefill.drain(work, mosaic_prefill.copy(work, layer, q_ref, k_ref, v_ref, fill, **scratch), **scratch)

    @pl.when(warpgroup == _MULTIPLIES)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")
        _multiply(work, **scratch)


def _columns(shape: Shape, score_tmem, acc_tmem, index) -> tuple[Any, Any, Any]:
    """Scores, weights and results of a tile of queries in tensor memory."""
    block_k, dim = shape.tiling.block_k, shape.head_dim
    scores, weights = score_tmem
    return (
        scores.at[:, pl.ds(index * block_k, block_k)],
        weights.at[:, pl.ds(index * 2 * block_k, block_k)],
        acc_tmem.at[:, pl.ds(index * dim, dim)],
    )


def _multiply(
    work: Work, *, q_smem, k_smem, v_smem, tile_smem, score_tmem, acc_tmem, q_ready, q_free, k_ready, v_ready, k_free,
    v_free, scores_ready, weights_ready, acc_ready, **_,
):  # fmt: skip
    """The warpgroup that issues products: for each tile of queries those with V, and scores of the next tile of keys.

    Scores take the place of weights, so they wait for the product that reads these. The other tile is at work then.
    """
    shape, tiling = work.shape, work.shape.tiling
    columns = [_columns(shape, score_tmem, acc_tmem, index) for index in range(_TILES)]

    def item(i, count):
        q_stage = lax.rem(i, tiling.q_stages)
        plgpu.barrier_wait(q_ready.at[q_stage])
        tile = _tile(tile_smem, q_stage)

        def stage_of(t):
            return lax.rem(count + t, tiling.stages)

        def score(t, index):
            """Begins the scores of tile of keys `t`."""
            q = q_smem.at[q_stage, pl.ds(index * ROWS, ROWS)]
            k = as_rows(k_smem.at[stage_of(t)]).transpose((1, 0))
            plgpu.tcgen05_mma(columns[index][0], q, k, scores_ready.at[index], accumulate=False)

        def added(index):
            """Waits until such a product is there."""
            plgpu.barrier_wait(acc_ready.at[index])

        def score_next(t, index):
            added(index)
            score(t, index)

        def add(t, index):
            """Begins to add the product of the weights of tile `t` with V."""
            _, weights, acc = columns[index]
            plgpu.barrier_wait(weights_ready.at[index])
            v = as_rows(v_smem.at[stage_of(t)])
            plgpu.tcgen05_mma(acc, weights, v, acc_ready.at[index], accumulate=t > 0)

        def where_used(index, do, *args):
            pl.when(_used(tile, index))(functools.partial(do, *args, index))

        plgpu.barrier_wait(k_ready.at[stage_of(0)])
        for index in range(_TILES):
            where_used(index, score, 0)
        plgpu.tcgen05_commit_arrive(k_free.at[stage_of(0)])

        def step(t, _):
            plgpu.barrier_wait(v_ready.at[stage_of(t)])
            for index in range(_TILES):
                where_used(index, add, t)
                if index == 0:
                    plgpu.barrier_wait(k_ready.at[stage_of(t + 1)])
                if index == _TILES - 1:
                    plgpu.tcgen05_commit_arrive(v_free.at[stage_of(t)])
                where_used(index, score_next, t + 1)
            plgpu.tcgen05_commit_arrive(k_free.at[stage_of(t + 1)])

        lax.fori_loop(0, tile.blocks - 1, step, None)
        plgpu.tcgen05_commit_arrive(q_free.at[q_stage])
        plgpu.barrier_wait(v_ready.at[stage_of(tile.blocks - 1)])
        for index in range(_TILES):
            where_used(index, add, tile.blocks - 1)
        plgpu.tcgen05_commit_arrive(v_free.at[stage_of(tile.blocks - 1)])
        for index in range(_TILES):
            where_used(index, added)
        return count + tile.blocks

    lax.fori_loop(0, work.count, item, jnp.int32(0))


def _tile(tile_smem, q_stage) -> Tile:
    """What the numbers in shared memory say. The next ones may be copied there from then on."""
    tile = Tile(*(tile_smem[q_stage, field] for field in range(len(Tile._fields))))
    plgpu.commit_smem()  # or copies, which another part of the GPU makes, could overtake these reads
    return tile


def _used(tile: Tile, index):
    """Whether the request has rows in this one of the tiles of queries."""
    return (tile.low < (index + 1) * ROWS) & (tile.high > index * ROWS)


def _weigh(
    work: Work, warpgroup, sinks, out_ref, *, tile_smem, score_tmem, acc_tmem, row_smem, q_ready, q_free, scores_ready,
    weights_ready, acc_ready, **_,
):  # fmt: skip
    """A warpgroup that turns scores into weights and stores results."""
    shape, tiling = work.shape, work.shape.tiling
    scores_ref, weights_ref, acc_ref = _columns(shape, score_tmem, acc_tmem, warpgroup)

    def attend(tile: Tile, head):
        position = tile.position + warpgroup * ROWS

        def step(t, state, *, masked: bool):
            maximum, total = state
            plgpu.barrier_wait(scores_ready.at[warpgroup])
            scores = _load(scores_ref, shape)
            key = tile.begin + (tile.blocks - 1 - t) * tiling.block_k
            visible = functools.partial(_visible, tile=tile, position=position, key=key, shape=shape)
            weights, new_maximum, shrink, total = mosaic_softmax.softmax(
                scores, maximum, total, shape, visible if masked else None, slack=_SLACK
            )
            plgpu.async_store_tmem(weights_ref, weights.astype(weights_ref.dtype))

            @pl.when(t > 0)
            def _():
                plgpu.barrier_wait(acc_ready.at[warpgroup])
                _scale(acc_ref, shrink, new_maximum > maximum, shape)

            plgpu.commit_tmem()
            plgpu.barrier_arrive(weights_ready.at[warpgroup])
            return new_maximum, total

        def steps(begin, end, state, *, masked: bool):
            return lax.fori_loop(begin, end, functools.partial(step, masked=masked), state)

        low, high = mosaic_softmax.unmasked(tile, position, ROWS, shape)
        full, below = tile.blocks - high, tile.blocks - low
        maximum = plgpu.layout_cast(jnp.full((ROWS,), mosaic_softmax.NOTHING, jnp.float32), _ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW)
        state = steps(0, full, (maximum, total), masked=True)
        state = steps(full, below, state, masked=False)
        if shape.window is not None:
            state = steps(jnp.maximum(full, below), tile.blocks, state, masked=True)
        maximum, total = state
        total = mosaic_softmax.denominator(maximum, total, None if sinks is None else sinks[head], shape)
        plgpu.barrier_wait(acc_ready.at[warpgroup])
        acc = _load(acc_ref, shape)
        acc = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        _store(acc.astype(out_ref.dtype), row_smem, out_ref, tile, head, warpgroup, shape)

    def item(i, _):
        q_stage = lax.rem(i, tiling.q_stages)
        plgpu.barrier_wait(q_ready.at[q_stage])
        tile = _tile(tile_smem, q_stage)
        plgpu.barrier_arrive(q_free.at[q_stage])
        pl.when(_used(tile, warpgroup))(functools.partial(attend, tile, tile.head + work.item(i)[1]))

    lax.fori_loop(0, work.count, item, None)


def _visible(scores, *, tile: Tile, position, key, shape: Shape):
    """`scores`, and minus infinity for keys, from number `key` on, that a row does not see."""
    native, row_layout = (None, None) if shape.interpreted else (_NATIVE, _ROW)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=native)  # constants: rows are whole
    end = jnp.maximum(row + (position + 1 - key), tile.prefix - key)
    seen = column < lax.broadcast_in_dim(end, scores.shape, [0])
    if shape.window is not None:
        begin = row + (position + 1 - shape.window - key)
        seen &= column >= lax.broadcast_in_dim(begin, scores.shape, [0])
    return jnp.where(seen, scores, -jnp.inf)


def _scale(acc_ref, shrink, needed, shape: Shape) -> None:
    """Multiplies results with `shrink`, in warps where it is `needed` for any row."""

    @pl.when(_any(needed, shape))
    def _():
        acc = _load(acc_ref, shape)
        plgpu.async_store_tmem(acc_ref, acc * lax.broadcast_in_dim(shrink, acc.shape, [0]))


def _any(rows, shape: Shape):
    """Whether it is true for any row of a warp: warps may take different branches, up to the next barrier."""
    if shape.interpreted:
        return rows.any()

    @plgpu.inline_mgpu(arg_types=(_ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT))
    def vote(_, rows):
        own = vector.extract(rows.registers.item(), dynamic_position=[], static_position=[0])
        everyone = mgpu.c(-1, ir.IntegerType.get_signless(32))
        return mgpu.FragmentedArray.splat(nvvm.vote_sync(everyone, own, "any"), (), is_signed=False)

    return vote(rows)


def _load(ref, shape: Shape):
    """What is in columns of tensor memory. They may be written to from then on."""
    found = plgpu.async_load_tmem(ref, layout=_NATIVE)
    if shape.interpreted:
        plgpu.wait_load_tmem()
        return found

    # Of a warp: Pallas' own waits for the whole warpgroup.
    @plgpu.inline_mgpu()
    def wait(_):
        nvvm.tcgen05_wait(nvvm.Tcgen05WaitKind.LOAD)

    wait()
    return found


def _store(result, row_smem, out_ref, tile: Tile, head, warpgroup, shape: Shape) -> None:
    """Writes the rows that belong to the request."""
    first = warpgroup * ROWS
    low, high = tile.own_rows(first, ROWS)
    if not shape.interpreted:
        _store_rows(plgpu.layout_cast(result, _WIDE), out_ref, tile.token + first, head, low, high)
        return
    buffer = row_smem.at[warpgroup]
    buffer[...] = result
    plgpu.commit_smem()

    def row(i, _):
        plgpu.copy_smem_to_gmem(buffer.at[i], out_ref.at[tile.token + first + i, head])

    lax.fori_loop(low, high, row, None)
    plgpu.wait_smem_to_gmem(0)


def _store_rows(result, out_ref, token, head, low, high) -> None:
    """Writes rows `low .. high - 1` from registers: a thread has a row, and 16 bytes after 16 bytes of it."""
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(_WIDE, plgpu.RefType(), scalar, scalar, scalar, scalar))
    def store(_, result, out, *scalars):
        token, head, low, high = (arith.index_cast(ir.IndexType.get(), each.registers.item()) for each in scalars)
        places = list(result.layout.thread_idxs(result.shape))
        row = places[0][0]
        inside = arith.andi(
            arith.cmpi(arith.CmpIPredicate.sge, row, low), arith.cmpi(arith.CmpIPredicate.slt, row, high)
        )
        with mgpu.when(inside):
            for register, (_, column) in zip(result.registers.flat, places, strict=True):
                vector.store(register, out, [arith.addi(token, row), head, column], alignment=16)

    store(result, out_ref, token, head, low, high)
