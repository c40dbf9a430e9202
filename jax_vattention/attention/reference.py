"""Attention in plain JAX: for any platform, and the default on a CPU.

Blockwise attention with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Rabe and Staats,
arXiv 2112.05682), in float32. Temporary memory is a few tiles: it depends on no length and on no size of the cache.
Of a float8 cache the scales of K are a part of the queries, and those of V are applied to the result.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_vattention import ffi
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

_BLOCK_Q = 64
"""Queries of a tile."""

_BLOCK_K = 64
"""Keys of a tile. Shorter tiles cost loop overhead; longer ones cost requests shorter than a tile, read whole."""

_MAX_MERGED_KV_HEADS = 4
"""Decode with up to this many KV heads multiplies all heads at once (see `_merged_scores`)."""


class _Softmax(NamedTuple):
    """State of an online softmax."""

    maximum: jax.Array  # [num_kv_heads, group, block_q] largest score so far
    total: jax.Array  # [num_kv_heads, group, block_q] sum of exp(score - maximum)
    acc: jax.Array  # [num_kv_heads, group, block_q, head_dim] sum of exp(score - maximum) * V


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys and values of one request in one layer, read tile by tile."""

    view: LayerView
    order: jax.Array  # int32 [4]
    slot: jax.Array  # int32
    kv_len: jax.Array  # int32

    @property
    def block_k(self) -> int:
        """Keys of a tile."""
        return min(_BLOCK_K, self.view.slot_tokens)

    def blocks(self, last: jax.Array) -> tuple[jax.Array | int, jax.Array]:
        """The first tile that queries with ascending `last` keys see, and one past the last."""
        end = last[-1] // self.block_k + 1
        if self.view.window is None:
            return 0, end
        return jnp.maximum(last[0] - self.view.window + 1, 0) // self.block_k, end

    def visible(self, last: jax.Array, key_positions: jax.Array) -> jax.Array:
        """bool `[queries, keys]`."""
        seen = key_positions[None, :] <= last[:, None]
        if self.view.window is not None:
            seen &= key_positions[None, :] > last[:, None] - self.view.window
            seen &= key_positions[None, :] >= self.view.mapped[0, self.slot]
        return seen

    def tile(self, block: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """K and V `[block_k, num_kv_heads, head_dim]` in float32 and the positions of the keys `[block_k]`.

        Only mapped tokens before `kv_len` are read; the positions of others hold something finite.
        """
        positions = block * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)
        operands = (self.view, self.order, self.slot, self.kv_len, positions)
        k, v = lax.platform_dependent(*operands, cpu=_tile_by_custom_call, default=_tile_by_gather)
        return k.astype(jnp.float32), v.astype(jnp.float32), positions


def _tile_by_custom_call(view: LayerView, order, slot, kv_len, positions):
    tile = ffi.read_tile(
        *view.views,
        layer=view.layer,
        slot=slot,
        start=positions[0],
        first=view.mapped[0, slot],
        last=kv_len,
        tokens=positions.size,
        order=order,
    )
    return tile[0], tile[1]


def _tile_by_gather(view: LayerView, order, slot, kv_len, positions):
    positions = jnp.maximum(jnp.minimum(positions, kv_len - 1), view.mapped[0, slot])
    # order[0] counts dropped writes, which XLA cannot know to be >= 0: every address depends on the last append.
    positions = positions + jnp.minimum(order[0], 0)
    if view.v is None:
        run, token = positions // KV_TAIL_TOKENS, positions % KV_TAIL_TOKENS
        at = view.k.at[slot, run[:, None], view.layer, jnp.arange(2)[None, :], token[:, None]]
        tile = at.get(mode="promise_in_bounds")
        return tile[:, 0], tile[:, 1]
    return tuple(each.at[slot, positions].get(mode="promise_in_bounds") for each in view.views)


def run(
    q: jax.Array, view: LayerView, order: jax.Array, batch: RaggedBatch, features: Features, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = view.num_kv_heads
    block_q = min(_BLOCK_Q, batch.max_q_len, tokens)
    grouped = q.reshape(tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    # A tile behind the last token: dynamic_slice would otherwise move a tile that reaches past the end.
    grouped = jnp.pad(grouped, ((0, block_q), (0, 0), (0, 0), (0, 0)))
    sinks = None if features.sinks is None else features.sinks.reshape(num_kv_heads, -1, 1)
    # Each [num_kv_heads, 1, 1], as the heads of queries and of results are.
    k_scales, v_scales = (None, None) if view.scales is None else view.scales[..., None, None]

    def request(r, carry):
        keys = _Keys(view, order, batch.slots[r], batch.kv_lens[r])
        q_start, q_len = batch.q_starts[r], batch.q_lens[r]

        def tile(i, carry):
            out, negatives = carry
            at = q_start + i * block_q
            rows = jnp.arange(block_q, dtype=jnp.int32) + i * block_q
            q_tile = lax.dynamic_slice_in_dim(grouped, at, block_q).astype(jnp.float32) * scale
            q_tile = q_tile if k_scales is None else q_tile * k_scales
            last = keys.kv_len - q_len + jnp.minimum(rows, q_len - 1)
            if features.prefix_lens is not None:
                last = jnp.maximum(last, features.prefix_lens[r] - 1)
            state = _attend(q_tile, keys, last, features.soft_cap)
            total = state.total if sinks is None else state.total + jnp.exp(sinks - state.maximum)
            old = lax.dynamic_slice_in_dim(out, at, block_q)
            new = state.acc / total[..., None]
            new = new if v_scales is None else new * v_scales[..., None]
            new = jnp.moveaxis(new, 2, 0).astype(q.dtype)
            new = jnp.where((rows < q_len)[:, None, None, None], new, old)
            out = lax.dynamic_update_slice_in_dim(out, new, at, 0)
            return out, negatives + jnp.any(state.total < 0).astype(jnp.int32)

        return lax.fori_loop(0, (q_len + block_q - 1) // block_q, tile, carry)

    init = (jnp.zeros_like(grouped), jnp.zeros((), jnp.int32))
    out, negatives = lax.fori_loop(0, batch.num_requests, request, init)
    # A sum of exponentials is never negative, so 0 is added, but only the finished read can tell: the next append
    # waits for it. (A loop counter would not do: XLA knows its final value.)
    return out[:tokens].reshape(q.shape), order + negatives


def _attend(q: jax.Array, keys: _Keys, last: jax.Array, soft_cap: float | None) -> _Softmax:
    """One tile of queries, over all keys that they see.

    Args:
      q: float32 `[block_q, num_kv_heads, group, head_dim]`, scaled.
      keys: of the request.
      last: int32 `[block_q]`, ascending: the last key that each query sees.
      soft_cap: bound of the scores, or None.
    """
    block_q, num_kv_heads, group, head_dim = q.shape
    merged = block_q == 1 and num_kv_heads <= _MAX_MERGED_KV_HEADS
    score, weigh = (_merged_scores, _merged_sum) if merged else (_scores, _weighted_sum)

    def step(block, state: _Softmax) -> _Softmax:
        k, v, key_positions = keys.tile(block)
        scores = jnp.where(keys.visible(last, key_positions), _capped(score(q, k), soft_cap), -jnp.inf)
        maximum = jnp.maximum(state.maximum, scores.max(-1))
        # With a window a query may see nothing of the first tiles: its maximum is -inf until it does.
        base = maximum if keys.view.window is None else jnp.where(maximum == -jnp.inf, 0, maximum)
        weights = jnp.exp(scores - base[..., None])
        shrink = jnp.exp(state.maximum - base)
        total = state.total * shrink + weights.sum(-1)
        return _Softmax(maximum, total, state.acc * shrink[..., None] + weigh(weights, v))

    shape = (num_kv_heads, group, block_q)
    init = _Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    # Every query sees a key, itself if no other: no maximum stays -inf. Without a window the first tile has one, key 0.
    return lax.fori_loop(*keys.blocks(last), step, init)


def _capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`[num_kv_heads, group, block_q, block_k]`."""
    return jnp.einsum("qhgd,khd->hgqk", q, k, precision=lax.Precision.HIGHEST)


def _weighted_sum(weights: jax.Array, v: jax.Array) -> jax.Array:
    """`[num_kv_heads, group, block_q, head_dim]`."""
    return jnp.einsum("hgqk,khd->hgqd", weights, v, precision=lax.Precision.HIGHEST)


def _merged_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """`_scores` for one query as one matrix product: each head's query is 0 in the columns of other heads.

    XLA's CPU backend would transpose every K tile for a product per head, which takes longer than the
    needless multiplications with 0.
    """
    _, heads, group, dim = q.shape
    same_head = jnp.eye(heads, dtype=bool)[:, None, :, None]
    spread = jnp.where(same_head, q[0][:, :, None, :], 0).reshape(heads * group, heads * dim)
    scores = jnp.matmul(spread, k.reshape(-1, heads * dim).T, precision=lax.Precision.HIGHEST)
    return scores.reshape(heads, group, 1, -1)


def _merged_sum(weights: jax.Array, v: jax.Array) -> jax.Array:
    """`_weighted_sum` for one query as one matrix product, of which each head keeps its own columns."""
    heads, group, _, block_k = weights.shape
    flat = jnp.matmul(
        weights.reshape(heads * group, block_k), v.reshape(block_k, -1), precision=lax.Precision.HIGHEST
    ).reshape(heads, group, heads, -1)
    return jnp.stack([flat[h, :, h] for h in range(heads)])[:, :, None, :]
