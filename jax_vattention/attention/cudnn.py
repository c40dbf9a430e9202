"""Attention through cuDNN, unmodified, as `jax.nn.dot_product_attention` calls it: decode on `layer_major` caches.

cuDNN knows nothing of slots: row `i` of the queries attends to row `i` of K and V. So the queries are brought into the
order of the slots, a slot of no request has the length 0, and the results are brought back. Only those small arrays
are copied: K and V are the cache's own, whole.

cuDNN has to find every key of a tile in memory, and something finite in those behind a request's last token: they may
get the weight 0, and 0 * NaN is NaN. (cuDNN 9.19 on an H100 lets none through, which nobody promises.) Pages end where
tiles end, or `refusal` says so; they are zeroed before they come to a request (`KVCacheManager(zero_pages=True)`), so
what they hold is finite unless the model itself wrote NaN there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import DEFAULT_PAGE_BYTES

_TILE = 128
"""Keys that cuDNN may load at once, to the last of them; more than its decode kernels are known to."""

_MAX_HEAD_DIM = 128
"""256 on some GPUs and versions of cuDNN; 128 on all."""


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    head_dim = q.shape[2]
    for refused, what in (
        (view.v is None, "layout='token_major': K and V of a layer must be arrays of their own, as in 'layer_major'"),
        (batch.max_q_len != 1, "requests of several queries"),
        (view.window is not None, "windows: cuDNN counts them from the first query"),
        (features.soft_cap is not None, "soft_cap"),
        (features.sinks is not None, "sinks"),
        (q.dtype != view.k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16), "types but bfloat16 and float16"),
        (head_dim % 8 or head_dim > _MAX_HEAD_DIM, f"head_dim {head_dim}"),
        (DEFAULT_PAGE_BYTES % _tile_bytes(view), f"pages that hold no whole number of {_TILE} tokens"),
    ):
        if refused:
            return what
    return _refusal_of_jax(q, view)


def _tile_bytes(view: LayerView) -> int:
    return _TILE * view.num_kv_heads * view.head_dim * view.k.dtype.itemsize


def _refusal_of_jax(q: jax.Array, view: LayerView) -> str | None:
    """What keeps jax from calling cuDNN, if anything: it checks shapes, and looks for the library."""
    rows = jax.ShapeDtypeStruct((view.k.shape[0], 1, *q.shape[1:]), q.dtype)
    lens = jax.ShapeDtypeStruct(view.k.shape[:1], jnp.int32)
    kv = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in view.views)
    try:
        jax.eval_shape(lambda *operands: _attend(*operands, scale=1.0), rows, *kv, lens, lens)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"jax {jax.__version__} ({error})"
    return None


def run(
    q: jax.Array, view: LayerView, order: jax.Array, batch: RaggedBatch, features: Features, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`. Where two requests name one slot, one gets NaN."""
    del features  # none that matters for one query
    tokens, num_slots = q.shape[0], view.k.shape[0]
    request = jnp.arange(batch.num_requests, dtype=jnp.int32)
    active = (batch.q_lens > 0) & (batch.kv_lens > 0)
    # Who is where, both ways: the same in every layer, so computed once. An index behind the end is dropped.
    owner = jnp.full(num_slots, -1, jnp.int32).at[jnp.where(active, batch.slots, num_slots)].max(request, mode="drop")
    slot = jnp.full(tokens, num_slots, jnp.int32)
    slot = slot.at[jnp.where(active, batch.q_starts, tokens)].set(batch.slots, mode="drop")
    alone = jnp.ones(tokens, jnp.bool_)
    alone = alone.at[jnp.where(active, batch.q_starts, tokens)].set(owner[batch.slots] == request, mode="drop")

    # order[0] counts dropped writes, which XLA cannot know to be >= 0: lengths, and so the read, depend on the last
    # append.
    kv_lens = jnp.where(owner < 0, 0, batch.kv_lens[owner]) + jnp.minimum(order[0], 0)
    q_lens = jnp.where(owner < 0, 0, 1).astype(jnp.int32)
    rows = q.at[batch.q_starts[owner]].get(mode="clip")
    found = _attend(rows[:, None], *view.views, q_lens, kv_lens, scale=scale)[:, 0]
    out = found.at[slot].get(mode="clip")
    out = jnp.where(alone[:, None, None], out, jnp.nan)
    # cuDNN before 9.25 gives NaN for the length 0.
    out = jnp.where((slot < num_slots)[:, None, None], out, 0).astype(q.dtype)
    # The bits of a number as an unsigned one are never negative, so 0 is added, but XLA does not look at that: the
    # next append waits for the result.
    bits = lax.bitcast_convert_type(found[0, 0, 0], jnp.uint16).astype(jnp.int32)
    return out, order + jnp.minimum(bits, 0)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, q_lens: jax.Array, kv_lens: jax.Array, *, scale: float
) -> jax.Array:
    """`q` is `[num_slots, 1, num_q_heads, head_dim]`, lengths are `[num_slots]`."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, query_seq_lengths=q_lens, key_value_seq_lengths=kv_lens, implementation="cudnn"
    )
