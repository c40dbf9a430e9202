"""Decode attention through Pallas' Mosaic GPU backend: Hopper GPUs.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023) with the work split as in Stream-K (Osama et al., arXiv 2301.03598):
the tiles of keys of all requests and KV heads stand in one row, and every stream of the GPU takes an equal part of it,
whatever the lengths. A part that begins or ends within a request yields a partial result, which `_combine` joins.

A block holds two streams, each a pair of warpgroups: one that copies tiles of K and V into shared memory with the
tensor memory accelerator, and one that multiplies them with the query heads that share the KV head, as rows of one
`wgmma`.

What is not mapped is never addressed: a request's last tile is copied in boxes of `KV_TAIL_TOKENS` tokens, up to which
the manager maps, and in the place of a box without a token of the request the first one is copied again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as triton

from jax_vattention.attention import mosaic_prefill
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

_LOG2_E = math.log2(math.e)
_ROWS = 64
"""Of a `wgmma`: the query heads are the first of them, the rest is padding."""
_BOX = KV_TAIL_TOKENS
"""Tokens of the smallest copy: rows of a swizzled tile in shared memory."""
_STREAMS = 2
"""Of a block."""
_COMBINED_ELEMENTS = 8192
"""Of partial results that `_combine` reads at once."""
_BLOCKS = 132
"""Multiprocessors of an H100 or H200; a block fills one."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What may be tuned: shared memory holds `block_k * stages` tokens of K and V for each of the streams."""

    block_k: int = 64
    """Tokens of a tile."""
    stages: int = 2
    """Tiles of a stream that are in flight or being read."""
    part_dtype: Any = jnp.float32
    """Of results over some of the keys."""
    blocks: int = _BLOCKS


_TILING = Tiling()


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a kernel."""

    num_kv_heads: int
    group: int
    head_dim: int
    tiling: Tiling
    scale: float
    soft_cap: float | None
    column_stride: int
    """Columns of a token's row in a view from one layer to the next: a column is one head of K or of V."""
    v_column: int
    """Where V of a layer begins, in columns from its K; 0 where V is an array of its own."""

    @property
    def rows(self) -> int:
        """Rows of the query tile that are copied."""
        return -(-self.group // _BOX) * _BOX

    @property
    def sharing(self) -> int:
        """KV heads whose query heads are neighbours in one query tile; each uses rows of its own."""
        fits = _BOX % self.group == 0 and self.num_kv_heads * self.group % _BOX == 0
        return _BOX // self.group if fits else 1

    def query_tile(self, token: jax.Array, head: jax.Array) -> jax.Array:
        """Where the query heads of a KV head are: number of the tile. Rows from `first_row(head)` on are its own."""
        return lax.div(token * self.num_kv_heads + head, self.sharing)

    def first_row(self, head: jax.Array) -> jax.Array:
        """See `query_tile`."""
        return lax.rem(head, self.sharing) * self.group

    def query_tiles(self, q: jax.Array) -> jax.Array:
        """`[tiles, rows, head_dim]`: the same memory, if rows need no padding."""
        if self.sharing > 1 or self.group == self.rows:
            return q.reshape(-1, self.rows, self.head_dim)
        q = q.reshape(-1, self.group, self.head_dim)
        return jnp.pad(q, ((0, 0), (0, self.rows - self.group), (0, 0)))

    @property
    def streams(self) -> int:
        return self.tiling.blocks * _STREAMS


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    del features  # all of them
    decode = batch.max_q_len == 1
    group, head_dim = q.shape[1] // view.num_kv_heads, q.shape[2]
    slots, slot_tokens = view.k.shape[:2]
    for refused, what in (
        (jax.__version_info__[:2] != (0, 11), f"jax {jax.__version__}: this backend changes, 0.11 is what was tried"),
        (target() != "9.0", "GPUs other than Hopper (compute capability 9.0)"),
        (decode and view.window is not None, "windows"),
        (q.dtype != view.k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16), "types but bfloat16 and float16"),
        (head_dim not in (64, 128), f"head_dim {head_dim}"),
        (decode and group > _ROWS, f"{group} query heads for a KV head"),
        (slot_tokens % _BOX, f"slots of {slot_tokens} tokens"),
        (slots * slot_tokens >= 2**31, f"{slots} slots of {slot_tokens} tokens"),
    ):
        if refused:
            return what
    return None


def target() -> str | None:
    """Compute capability of the GPU that a program is traced for; None if there is none."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return "9.0" if re.search(r"\b(H100|H200|GH200)\b", described.device_kind) else described.device_kind
    try:
        return jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling = _TILING,
    interpret: Any = False,
    interpret_combine: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    if batch.max_q_len > 1:
        return mosaic_prefill.run(q, view, order, batch, features, scale=scale, interpret=interpret)
    num_kv_heads = view.num_kv_heads
    group, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
    interleaved = view.v is None
    columns = 2 * num_kv_heads if interleaved else 0
    shape = _Shape(
        num_kv_heads, group, head_dim, tiling, scale, features.soft_cap, columns, num_kv_heads if interleaved else 0
    )
    slot_tokens = view.k.shape[1]
    # Rows of tokens, and in each a column for every head: a view of the same memory.
    k, v = (each.reshape(view.k.shape[0] * slot_tokens, -1, head_dim) for each in view.views)
    requests, streams, pairs = _schedule(batch, view, shape, slot_tokens)
    segments = batch.num_requests * num_kv_heads + shape.streams
    parts, lse = plgpu.kernel(
        functools.partial(_decode, shape=shape),
        out_type=(
            jax.ShapeDtypeStruct((segments, shape.rows, head_dim), tiling.part_dtype),
            jax.ShapeDtypeStruct((segments, shape.rows), jnp.float32),
        ),
        scratch_types=_scratch(shape, q.dtype),
        grid=(tiling.blocks,),
        grid_names=("block",),
        num_threads=2 * _STREAMS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_decode",
    )(shape.query_tiles(q), k, v, requests, streams, view.layer.reshape(1), order)
    return _combine(parts, lse, pairs, q, order, batch, features, shape, interpret_combine)


def _schedule(
    batch: RaggedBatch, view: LayerView, shape: _Shape, slot_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Who does what. It depends on no layer: XLA computes it once in a program.

    Returns:
      int32 `[requests, 4]`: token of the query, row of token 0 in the view, length, tiles.
      int32 `[streams, 4]`: first pair of a request and a KV head, first tile of it, tiles, pairs.
      int32 `[pairs, 2]`: first stream that works on a pair, streams.
    """
    heads, streams, block_k = shape.num_kv_heads, shape.streams, shape.tiling.block_k
    slots = jnp.clip(batch.slots, 0, view.mapped.shape[1] - 1)
    lens = jnp.where(batch.q_lens > 0, batch.kv_lens, 0)
    tiles = (lens + block_k - 1) // block_k
    requests = jnp.stack([batch.q_starts, slots * slot_tokens, lens, tiles], axis=1)

    ends = jnp.cumsum(tiles) * heads
    starts = ends - tiles * heads
    each, more = ends[-1] // streams, ends[-1] % streams  # the first `more` streams take a tile more
    stream = jnp.arange(streams, dtype=jnp.int32)
    low = stream * each + jnp.minimum(stream, more)
    count = each + (stream < more)

    def pair_of(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        request = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
        request = jnp.minimum(request, len(tiles) - 1)
        within, length = tile - starts[request], jnp.maximum(tiles[request], 1)
        return request * heads + within // length, within % length

    first, first_tile = pair_of(low)
    last, _ = pair_of(low + count - 1)
    table = jnp.stack([first, first_tile, count, jnp.where(count > 0, last - first + 1, 0)], axis=1)

    def stream_of(tile: jax.Array) -> jax.Array:
        wide = more * (each + 1)
        return jnp.where(tile < wide, tile // (each + 1), more + (tile - wide) // jnp.maximum(each, 1))

    pair_tiles = jnp.repeat(tiles, heads, total_repeat_length=len(tiles) * heads)
    begin = jnp.cumsum(pair_tiles) - pair_tiles
    from_stream, to_stream = stream_of(begin), stream_of(begin + pair_tiles - 1)
    pairs = jnp.stack([from_stream, jnp.where(pair_tiles > 0, to_stream - from_stream + 1, 0)], axis=1)
    return requests.astype(jnp.int32), table.astype(jnp.int32), pairs.astype(jnp.int32)


def _scratch(shape: _Shape, dtype: Any) -> dict[str, Any]:
    """Shared memory of a block, for each stream."""

    def tiles(*sizes: int, dtype: Any = dtype):
        width = 128 // jnp.dtype(dtype).itemsize
        transforms = (plgpu.TilingTransform((_BOX, width)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((_STREAMS, *sizes), dtype, transforms=transforms)

    stages, block_k = shape.tiling.stages, shape.tiling.block_k
    many = _STREAMS * stages
    return {
        "q_smem": tiles(_ROWS, shape.head_dim),
        "k_smem": tiles(stages, block_k, shape.head_dim),
        "v_smem": tiles(stages, block_k, shape.head_dim),
        "out_smem": tiles(_ROWS, shape.head_dim, dtype=shape.tiling.part_dtype),
        "lse_smem": plgpu.SMEM((_STREAMS, _ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=_STREAMS),
        "k_ready": plgpu.Barrier(num_barriers=many),
        "v_ready": plgpu.Barrier(num_barriers=many),
        "k_tail_ready": plgpu.Barrier(num_arrivals=block_k // _BOX, num_barriers=many),
        "v_tail_ready": plgpu.Barrier(num_arrivals=block_k // _BOX, num_barriers=many),
        "k_free": plgpu.Barrier(num_barriers=many),
        "v_free": plgpu.Barrier(num_barriers=many),
    }


def _decode(q_ref, k_ref, v_ref, requests, streams, layer_ref, order, parts_ref, lse_ref, *, shape: _Shape, **scratch):
    """One block; `_schedule` has the tables, `_scratch` the rest.

    Args:
      q_ref: see `_Shape.query_tiles`.
      k_ref, v_ref: `[slots * slot_tokens, columns, head_dim]`.
      order: not used here: to have it makes the read come after the append that returned it.
      parts_ref, lse_ref: `[segments, rows, head_dim]` and `[segments, rows]`: results over some of the keys, and their
        log-sum-exp, base 2. What stream `s` finds for pair `p` is in row `p + s`, which no two have in common:
        from one piece of work to the next the pair, the stream or both are one higher.
    """
    del order
    warpgroup = lax.axis_index("warpgroup")
    local = lax.rem(warpgroup, _STREAMS)
    stream = lax.axis_index("block") * _STREAMS + local
    work = _Work(requests, streams, stream, local, shape)
    layer = layer_ref[0] * shape.column_stride

    @pl.when(warpgroup >= _STREAMS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _copy(work, layer, k_ref, v_ref, **scratch)

    @pl.when(warpgroup < _STREAMS)
    def _():
        plgpu.set_max_registers(208, action="increase")
        _multiply(work, q_ref, parts_ref, lse_ref, **scratch)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What one stream has to do: its part of the row of tiles, pair by pair."""

    requests: Any
    streams: Any
    stream: jax.Array
    local: jax.Array
    shape: _Shape

    @property
    def first_pair(self) -> jax.Array:
        return self.streams[self.stream, 0]

    @property
    def num_pairs(self) -> jax.Array:
        return self.streams[self.stream, 3]

    def each_pair(self, body, carry):
        """`carry = body(i, pair, request, head, first tile, end tile, carry)` for every pair."""
        first_tile, num_tiles = self.streams[self.stream, 1], self.streams[self.stream, 2]

        def step(i, state):
            left, carry = state
            pair = self.first_pair + i
            request, head = lax.div(pair, self.shape.num_kv_heads), lax.rem(pair, self.shape.num_kv_heads)
            first = jnp.where(i == 0, first_tile, 0)
            count = jnp.minimum(self.requests[request, 3] - first, left)
            return left - count, body(i, pair, request, head, first, first + count, carry)

        return lax.fori_loop(0, self.num_pairs, step, (num_tiles, carry))[1]

    def full_end(self, request, first, end):
        """One past the last of the tiles `first .. end - 1` that holds nothing but the request's tokens."""
        return jnp.clip(lax.div(self.requests[request, 2], self.shape.tiling.block_k), first, end)


def _copy(
    work: _Work,
    layer,
    k_ref,
    v_ref,
    *,
    k_smem,
    v_smem,
    k_ready,
    v_ready,
    k_tail_ready,
    v_tail_ready,
    k_free,
    v_free,
    **_,
):
    """The warpgroup that copies K and V."""
    block_k, stages = work.shape.tiling.block_k, work.shape.tiling.stages

    def pair(i, pair, request, head, first, end, count):
        base, length = pl.multiple_of(work.requests[request, 1], _BOX), work.requests[request, 2]
        columns = layer + head, layer + head + work.shape.v_column
        sides = (
            (k_ref, columns[0], k_smem, k_ready, k_tail_ready, k_free),
            (v_ref, columns[1], v_smem, v_ready, v_tail_ready, v_free),
        )

        def tile(tile, count, *, tail: bool):
            stage = lax.rem(count, stages)
            barrier = work.local * stages + stage
            for ref, column, smem, ready, tail_ready, free in sides:

                @pl.when(count >= stages)
                def _(free=free):
                    plgpu.barrier_wait(free.at[barrier])

                token = tile * block_k
                if not tail:
                    rows = pl.ds(pl.multiple_of(base + token, _BOX), block_k)
                    plgpu.copy_gmem_to_smem(ref.at[rows, column], smem.at[work.local, stage], ready.at[barrier])
                    continue
                for box in range(0, block_k, _BOX):
                    begin = jnp.where(token + box < length, token + box, token)
                    rows = pl.ds(pl.multiple_of(base + begin, _BOX), _BOX)
                    target = smem.at[work.local, stage, pl.ds(box, _BOX)]
                    plgpu.copy_gmem_to_smem(ref.at[rows, column], target, tail_ready.at[barrier])
            return count + 1

        full = work.full_end(request, first, end)
        count = lax.fori_loop(first, full, functools.partial(tile, tail=False), count)
        return lax.fori_loop(full, end, functools.partial(tile, tail=True), count)

    count = work.each_pair(pair, jnp.int32(0))

    def drain(tile, _):
        barrier = work.local * stages + lax.rem(tile, stages)
        plgpu.barrier_wait(k_free.at[barrier])
        plgpu.barrier_wait(v_free.at[barrier])

    lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)


def _multiply(
    work: _Work, q_ref, parts_ref, lse_ref, *, q_smem, k_smem, v_smem, out_smem, lse_smem,
    q_ready, k_ready, v_ready, k_tail_ready, v_tail_ready, k_free, v_free,
):  # fmt: skip
    """The warpgroup that computes."""
    shape, local = work.shape, work.local
    block_k, stages = shape.tiling.block_k, shape.tiling.stages
    q, out, lse = q_smem.at[local], out_smem.at[local], lse_smem.at[local]
    used = pl.ds(0, shape.rows)

    def load_q(pair):
        request, head = lax.div(pair, shape.num_kv_heads), lax.rem(pair, shape.num_kv_heads)
        tile = shape.query_tile(work.requests[request, 0], head)
        plgpu.copy_gmem_to_smem(q_ref.at[tile], q.at[used], q_ready.at[local])

    @pl.when(work.num_pairs > 0)
    def _():
        load_q(work.first_pair)

    def pair(i, pair, request, head, first, end, count):
        plgpu.barrier_wait(q_ready.at[local])
        length = work.requests[request, 2]

        def tile(tile, state, *, tail: bool):
            count, maximum, total, acc = state
            stage = lax.rem(count, stages)
            barrier = local * stages + stage
            k, v = k_smem.at[local, stage], v_smem.at[local, stage]
            plgpu.barrier_wait((k_tail_ready if tail else k_ready).at[barrier])

            def scores(ref):
                plgpu.wgmma(ref, q, k.transpose((1, 0)))
                return ref[...]

            qk = pl.run_scoped(scores, plgpu.ACC((_ROWS, block_k), jnp.float32))
            plgpu.barrier_arrive(k_free.at[barrier])
            if shape.soft_cap is None:
                qk = qk * (shape.scale * _LOG2_E)
            else:
                qk = jnp.tanh(qk * (shape.scale / shape.soft_cap)) * (shape.soft_cap * _LOG2_E)
            if tail:
                qk = jnp.where(_valid((_ROWS, block_k), 1, tile * block_k, length), qk, -jnp.inf)
            new_maximum = jnp.maximum(maximum, qk.max(axis=1))
            shrink = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(qk - lax.broadcast_in_dim(new_maximum, qk.shape, [0]))
            total = total * shrink + weights.sum(axis=1)
            weights = weights.astype(q.dtype)
            plgpu.barrier_wait((v_tail_ready if tail else v_ready).at[barrier])
            if tail:
                # Whatever lies behind the last token, NaN too, times a weight of 0 must be 0.
                values = plgpu.load(v, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]  # jax 0.10 has another signature
                valid = _valid((block_k, shape.head_dim), 0, tile * block_k, length)
                v[...] = jnp.where(valid, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            def weighted_sum(ref):
                plgpu.wgmma(ref, weights, v)
                return ref[...]

            added = pl.run_scoped(weighted_sum, plgpu.ACC((_ROWS, shape.head_dim), jnp.float32))
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + added
            plgpu.barrier_arrive(v_free.at[barrier])
            return count + 1, new_maximum, total, acc

        row = plgpu.Layout.WGMMA.reduce(1)
        state = (
            count,
            plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), row),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), row),
            plgpu.layout_cast(jnp.zeros((_ROWS, shape.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        )
        full = work.full_end(request, first, end)
        state = lax.fori_loop(first, full, functools.partial(tile, tail=False), state)
        count, maximum, total, acc = lax.fori_loop(full, end, functools.partial(tile, tail=True), state)

        @pl.when(i + 1 < work.num_pairs)
        def _():
            load_q(pair + 1)

        @pl.when(first < end)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(out.dtype)
            lse[...] = maximum + jnp.log2(total)
            plgpu.commit_smem()
            segment = pair + work.stream
            plgpu.copy_smem_to_gmem(out.at[used], parts_ref.at[segment])
            plgpu.copy_smem_to_gmem(lse.at[used], lse_ref.at[segment])

        return count

    work.each_pair(pair, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _valid(sizes: tuple[int, int], axis: int, first, length) -> jax.Array:
    """bool `sizes`: which tokens of the tile that begins with `first` are the request's."""
    at = plgpu.broadcasted_iota(jnp.int32, sizes, axis, layout=plgpu.Layout.WGMMA)
    return first + at < length


def _combine(parts, lse, pairs, q, order, batch: RaggedBatch, features: Features, shape: _Shape, interpret: bool):
    """Joins what several streams found for a pair. Returns `(out, order)`."""
    tokens, num_requests = q.shape[0], batch.num_requests
    at = jnp.where(batch.q_lens > 0, batch.q_starts, tokens)
    owners = jnp.full(tokens, -1, jnp.int32).at[at].set(jnp.arange(num_requests, dtype=jnp.int32), mode="drop")
    order, out = pl.pallas_call(
        functools.partial(_combine_kernel, shape=shape),
        out_shape=[jax.ShapeDtypeStruct(order.shape, order.dtype), jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=(shape.num_kv_heads, tokens),
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="attention_decode_combine",
    )(order, owners, pairs, parts, lse, features.sinks)
    return out, order


def _combine_kernel(_, owners, pairs, parts, lse, sinks, __, out_ref, *, shape: _Shape):
    """The query heads of one token that share a KV head; zeros if no request owns the token."""
    head, token = pl.program_id(0), pl.program_id(1)
    owner = owners[token]
    pair = jnp.maximum(owner, 0) * shape.num_kv_heads + head
    first = pair + pairs[pair, 0]
    end = first + jnp.where(owner < 0, 0, pairs[pair, 1])
    rows, dim = jnp.arange(pl.next_power_of_2(shape.group)), jnp.arange(pl.next_power_of_2(shape.head_dim))
    used = rows < shape.group
    tile_used = used[:, None] & (dim < shape.head_dim)[None, :]
    own_rows = shape.first_row(head) + rows
    # As many at a time as registers hold: one after the other, each would wait for memory.
    chunk = max(1, _COMBINED_ELEMENTS // (rows.size * dim.size))

    def add(i, state):
        maximum, total, acc = state
        segment = first + i * chunk + jnp.arange(chunk)
        there = (segment < end)[:, None] & used[None, :]
        part_lse = triton.load(lse.at[segment[:, None], own_rows[None, :]], mask=there, other=-jnp.inf)
        at = parts.at[segment[:, None, None], own_rows[None, :, None], dim[None, None, :]]
        mask = there[:, :, None] & tile_used[None, :, :]
        part = triton.load(at, mask=mask, other=0).astype(jnp.float32)
        new_maximum = jnp.where(used, jnp.maximum(maximum, part_lse.max(axis=0)), 0)
        shrink, weights = jnp.exp2(maximum - new_maximum), jnp.exp2(part_lse - new_maximum[None, :])
        acc = acc * shrink[:, None] + (part * weights[:, :, None]).sum(axis=0)
        return new_maximum, total * shrink + weights.sum(axis=0), acc

    init = (
        jnp.full(rows.shape, -jnp.inf, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
        jnp.zeros((rows.size, dim.size), jnp.float32),
    )
    maximum, total, acc = lax.fori_loop(0, pl.cdiv(end - first, chunk), add, init)
    if sinks is not None:
        sink = triton.load(sinks.at[head * shape.group + rows], mask=used, other=0)
        total += jnp.exp2(sink * _LOG2_E - maximum)
    out = acc / jnp.where(total == 0, 1, total)[:, None]
    at = out_ref.at[token, (head * shape.group + rows)[:, None], dim[None, :]]
    triton.store(at, out.astype(out_ref.dtype), mask=tile_used)
