"""Prefill attention through Pallas' Mosaic GPU backend: Hopper GPUs.

FlashAttention-3 (Shah, Bikshandi, Zhang, Thakkar, Ramani and Dao, arXiv 2407.08608): a block has one warpgroup that
copies tiles of Q, K and V into shared memory with the tensor memory accelerator, and two that multiply, each 64 rows of
a tile of queries. They take turns on the tensor cores (its "ping-pong"): one multiplies while the other computes its
softmax. In its turn a warpgroup begins the scores of a tile of keys and the product with V of the tile before, and
nothing else: all that these take is in registers by then (see `mosaic_products`). With `Tiling.overlap`, its other
overlap, the softmax begins when the scores are there, next to the warpgroup's own product with V.

Unlike there, a softmax has no maximum to look for in most tiles (see `optimistic`): tensor cores waited for that.

Where blocks are in clusters, the two of one work at the same time on the same tile of queries, for two heads that share
a KV head: they loop over the same tiles of K and V, of which each block reads a half for both. That takes half the
traffic of L2, and less power. A request's last tile, below, each block reads for itself.

A block stays for the whole kernel: tiles of queries of all requests and heads, sorted by the keys that they see, are
dealt out to the blocks, and the copying warpgroup runs ahead into the next one.

What is not mapped is never addressed: a request's last tile of keys is copied in runs of `KV_TAIL_TOKENS` tokens, up to
which the manager maps, and in the place of a run without a token of the request the first one is copied again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import mosaic_copy, target
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_products import (
    any_of_cluster,
    begin_scores,
    begin_sum,
    give_turn,
    number_of_block,
    pin,
    report_overflow,
    settle,
    sums_of_columns,
    wait_turn,
)
from jax_vattention.attention.mosaic_softmax import (
    NOTHING,
    denominator,
    scores_of,
    softmax_of_tile,
    unmasked,
    weights_of,
)
from jax_vattention.attention.mosaic_view import (
    BOX,
    ROWS,
    THREADS,
    Columns,
    as_rows,
    part_of,
    pass_on,
    store_rows,
    swizzled,
    tile_sizes,
    tokens_of,
)
from jax_vattention.attention.prefill_shape import CLUSTER, PEER, Shape, Tiles
from jax_vattention.attention.prefill_split import FIELDS, Tile, schedule
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

_CONSUMERS = 2
"""Warpgroups of a block that multiply."""
_BLOCK_Q = ROWS * _CONSUMERS
"""Queries of a tile."""
_LIMIT = 2.0**100
"""Of the sum of a row's weights in an optimistic attempt."""
_MANY_QUERIES = 2048
"""Of a request, on average: then blocks work in clusters."""
_FEW = 64
"""Keys of a tile, and dimensions, for whose products a thread has registers without those of another warpgroup."""


@dataclasses.dataclass(frozen=True)
class Tiling(Tiles):
    """What may be tuned here."""

    own_out: bool = True
    """Results have shared memory of their own, and do not wait in that of their queries to be stored."""
    ping_pong: bool = True
    """Warpgroups take turns on the tensor cores."""
    overlap: bool = True
    """The softmax of a tile overlaps with the product with V of the one before it."""
    l2_bytes: int | None = 2**24
    registers: tuple[int, int] = (40, 232)
    """Of a thread that copies, and of one that multiplies."""


_Tiling = TypeVar("_Tiling", bound=Tiling)


def optimistic(dtype: Any) -> bool:
    """Whether a first attempt takes the maximum of each row's scores from its masked tiles, and keeps it.

    Those are the last ones that the row sees. A softmax is the same whatever is subtracted from its scores, and numbers
    of float32 and bfloat16 are as precise far from 1 as near it: nothing is lost unless something overflows. Then sums
    that are not below `_LIMIT`, or results that are not finite, say so, and the block does all its work once more, with
    a maximum for each tile. That takes scores that grow by 69 (100 powers of 2) towards the first keys. float16 has no
    such range.
    """
    return float(jnp.finfo(dtype).max) > _LIMIT


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of what `mosaic_view.refusal` lets pass; None if it serves these arguments."""
    del batch, features  # all of them
    for refused, what in (
        (q.dtype != view.k.dtype, f"{q.dtype} queries of a {view.k.dtype} cache, where requests have many queries"),
        (q.shape[2] not in (64, 128), f"head_dim {q.shape[2]}, where requests have many queries"),
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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    default = in_clusters(Tiling(), q.shape[0], batch.num_requests)
    tiling = tiling_of(tiling, default, q, view, interpret=interpret)
    shape = shape_of(q, view, features, scale=scale, tiling=tiling, interpret=interpret)
    kernel = functools.partial(_prefill, shape=shape, tiling=tiling, has_sinks=features.sinks is not None)
    types = scratch_types(shape, tiling, q.dtype)
    if tiling.cluster > 1:
        types["done"] = tiling.barrier(num_arrivals=_CONSUMERS + 1)
    return launch(kernel, types, _CONSUMERS + 1, shape, q, view, order, batch, features, interpret=interpret)


def in_clusters(tiling: _Tiling, tokens: int, requests: int) -> _Tiling:
    """With clusters for so many queries of so many requests, or without.

    Blocks that work together wait for each other where a tile of queries begins: it pays where many keys follow.
    """
    return dataclasses.replace(tiling, cluster=2 if tokens >= _MANY_QUERIES * requests else 1)


def tiling_of(
    tiling: _Tiling | None,
    default: _Tiling,
    q: jax.Array,
    view: LayerView,
    *,
    kernel: str = "mosaic_prefill",
    interpret: Any,
) -> _Tiling:
    """This one, or the default with what was tuned, with clusters that divide the blocks and the heads of a group.

    With a jax by which warpgroups cannot give each other registers, of smaller tiles, and as much more of them.

    Args:
      kernel: of which rows of what was tuned are taken.
    """
    if tiling is None:
        tiling = tuned(default, kernel, view)
        if target.REGISTERS_STAY and q.shape[2] > _FEW:
            tiling = dataclasses.replace(tiling, block_k=_FEW, stages=tiling.stages * tiling.block_k // _FEW)
    cluster = math.gcd(tiling.cluster, q.shape[1] // view.num_kv_heads, tiling.blocks)
    # The interpreter does not know the shared memory of other blocks.
    return dataclasses.replace(tiling, cluster=1 if interpret else cluster)


def shape_of(
    q: jax.Array, view: LayerView, features: Features, *, scale: float, tiling: Tiling, interpret: Any
) -> Shape:
    """That of this kernel."""
    return Shape.of(q, view, features, block_q=_BLOCK_Q, scale=scale, tiling=tiling, interpret=interpret)


def launch(
    kernel: Callable[..., None],
    scratch: dict[str, Any],
    warpgroups: int,
    shape: Shape,
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel that takes what `_prefill` does; returns `(out, order)`."""
    tokens = q.shape[0]
    tables = schedule(batch, view, features, shape.split_sizes(tokens), interpret=bool(interpret))
    out, order = plgpu.kernel(
        kernel,
        out_type=results(shape, q, order),
        scratch_types=scratch,
        **shape.tiling.grid,
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_prefill",
    )(
        padded(q, shape),
        *Columns.of(view, interpreted=shape.interpreted),
        *tables,
        view.layer.reshape(1),
        order,
        *(() if features.sinks is None else (features.sinks,)),
    )
    return out[:tokens], order


def results(shape: Shape, q: jax.Array, order: jax.Array) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What a kernel writes: a row for each query, padded, and the order token."""
    rows = jax.ShapeDtypeStruct((shape.tokens, shape.num_q_heads, shape.head_dim), q.dtype)
    return rows, jax.ShapeDtypeStruct(order.shape, order.dtype)


def padded(q: jax.Array, shape: Shape) -> jax.Array:
    """Queries as a kernel takes them."""
    return jnp.pad(q, ((0, shape.tokens - q.shape[0]), (0, 0), (0, 0)))


def buffers(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Shared memory of a block that `copy` and `fill_gaps` use, and what says that something is there."""
    tiling = shape.tiling
    tile = tile_sizes(tiling.block_k, shape.head_dim, interpreted=shape.interpreted)
    return {
        "q_smem": swizzled((tiling.q_stages, shape.block_q, shape.head_dim), dtype),
        "k_smem": swizzled((tiling.stages, *tile), dtype, rank=len(tile)),
        "v_smem": swizzled((tiling.stages, *tile), dtype, rank=len(tile)),
        # And a row of what failed, by warpgroup: each array takes a multiple of 1 KiB.
        "tile_smem": plgpu.SMEM((tiling.q_stages + 1, FIELDS), jnp.int32),
        # Of as many elements as a warpgroup has threads, or more.
        "zero_smem": plgpu.SMEM((max(shape.zero_heads, THREADS // shape.head_dim), shape.head_dim), dtype),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=tiling.q_stages),
        "k_ready": plgpu.Barrier(num_barriers=tiling.stages),
        "v_ready": plgpu.Barrier(num_barriers=tiling.stages),
        "tail_ready": plgpu.Barrier(num_arrivals=tiling.block_k // KV_TAIL_TOKENS, num_barriers=2),
    }


def scratch_types(shape: Shape, tiling: Tiling, dtype: Any) -> dict[str, Any]:
    """Shared memory of a block."""
    out = {"out_smem": swizzled((_BLOCK_Q, shape.head_dim), dtype)} if tiling.own_out else {}
    return (
        buffers(shape, dtype)
        | out
        | {
            "q_free": plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=tiling.q_stages),
            # A copy of K or V is one to all blocks of a cluster.
            "k_free": tiling.barrier(num_arrivals=_CONSUMERS, num_barriers=tiling.stages),
            "v_free": tiling.barrier(num_arrivals=_CONSUMERS, num_barriers=tiling.stages),
        }
        | ({"attempted": tiling.barrier(num_arrivals=_CONSUMERS)} if optimistic(dtype) else {})
    )


def meet(barrier) -> None:
    """Waits for the other warpgroups: those of a block, or of a cluster."""
    plgpu.commit_smem()  # and the threads of this one wait for each other
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _prefill(q_ref, k_ref, v_ref, tiles, gaps, counts, layer_ref, order, *refs, shape: Shape, tiling: Tiling,
             has_sinks: bool, done=None, **scratch):  # fmt: skip
    """One block; `Schedule` has the tables, `scratch_types` the rest.

    Args:
      q_ref: `[tokens, num_q_heads, head_dim]`.
      k_ref, v_ref: see `Columns`.
      tiles, gaps, counts: see `Schedule`.
      layer_ref: int32 `[1]`.
      order: int32 `[4]`: to have it makes the read come after the append that returned it.
      refs: sinks if there are any, out, and the order token once more: it comes out when the kernel is over.
    """
    *sinks, out_ref, order_out = refs
    warpgroup, work = lax.axis_index("warpgroup"), Work.of(tiles, counts[0], shape)
    layer = layer_ref[0] * shape.layer_stride

    @pl.when(warpgroup == _CONSUMERS)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")
        pass_on(order, order_out, work.block)
        fill = functools.partial(fill_gaps, work, gaps, counts[1], out_ref, scratch["zero_smem"])
        drain(work, copy(work, layer, q_ref, k_ref, v_ref, fill, **scratch), **scratch)

    @pl.when(warpgroup < _CONSUMERS)
    def _():
        plgpu.set_max_registers(tiling.registers[1], action="increase")
        multiply(work, tiling, warpgroup, sinks[0] if has_sinks else None, out_ref, **scratch)

    leave(done, tiling)


def leave(barrier, tiling: Tiling) -> None:
    """At the end of a kernel: a block's shared memory has to be there until no other block of its cluster uses it."""
    if tiling.cluster > 1:
        meet(barrier)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one block has to do: pairs of a tile of queries and a head, one after the other.

    Blocks of a cluster have the same tiles, and heads that are neighbours.
    """

    tiles: Any
    total: jax.Array
    """Of all clusters."""
    block: jax.Array
    shape: Shape

    @classmethod
    def of(cls, tiles, count, shape: Shape) -> Work:
        """Of this block, if so many rows of `tiles` are used."""
        size = shape.tiling.cluster
        # An axis of a cluster is found by a division: compilers do not see that it is the same for all threads.
        block = lax.axis_index(CLUSTER) if size == 1 else number_of_block()
        return cls(tiles, count * (shape.group // size), block, shape)

    @property
    def cluster(self) -> jax.Array:
        """Number of the block's cluster."""
        return lax.div(self.block, self.shape.tiling.cluster)

    @property
    def _clusters(self) -> int:
        return self.shape.tiling.blocks // self.shape.tiling.cluster

    @property
    def count(self) -> jax.Array:
        """Of this block."""
        rounds = lax.div(self.total, self._clusters)
        return rounds + (self._within(rounds) < lax.rem(self.total, self._clusters)).astype(jnp.int32)

    def _within(self, i) -> jax.Array:
        """Longest first, and every other round in reverse, like a snake: no block gets the longer ones every time."""
        return jnp.where(lax.rem(i, 2) == 0, self.cluster, self._clusters - 1 - self.cluster)

    def item(self, i) -> tuple[jax.Array, jax.Array]:
        """Row of `tiles` of number `i`, and which query head of its KV head. These are neighbours: L2 has their keys.

        After the last one comes the first one again.
        """
        i, size = lax.rem(i, self.count), self.shape.tiling.cluster
        item, heads = i * self._clusters + self._within(i), self.shape.group // size
        return lax.div(item, heads), lax.rem(item, heads) * size + lax.rem(self.block, size)


class Copied(NamedTuple):
    """What `copy` has copied."""

    items: jax.Array
    """Of the block's work, each as often as it was copied."""
    tiles: jax.Array
    """Of keys."""
    depth: jax.Array
    """As many of these may be under way."""


def copy(
    work: Work, layer, q_ref, k_ref, v_ref, meanwhile: Callable[[], None], *, q_smem, k_smem, v_smem, tile_smem,
    q_ready, q_free, k_ready, v_ready, tail_ready, k_free, v_free, attempted=None,
    depth_of: Callable[[jax.Array], jax.Array] | None = None, **_,
) -> Copied:  # fmt: skip
    """The warpgroup that copies Q, K and V.

    Args:
      meanwhile: what it does when all copies are on their way.
      depth_of: how many tiles of keys may be under way for an item, from 1 to as many as there is memory for; if not
        given, these. What is more takes effect one by one, and what is less does not.
    """
    shape, tiling = work.shape, work.shape.tiling
    block_k, stages, q_stages = tiling.block_k, tiling.stages, tiling.q_stages

    def item(i, done: Copied) -> Copied:
        index, head_of_group = work.item(i)
        count, depth = done.tiles, jnp.int32(stages)
        if depth_of is not None:
            depth = jnp.clip(depth_of(i), done.depth, done.depth + 1)
        tile = Tile(*(work.tiles[index, field] for field in range(len(Tile._fields))))
        head = tile.head + head_of_group
        stage = lax.rem(i, q_stages)

        @pl.when(i >= q_stages)
        def _():
            plgpu.barrier_wait(q_free.at[stage])

        queries = pl.ds(pl.multiple_of(tile.token, BOX), shape.block_q)
        plgpu.copy_gmem_to_smem(work.tiles.at[index], tile_smem.at[stage], q_ready.at[stage])
        plgpu.copy_gmem_to_smem(q_ref.at[queries, head], q_smem.at[stage], q_ready.at[stage])

        keys = k_ref, layer, k_smem, k_ready, k_free, tail_ready.at[0]
        values = v_ref, layer + shape.v_column, v_smem, v_ready, v_free, tail_ready.at[1]

        def load(t, side, *, last: bool = False):
            """Number `t` of the tiles of keys, which are read from the last to the first."""
            ref, column, smem, ready, free, tail = side
            stage = lax.rem(count + t, stages)

            def tokens(first, count):
                kv_head = lax.div(tile.head, shape.group)
                return tokens_of(ref, tile.row + first, count, column, kv_head, interpreted=shape.interpreted)

            has_to_wait, place = count + t >= depth, stage
            if depth_of is not None:
                place = lax.rem(count + t - depth, stages)
                if last:  # with one more under way, the first tile is that one
                    has_to_wait &= depth == done.depth

            @pl.when(has_to_wait)
            def _():
                plgpu.barrier_wait(free.at[place])

            key = tile.begin + (tile.blocks - 1 - t) * block_k

            def whole():
                # Each block of a cluster copies its share to all. As a stage is free when it is in all of them, a share
                # comes after all of what the stage had before; it may come before its block says how much it expects.
                mosaic_copy.copy(
                    tokens(key, block_k), smem.at[stage], ready.at[stage],
                    policy=mosaic_copy.READ_AGAIN if tiling.keep_keys else None, interpreted=shape.interpreted,
                    collective_axes=PEER if tiling.cluster > 1 else None,
                )  # fmt: skip

            if not last:
                whole()
                return
            pl.when(key + block_k <= tile.kv_len)(whole)

            @pl.when(key + block_k > tile.kv_len)
            def _():
                def run(i, _):
                    first = i * KV_TAIL_TOKENS
                    begin = jnp.where(key + first < tile.kv_len, key + first, key)
                    box = i * (KV_TAIL_TOKENS // BOX)
                    target = part_of(smem.at[stage], box, KV_TAIL_TOKENS, interpreted=shape.interpreted)
                    mosaic_copy.copy(tokens(begin, KV_TAIL_TOKENS), target, tail, interpreted=shape.interpreted)

                lax.fori_loop(0, block_k // KV_TAIL_TOKENS, run, None)
                plgpu.barrier_wait(tail)
                if ref is v_ref and side is values:
                    _clean(as_rows(smem.at[stage]), tile.kv_len - key, shape)
                plgpu.barrier_arrive(ready.at[stage])

        load(0, keys, last=True)

        @pl.when(tile.blocks > 1)
        def _():
            load(1, keys)

        load(0, values, last=True)

        def step(t, _):
            load(t, keys)
            load(t - 1, values)

        lax.fori_loop(2, tile.blocks, step, None)

        @pl.when(tile.blocks > 1)
        def _():
            load(tile.blocks - 1, values)

        return Copied(i + 1, count + tile.blocks, depth)

    def attempt(number, done: Copied) -> Copied:
        """Once more, if that is the verdict on the first attempt."""

        def verdict():
            meanwhile()
            plgpu.barrier_wait(attempted)
            return _failed(tile_smem, tiling)

        wanted = lax.cond(number == 0, lambda: jnp.bool_(True), verdict)
        return lax.fori_loop(done.items, done.items + jnp.where(wanted, work.count, 0), item, done)

    done = Copied(jnp.int32(0), jnp.int32(0), jnp.int32(stages if depth_of is None else 1))
    if attempted is None:
        done = lax.fori_loop(0, work.count, item, done)
        meanwhile()
        return done
    return lax.fori_loop(0, 2, attempt, done)


def _failed(tile_smem, tiling: Tiles):
    """Whether the first attempt of any warpgroup has, of any block of the cluster: these go on together."""
    if tiling.cluster > 1:
        return any_of_cluster(tile_smem.at[tiling.q_stages, pl.ds(0, _CONSUMERS)], tiling.cluster)
    return functools.reduce(jnp.logical_or, (tile_smem[tiling.q_stages, i] != 0 for i in range(_CONSUMERS)))


def drain(work: Work, copied: Copied, *, q_free, k_free, v_free, **_) -> None:
    """Waits until the last tiles of keys and queries are free again: barriers end as they began."""
    tiling = work.shape.tiling

    def queries(i, _):
        plgpu.barrier_wait(q_free.at[lax.rem(i, tiling.q_stages)])

    def keys(t, _):
        plgpu.barrier_wait(k_free.at[lax.rem(t, tiling.stages)])
        plgpu.barrier_wait(v_free.at[lax.rem(t, tiling.stages)])

    lax.fori_loop(jnp.maximum(copied.items - tiling.q_stages, 0), copied.items, queries, None)
    lax.fori_loop(jnp.maximum(copied.tiles - copied.depth, 0), copied.tiles, keys, None)


def _clean(v, length, shape: Shape) -> None:
    """Sets what lies behind the first `length` rows to 0: whatever it was, NaN too, times a weight of 0 must be 0."""
    width = 64
    at = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=plgpu.Layout.WGMMA)
    rows = [*range(0, shape.tiling.block_k - ROWS, ROWS), shape.tiling.block_k - ROWS]
    for row in rows:
        for column in range(0, shape.head_dim, width):
            part = v.at[pl.ds(row, ROWS), pl.ds(column, width)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]  # jax 0.10 has another signature
            part[...] = jnp.where(at + row < length, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def fill_gaps(work: Work, gaps, num_gaps, out_ref, zero_smem) -> None:
    """Writes 0 to the rows of padding tokens, which the blocks share."""
    heads, blocks = work.shape.zero_heads, work.shape.tiling.blocks
    parts = work.shape.num_q_heads // heads

    @pl.when(num_gaps > 0)
    def _():
        layout = plgpu.Layout.WG_STRIDED(zero_smem.shape, vec_size=zero_smem.size // THREADS)
        zero_smem[...] = plgpu.layout_cast(jnp.zeros(zero_smem.shape, zero_smem.dtype), layout)
        plgpu.commit_smem()

        def gap(g, _):
            first, size = gaps[g, 0], gaps[g, 1]

            def part(i, _):
                each = work.block + i * blocks
                at = out_ref.at[first + lax.div(each, parts), pl.ds(lax.rem(each, parts) * heads, heads)]
                plgpu.copy_smem_to_gmem(zero_smem.at[pl.ds(0, heads)], at)

            lax.fori_loop(0, lax.div(jnp.maximum(size * parts - work.block, 0) + blocks - 1, blocks), part, None)

        lax.fori_loop(0, num_gaps, gap, None)
        plgpu.wait_smem_to_gmem(0)


class _State(NamedTuple):
    """Of an online softmax over the tiles of keys so far, each row on its own."""

    maximum: Any  # [ROWS]
    total: Any  # [ROWS, 8]: sums of every eighth column; a thread adds up its own, and with others in the end only
    acc: Any  # [ROWS, head_dim]: of the tiles but the last
    weights: Any  # [ROWS, block_k]: of the last


def multiply(
    work: Work, tiling: Tiling, warpgroup, sinks, out_ref, *, q_smem, k_smem, v_smem, tile_smem, q_ready,
    q_free, k_ready, v_ready, k_free, v_free, out_smem=None, attempted=None, **_,
):  # fmt: skip
    """A warpgroup that computes."""
    shape = work.shape
    block_k, stages, head_dim = tiling.block_k, tiling.stages, shape.head_dim
    dtype = k_smem.dtype
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    own_rows = pl.ds(warpgroup * ROWS, ROWS)
    hopeful = attempted is not None
    failed = tile_smem.at[tiling.q_stages, warpgroup]
    interpreted = shape.interpreted
    # The interpreter has no named barriers. Turns say when something is done, not what.
    in_turns = tiling.ping_pong and not interpreted
    if in_turns:

        @pl.when(warpgroup == 1)
        def _():
            give_turn(0)

    def item(i, count):
        q_stage = lax.rem(i, tiling.q_stages)
        plgpu.barrier_wait(q_ready.at[q_stage])
        tile = Tile(*(tile_smem[q_stage, field] for field in range(len(Tile._fields))))
        q = q_smem.at[q_stage, own_rows]
        plgpu.commit_smem()  # reads by threads come before the next copy to the same place, which is no thread's
        head = tile.head + work.item(i)[1]
        position = tile.position + warpgroup * ROWS
        softmax = functools.partial(softmax_of_tile, tile=tile, position=position, shape=shape)

        def stage_of(t):
            return lax.rem(count + t, stages)

        def key_of(t):
            return tile.begin + (tile.blocks - 1 - t) * block_k

        def first():
            """Scores of tile 0."""
            plgpu.barrier_wait(k_ready.at[stage_of(0)])

            def scores(ref):
                plgpu.wgmma(ref, q, as_rows(k_smem.at[stage_of(0)]).transpose((1, 0)))
                return ref[...]

            found = pl.run_scoped(scores, plgpu.ACC((ROWS, block_k), jnp.float32))
            plgpu.barrier_arrive(k_free.at[stage_of(0)])
            return found

        maximum = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), row_layout)
        total = plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), plgpu.Layout.WGMMA)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)
        weights, maximum, _, total = softmax(first(), maximum, total, key_of(0), masked=True)
        state = _State(maximum, total, acc, weights.astype(dtype))

        def step(t, state, *, masked: bool):
            """Scores and weights of tile `t`, and the product of those of tile `t - 1` with V.

            In the end nothing is in flight, and `acc` and `weights` are as products take them. Were they made so later,
            compilers would do it in this warpgroup's turn, with no products in flight.
            """
            k_stage, v_stage = stage_of(t), stage_of(t - 1)
            plgpu.barrier_wait(k_ready.at[k_stage])
            if in_turns:
                wait_turn(warpgroup)
            keys = as_rows(k_smem.at[k_stage])
            scores, acc, weights = begin_scores(q, keys, state.acc, state.weights, interpreted=interpreted)
            plgpu.barrier_wait(v_ready.at[v_stage])
            acc = begin_sum(acc, weights, as_rows(v_smem.at[v_stage]), interpreted=interpreted)
            if in_turns:
                give_turn(1 - warpgroup)
            if tiling.overlap:
                (scores,) = settle(1, scores, interpreted=interpreted)
            else:
                scores, acc = settle(0, scores, acc, interpreted=interpreted)
            plgpu.barrier_arrive(k_free.at[k_stage])
            maximum, shrink = state.maximum, None
            if masked or not hopeful:
                weights, maximum, shrink, total = softmax(scores, maximum, state.total, key_of(t), masked=masked)
            else:
                weights = weights_of(*scores_of(scores, shape), maximum)
                total = state.total + sums_of_columns(weights, interpreted=interpreted)
            if tiling.overlap:
                pin(total, interpreted=interpreted)
                (acc,) = settle(0, acc, interpreted=interpreted)
            plgpu.barrier_arrive(v_free.at[v_stage])
            if shrink is not None:
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            return _State(maximum, total, acc, weights.astype(dtype))

        def steps(begin, end, state, *, masked: bool):
            return lax.fori_loop(begin, end, functools.partial(step, masked=masked), state)

        low, high = unmasked(tile, position, ROWS, shape, behind=1)
        full, below = jnp.maximum(tile.blocks - high, 1), jnp.maximum(tile.blocks - low, 1)
        if hopeful:  # A second attempt masks all tiles, where that is not needed too: it has no loop of its own.
            full = jnp.where(i < work.count, full, tile.blocks)
        state = steps(1, full, state, masked=True)
        state = steps(full, below, state, masked=False)
        if shape.window is not None:
            state = steps(jnp.maximum(full, below), tile.blocks, state, masked=True)
        if tiling.own_out:
            plgpu.barrier_arrive(q_free.at[q_stage])
        stage = stage_of(tile.blocks - 1)
        plgpu.barrier_wait(v_ready.at[stage])

        def finish(acc_ref):
            if not interpreted:  # which has no accumulators that begin with a value
                acc_ref[...] = state.acc
            plgpu.wgmma(acc_ref, state.weights, as_rows(v_smem.at[stage]))
            return acc_ref[...] + state.acc if interpreted else acc_ref[...]

        acc = pl.run_scoped(finish, plgpu.ACC((ROWS, head_dim), jnp.float32))
        plgpu.barrier_arrive(v_free.at[stage])
        sink = None if sinks is None else sinks[head]
        total = denominator(state.maximum, state.total.sum(axis=1), sink, shape)
        if hopeful:
            report_overflow(total, acc, *tile.own_rows(warpgroup * ROWS, ROWS), _LIMIT, failed, interpreted=interpreted)
        acc = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        buffer = out_smem.at[own_rows] if tiling.own_out else q
        _store(acc.astype(dtype), buffer, out_ref, tile, head, warpgroup, shape)
        if not tiling.own_out:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[q_stage])
        return count + tile.blocks

    def attempt(number, count):
        """See `copy`."""

        def verdict():
            meet(attempted)
            return _failed(tile_smem, tiling)

        wanted = lax.cond(number == 0, lambda: jnp.bool_(True), verdict)
        begin = number * work.count
        return lax.fori_loop(begin, begin + jnp.where(wanted, work.count, 0), item, count)

    if hopeful:
        failed[...] = jnp.int32(0)
        plgpu.commit_smem()
        lax.fori_loop(0, 2, attempt, jnp.int32(0))
    else:
        lax.fori_loop(0, work.count, item, jnp.int32(0))
    if in_turns:

        @pl.when(warpgroup == 0)
        def _():
            wait_turn(0)

    plgpu.wait_smem_to_gmem(0)


def _store(result, buffer, out_ref, tile: Tile, head, warpgroup, shape: Shape) -> None:
    """Writes the rows that belong to the request: through shared memory if all of them do."""
    first = warpgroup * ROWS
    low, high = tile.own_rows(first, ROWS)
    whole = (low == 0) & (high == ROWS)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(whole)
    def _():
        buffer[...] = result
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(tile.token + first, BOX), ROWS)
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows, head])

    @pl.when(jnp.logical_not(whole))
    def _():
        if shape.interpreted:
            buffer[...] = result
            plgpu.commit_smem()

            def row(i, _):
                plgpu.copy_smem_to_gmem(buffer.at[i], out_ref.at[tile.token + first + i, head])

            lax.fori_loop(low, high, row, None)
        else:
            store_rows(result, out_ref, tile.token + first + low, head, low, high)
