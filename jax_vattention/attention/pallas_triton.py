"""Attention through Pallas' Triton backend: NVIDIA GPUs from the A100 on.

Prefill follows FlashAttention-2 (Dao, arXiv 2307.08691): one program per tile of queries, an online softmax
(Milakov and Gimelshein, arXiv 1805.02867) over tiles of keys. Decode follows Flash-Decoding (Dao, Haziza, Massa and
Sizov, 2023): the keys of a request are split over several programs, whose partial results are combined afterwards.
The query heads that share a KV head are rows of one tile, so K and V are read once for all of them.

The view of the cache is addressed in place, with masked loads: an address at or past a request's length is never
read, and none at all for a request without queries.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_vattention.batch import RaggedBatch

_LOG2_E = math.log2(math.e)

_MIN_ROWS = 16
"""Rows of the smallest matrix product of a tensor core."""

_TARGET_PROGRAMS = 256
"""Programs that keep a GPU of 100 to 150 multiprocessors busy; decode splits keys until it has about so many."""

_MAX_SPLITS = 64
"""Splitting keys finer than this costs more in the combination than it gains."""


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Static sizes of a kernel. A row is a pair of a query and one of the `group` heads that share a KV head."""

    group: int
    head_dim: int
    rows: int
    """Rows of a tile, a power of two."""
    row_tiles: int
    """Tiles that the longest request may need."""
    block_k: int
    """Keys of a tile, a power of two."""
    splits: int
    """Programs that share the keys of one row tile."""
    num_warps: int
    num_stages: int

    @property
    def padded_dim(self) -> int:
        """`head_dim` rounded up to the power of two that a Triton tile needs; the rest is masked."""
        return max(16, pl.next_power_of_2(self.head_dim))


def _tiling(q_shape, view_shape, batch: RaggedBatch, compute_dtype) -> _Tiling:
    tokens, num_q_heads, head_dim = q_shape
    num_kv_heads = view_shape[4]
    group = num_q_heads // num_kv_heads
    # Tiles shrink with the bytes of a row, so that K and V tiles of all stages fit in the shared memory.
    row_bytes = pl.next_power_of_2(head_dim) * jnp.dtype(compute_dtype).itemsize
    max_rows, block_k = (128, 64) if row_bytes <= 256 else (64, 32) if row_bytes <= 512 else (32, 32)
    needed_rows = min(batch.max_q_len, tokens) * group
    rows = min(max_rows, max(_MIN_ROWS, pl.next_power_of_2(needed_rows)))
    row_tiles = pl.cdiv(needed_rows, rows)
    splits = 1
    if batch.max_q_len == 1:
        programs = batch.num_requests * num_kv_heads * row_tiles
        # Whatever the maximum length: it may change no buffer of a program.
        splits = min(_MAX_SPLITS, pl.next_power_of_2(pl.cdiv(_TARGET_PROGRAMS, programs)))
    num_warps = 8 if rows >= 128 else 4
    return _Tiling(group, head_dim, rows, row_tiles, block_k, splits, num_warps, num_stages=2)


def run(
    q: jax.Array,
    view: jax.Array,
    order: jax.Array,
    layer: jax.Array,
    batch: RaggedBatch,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; works on the arrays of the cache and returns `(out, order)`."""
    tokens, num_q_heads, _ = q.shape
    tiling = _tiling(q.shape, view.shape, batch, jnp.promote_types(q.dtype, view.dtype))
    if tiling.splits == 1:
        results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        results = [
            jax.ShapeDtypeStruct((tiling.splits, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((tiling.splits, tokens, num_q_heads), jnp.float32),
        ]
    scalars = (batch.slots, batch.q_starts, batch.q_lens, batch.kv_lens, layer.reshape(1))
    operands = (order, *scalars, q, view)
    order_out, *results = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, scale=scale),
        out_shape=[jax.ShapeDtypeStruct(order.shape, order.dtype), *results],
        grid=(tiling.row_tiles * tiling.splits, view.shape[4], batch.num_requests),
        # The order token passes through, so that the read comes after one append and before the next.
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
        interpret=interpret,
        name="attention_decode" if batch.max_q_len == 1 else "attention_prefill",
    )(*operands)
    out = results[0] if tiling.splits == 1 else _combine(*results)
    # No program writes the rows of padding tokens: what they hold is not initialised.
    return jnp.where(_owned(batch, tokens)[:, None, None], out, 0).astype(q.dtype), order_out


def _kernel(
    order_ref,  # [4], aliased to order_out_ref
    slots_ref,  # [requests]
    q_starts_ref,  # [requests]
    q_lens_ref,  # [requests]
    kv_lens_ref,  # [requests]
    layer_ref,  # [1]
    q_ref,  # [tokens, num_q_heads, head_dim]
    view_ref,  # [num_slots, slot_tokens, num_layers, 2, num_kv_heads, head_dim]
    order_out_ref,
    out_ref,  # [tokens, num_q_heads, head_dim], or a partial result per split in front
    lse_ref=None,  # [splits, tokens, num_q_heads], base 2; only if the keys are split
    *,
    tiling: _Tiling,
    scale: float,
):
    """One tile of rows of one request and one KV head against one split of the keys."""
    del order_ref, order_out_ref
    row_tile, split = pl.program_id(0) // tiling.splits, pl.program_id(0) % tiling.splits
    kv_head, request = pl.program_id(1), pl.program_id(2)
    q_len = q_lens_ref[request]
    first_row = row_tile * tiling.rows

    @pl.when(first_row < q_len * tiling.group)
    def _():
        rows = first_row + jnp.arange(tiling.rows, dtype=jnp.int32)
        query = rows // tiling.group
        head = kv_head * tiling.group + rows % tiling.group
        owned = query < q_len
        token = q_starts_ref[request] + query
        position = kv_lens_ref[request] - q_len + query

        dim = jnp.arange(tiling.padded_dim, dtype=jnp.int32)[None, :]
        row_mask = owned[:, None] & (dim < tiling.head_dim)
        q = plgpu.load(q_ref.at[token[:, None], head[:, None], dim], mask=row_mask, other=0)

        last_query = jnp.minimum(q_len - 1, (first_row + tiling.rows - 1) // tiling.group)
        num_keys = kv_lens_ref[request] - q_len + last_query + 1
        maximum, total, acc = _attend(
            q, position, view_ref, slots_ref[request], layer_ref[0], kv_head, num_keys, split, tiling, scale
        )
        # A split without keys has total 0: its log-sum-exp is -inf, and the combination skips it.
        acc = acc / jnp.where(total == 0, 1, total)[:, None]
        if lse_ref is None:
            out_at = out_ref.at[token[:, None], head[:, None], dim]
        else:
            out_at = out_ref.at[split, token[:, None], head[:, None], dim]
            plgpu.store(lse_ref.at[split, token, head], maximum + jnp.log(total) * _LOG2_E, mask=owned)
        plgpu.store(out_at, acc.astype(out_ref.dtype), mask=row_mask)


def _attend(q, position, view_ref, slot, layer, kv_head, num_keys, split, tiling: _Tiling, scale: float):
    """Online softmax, base 2, of `q` `[rows, padded_dim]` over its split of the keys `0 .. num_keys - 1`.

    Returns `(maximum [rows], total [rows], acc [rows, padded_dim])` in float32.
    """
    block_k = tiling.block_k
    dim = jnp.arange(tiling.padded_dim, dtype=jnp.int32)[None, :]
    compute_dtype = jnp.promote_types(q.dtype, view_ref.dtype)
    q = q.astype(compute_dtype)
    # float32 is multiplied as float32, not as TF32.
    precision = lax.Precision.HIGHEST if compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    def load(which, tokens, mask):
        at = view_ref.at[slot, tokens[:, None], layer, which, kv_head, dim]
        return plgpu.load(at, mask=mask, other=0).astype(compute_dtype)

    def product(a, b, b_dim):
        return lax.dot_general(
            a, b, (((1,), (b_dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def step(block, state):
        maximum, total, acc = state
        tokens = block * block_k + jnp.arange(block_k, dtype=jnp.int32)
        mask = (tokens < num_keys)[:, None] & (dim < tiling.head_dim)
        scores = product(q, load(0, tokens, mask), 1) * (scale * _LOG2_E)
        scores = jnp.where(tokens[None, :] <= position[:, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_maximum[:, None])
        shrink = jnp.exp2(maximum - new_maximum)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + product(weights.astype(compute_dtype), load(1, tokens, mask), 0)
        return new_maximum, total, acc

    blocks = pl.cdiv(num_keys, block_k)
    split_blocks = pl.cdiv(blocks, tiling.splits)
    first = split * split_blocks
    # Every row sees a key of its first tile (key 0, or any key in decode), so no maximum stays -inf.
    init = (
        jnp.full((tiling.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((tiling.rows,), jnp.float32),
        jnp.zeros((tiling.rows, tiling.padded_dim), jnp.float32),
    )
    return lax.fori_loop(first, jnp.minimum(first + split_blocks, blocks), step, init)


def _combine(parts: jax.Array, lse: jax.Array) -> jax.Array:
    """Joins the splits: `parts` `[splits, tokens, heads, dim]`, their log-sum-exp base 2 `[splits, tokens, heads]`."""
    weights = jnp.exp2(lse - lse.max(0))
    weights = weights / weights.sum(0)
    return jnp.sum(parts * weights[..., None], axis=0)


def _owned(batch: RaggedBatch, tokens: int) -> jax.Array:
    """bool `[tokens]`: tokens that belong to a request; one fusion, which layers can share, unlike a search."""
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    return jnp.any((token >= batch.q_starts) & (token < batch.q_starts + batch.q_lens), axis=1)
