"""Attention through Pallas' Triton backend: NVIDIA GPUs from the A100 on.

Prefill follows FlashAttention-2 (Dao, arXiv 2307.08691): one program per tile of queries, an online softmax
(Milakov and Gimelshein, arXiv 1805.02867) over tiles of keys. Decode follows Flash-Decoding (Dao, Haziza, Massa and
Sizov, 2023): the keys of a request are split over several programs, whose partial results are combined afterwards.
The query heads that share a KV head are rows of one tile, so K and V are read once for all of them.

The view of the cache is addressed in place, with masked loads: an address at or past a request's length is never
read, and none at all for a request without queries. Tiles of float8 are multiplied in the dtype of the queries; the
scale of K is a part of the scores' scale, and that of V is applied to the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

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


def _tiling(q_shape, num_kv_heads: int, batch: RaggedBatch, compute_dtype) -> _Tiling:
    tokens, num_q_heads, head_dim = q_shape
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


def _compute_dtype(q_dtype: Any, kv_dtype: Any) -> Any:
    """What tiles are multiplied in. Every float8 is exact in any of the dtypes that queries have."""
    return q_dtype if kv_dtype.itemsize == 1 else jnp.promote_types(q_dtype, kv_dtype)


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    del q, batch, features
    # Pallas counts elements with 64 bits in arrays of more than 4 GiB only: `KVGroup.slot_tokens` avoids those between.
    if view.k.dtype.itemsize == 1 and 2**31 < view.k.size <= 2**32:
        return f"a view of {view.k.size} bytes: more slots or a larger max_seq_len make it larger than 4 GiB"
    return None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    tokens, num_q_heads, _ = q.shape
    tiling = _tiling(q.shape, view.num_kv_heads, batch, _compute_dtype(q.dtype, view.k.dtype))
    if tiling.splits == 1:
        results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        results = [
            jax.ShapeDtypeStruct((tiling.splits, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((tiling.splits, tokens, num_q_heads), jnp.float32),
        ]
    firsts = () if view.window is None else (view.mapped[0],)
    scalars = (batch.slots, batch.q_starts, batch.q_lens, batch.kv_lens, view.layer.reshape(1), *firsts)
    views = (view.k,) if view.v is None else (view.k, view.v)
    # Splits do not know of sinks: the combination adds them.
    in_kernel = features if tiling.splits == 1 else dataclasses.replace(features, sinks=None)
    order_out, *results = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling, scale=scale, window=view.window),
        out_shape=[jax.ShapeDtypeStruct(order.shape, order.dtype), *results],
        grid=(tiling.row_tiles * tiling.splits, view.num_kv_heads, batch.num_requests),
        # The order token passes through, so that the read comes after one append and before the next.
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages),
        interpret=interpret,
        name="attention_decode" if batch.max_q_len == 1 else "attention_prefill",
    )(order, scalars, q, views, view.scale_table, in_kernel)
    out = results[0] if tiling.splits == 1 else _combine(*results, sinks=features.sinks)
    # No program writes the rows of padding tokens: what they hold is not initialised.
    return jnp.where(_owned(batch, tokens)[:, None, None], out, 0).astype(q.dtype), order_out


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Where one program reads K and V: one KV head of one request in one layer."""

    views: Sequence[Any]  # refs: one [slots, runs, layers, 2, 16, heads, dim], or two [slots, tokens, heads, dim]
    slot: jax.Array
    layer: jax.Array
    kv_head: jax.Array
    window: int | None
    first: jax.Array | int
    """The first token with memory behind it."""

    @property
    def dtype(self) -> Any:
        return self.views[0].dtype

    def at(self, which: int, tokens: jax.Array, dim: jax.Array):
        """A ref of K (`which` 0) or V (1), `[tokens, dim]`."""
        if len(self.views) == 1:
            run, token = tokens[:, None] // KV_TAIL_TOKENS, tokens[:, None] % KV_TAIL_TOKENS
            return self.views[0].at[self.slot, run, self.layer, which, token, self.kv_head, dim]
        return self.views[which].at[self.slot, tokens[:, None], self.kv_head, dim]

    def begin(self, position: jax.Array) -> jax.Array | int:
        """The first key that a query sees."""
        return 0 if self.window is None else jnp.maximum(position - self.window + 1, self.first)

    def visible(self, last: jax.Array, tokens: jax.Array) -> jax.Array:
        """bool `[queries, keys]`."""
        seen = tokens[None, :] <= last[:, None]
        return seen if self.window is None else seen & (tokens[None, :] > last[:, None] - self.window)


def _kernel(
    _order_ref,
    scalars,
    q_ref,
    views,
    scales_ref,
    features,
    _order_out_ref,
    out_ref,
    *lse_refs,
    tiling: _Tiling,
    scale: float,
    window: int | None,
):
    """One tile of rows of one request and one KV head against one split of the keys.

    Args:
      _order_ref, _order_out_ref: `[4]`, the same memory.
      scalars: refs of slots, q_starts, q_lens, kv_lens `[requests]`, layer `[1]` and, with a window, the first token of
        each slot with memory behind it `[num_slots]`.
      q_ref: `[tokens, num_q_heads, head_dim]`.
      views: refs as `_Keys` has them.
      scales_ref: `[layers, 2, num_kv_heads]` of a float8 cache, or None.
      features: Features with refs in place of arrays.
      out_ref: `[tokens, num_q_heads, head_dim]`; with split keys a partial result per split in front.
      lse_refs: with split keys their log-sum-exp, base 2, `[splits, tokens, num_q_heads]`.
      tiling, scale, window: static.
    """
    slots_ref, q_starts_ref, q_lens_ref, kv_lens_ref, layer_ref, *first_ref = scalars
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
        last_key = kv_lens_ref[request] - q_len + query

        dim = jnp.arange(tiling.padded_dim, dtype=jnp.int32)[None, :]
        row_mask = owned[:, None] & (dim < tiling.head_dim)
        q = plgpu.load(q_ref.at[token[:, None], head[:, None], dim], mask=row_mask, other=0)

        slot = slots_ref[request]
        keys = _Keys(views, slot, layer_ref[0], kv_head, window, first_ref[0][slot] if first_ref else 0)
        offset = kv_lens_ref[request] - q_len
        last_query = jnp.minimum(q_len - 1, (first_row + tiling.rows - 1) // tiling.group)
        begin, end = keys.begin(offset + first_row // tiling.group), offset + last_query + 1
        if features.prefix_lens is not None:
            prefix_len = features.prefix_lens[request]
            last_key, end = jnp.maximum(last_key, prefix_len - 1), jnp.maximum(end, prefix_len)
        score_scale = scale if scales_ref is None else scale * scales_ref[keys.layer, 0, kv_head]
        maximum, total, acc = _attend(q, last_key, keys, (begin, end), split, tiling, score_scale, features.soft_cap)
        if features.sinks is not None:
            sinks = plgpu.load(features.sinks.at[head])
            total = total + jnp.exp2(sinks * _LOG2_E - maximum)
        # A split without keys has total 0: its log-sum-exp is -inf, and the combination skips it.
        acc = acc / jnp.where(total == 0, 1, total)[:, None]
        if scales_ref is not None:
            acc = acc * scales_ref[keys.layer, 1, kv_head]
        if not lse_refs:
            out_at = out_ref.at[token[:, None], head[:, None], dim]
        else:
            out_at = out_ref.at[split, token[:, None], head[:, None], dim]
            plgpu.store(lse_refs[0].at[split, token, head], maximum + jnp.log(total) * _LOG2_E, mask=owned)
        plgpu.store(out_at, acc.astype(out_ref.dtype), mask=row_mask)


def _attend(q, last_key, keys: _Keys, bounds, split, tiling: _Tiling, scale, soft_cap: float | None):
    """Online softmax, base 2, of `q` `[rows, padded_dim]` over its split of the keys `bounds[0] .. bounds[1] - 1`.

    A row sees the keys up to `last_key` `[rows]`, or those of its window.

    Returns `(maximum [rows], total [rows], acc [rows, padded_dim])` in float32.
    """
    block_k = tiling.block_k
    dim = jnp.arange(tiling.padded_dim, dtype=jnp.int32)[None, :]
    compute_dtype = _compute_dtype(q.dtype, keys.dtype)
    q = q.astype(compute_dtype)
    # float32 is multiplied as float32, not as TF32.
    precision = lax.Precision.HIGHEST if compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    def load(which, tokens, mask):
        if keys.dtype.itemsize > 1:
            return plgpu.load(keys.at(which, tokens, dim), mask=mask, other=0).astype(compute_dtype)
        stored = plgpu.load(keys.at(which, tokens, dim), mask=mask, other=jnp.zeros((), keys.dtype))
        return _widened(stored).astype(compute_dtype)

    def product(a, b, b_dim):
        return lax.dot_general(
            a, b, (((1,), (b_dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def scored(products):
        if soft_cap is None:
            return products * (scale * _LOG2_E)
        return jnp.tanh(products * (scale / soft_cap)) * (soft_cap * _LOG2_E)

    def step(block, state):
        maximum, total, acc = state
        tokens = block * block_k + jnp.arange(block_k, dtype=jnp.int32)
        read = tokens < bounds[1] if keys.window is None else (tokens < bounds[1]) & (tokens >= bounds[0])
        mask = read[:, None] & (dim < tiling.head_dim)
        scores = scored(product(q, load(0, tokens, mask), 1))
        scores = jnp.where(keys.visible(last_key, tokens) & read, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        # With a window a row may see nothing of the first tiles: its maximum is -inf until it does.
        base = new_maximum if keys.window is None else jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        weights = jnp.exp2(scores - base[:, None])
        shrink = jnp.exp2(maximum - base)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + product(weights.astype(compute_dtype), load(1, tokens, mask), 0)
        return new_maximum, total, acc

    start = bounds[0] // block_k
    end = pl.cdiv(bounds[1], block_k)
    split_blocks = pl.cdiv(end - start, tiling.splits)
    first = start + split * split_blocks
    # Every row sees a key, itself if no other, so no maximum stays -inf. Without a window every row of a tile with
    # keys sees one of them (key 0, or any key in decode).
    init = (
        jnp.full((tiling.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((tiling.rows,), jnp.float32),
        jnp.zeros((tiling.rows, tiling.padded_dim), jnp.float32),
    )
    return lax.fori_loop(first, jnp.minimum(first + split_blocks, end), step, init)


def _widened(stored: jax.Array) -> jax.Array:
    """float8_e4m3fn as float16, from its bits: Triton converts it only for GPUs from compute capability 8.9 on."""
    bits = lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint16)
    # The exponent of float16 has one bit more, and a bias of 15 in place of 7; subnormal numbers come out right too.
    wide = lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16) * jnp.float16(256)
    return jnp.where(bits & 0x7F == 0x7F, jnp.float16(jnp.nan), wide)


def _combine(parts: jax.Array, lse: jax.Array, *, sinks: jax.Array | None) -> jax.Array:
    """Joins the splits: `parts` `[splits, tokens, heads, dim]`, their log-sum-exp base 2 `[splits, tokens, heads]`."""
    maximum = lse.max(0)
    weights = jnp.exp2(lse - maximum)
    total = weights.sum(0)
    if sinks is not None:
        total = total + jnp.exp2(sinks * _LOG2_E - maximum)
    return jnp.sum(parts * (weights / total)[..., None], axis=0)


def _owned(batch: RaggedBatch, tokens: int) -> jax.Array:
    """bool `[tokens]`: tokens that belong to a request; one fusion, which layers can share, unlike a search."""
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    return jnp.any((token >= batch.q_starts) & (token < batch.q_starts + batch.q_lens), axis=1)
