"""What the kernels for Hopper GPUs share: how they see a cache, and which caches and queries they can read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

BLOCKS = 132
"""Multiprocessors of an H100 or H200; a block fills one."""
ROWS = 64
"""Of a `wgmma`."""
BOX = KV_TAIL_TOKENS
"""Tokens of the smallest copy: rows of a swizzled tile in shared memory."""


class Columns(NamedTuple):
    """K and V as rows of tokens, in each a column for every head: the same memory."""

    k: jax.Array
    """`[slots * slot_tokens, columns, head_dim]`"""
    v: jax.Array
    layer_stride: int
    """Columns from one layer to the next; 0 where a layer has arrays of its own."""
    v_column: int
    """Where V of a layer begins, in columns from its K; 0 where V is an array of its own."""

    @classmethod
    def of(cls, view: LayerView) -> Columns:
        """Those of a layer's view."""
        slots, slot_tokens = view.k.shape[:2]
        k, v = (each.reshape(slots * slot_tokens, -1, view.head_dim) for each in view.views)
        heads = view.num_kv_heads if view.v is None else 0
        return cls(k, v, 2 * heads, heads)


def refusal(q: jax.Array, view: LayerView) -> str | None:
    """What no kernel serves of these; None if there is nothing."""
    slots, slot_tokens = view.k.shape[:2]
    for refused, what in (
        (q.dtype not in (jnp.bfloat16, jnp.float16), f"queries of {q.dtype}"),
        (slot_tokens % BOX, f"slots of {slot_tokens} tokens"),
        (slots * slot_tokens >= 2**31, f"{slots} slots of {slot_tokens} tokens"),
    ):
        if refused:
            return what
    return None
