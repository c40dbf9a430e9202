"""The dimensions of a KV cache and the arithmetic that follows from them: bytes, pages, tokens."""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

KV_TAIL_TOKENS = 1
"""A kernel may read a slot's tokens up to its length rounded up to this many; the manager maps that far.

With 1 no kernel reads past the length at all, and a slot never maps a byte that its tokens do not need,
except what is left of its last page.
"""

DEFAULT_PAGE_BYTES = 2 * 1024 * 1024
"""The granularity of the stock CUDA driver; the host backend takes it too, and smaller ones."""

_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """What one KV cache holds. Arithmetic only: no memory is reserved or mapped here.

    The view of a cache is one array, `[num_slots, slot_tokens, num_layers, 2, num_kv_heads, head_dim]`
    (token-major: the K and V of all layers of one token are neighbours; index 0 of the fourth axis is K).

    Args:
      num_layers: layers that write K and V.
      num_kv_heads: K and V heads of a layer.
      head_dim: elements of one head.
      num_slots: requests that can be live at once; a slot is a row of the view.
      max_seq_len: most tokens of one request. Virtual memory costs nothing: choose the model's maximum.
      dtype: element type of K and V: float32, float16 or bfloat16.
      page_bytes: bytes of one physical page, a multiple of the backend's granularity
        (CUDA: 2 MiB; host: 4 KiB).

    Raises:
      ValueError, TypeError: a size is not a positive integer, or the dtype is not one of the three.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    max_seq_len: int
    dtype: Any = jnp.bfloat16
    page_bytes: int = DEFAULT_PAGE_BYTES

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name == "dtype":
                continue
            value = getattr(self, field.name)
            try:
                size = operator.index(value)
            except TypeError:
                raise TypeError(f"KVCacheSpec.{field.name}: expected a positive integer, got {value!r}") from None
            if isinstance(value, bool) or size <= 0:
                raise ValueError(f"KVCacheSpec.{field.name}: expected a positive integer, got {value!r}")
            object.__setattr__(self, field.name, size)
        try:
            dtype = jnp.dtype(self.dtype)
        except TypeError:
            raise TypeError(f"KVCacheSpec.dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}") from None
        if dtype.name not in _DTYPES:
            raise ValueError(f"KVCacheSpec.dtype: expected one of {', '.join(_DTYPES)}, got {dtype.name}")
        object.__setattr__(self, "dtype", dtype)
        if self.slot_tokens > np.iinfo(np.int32).max:
            raise ValueError(
                f"KVCacheSpec: max_seq_len={self.max_seq_len} rounded up to whole pages is {self.slot_tokens} tokens; "
                "positions are int32: choose a smaller max_seq_len or page_bytes"
            )

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token: K and V of all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def slot_tokens(self) -> int:
        """Rows that the view has for a slot: `max_seq_len` rounded up until a slot is a whole number of pages."""
        multiple = self.page_bytes // math.gcd(self.page_bytes, self.token_bytes)
        return -(-self.max_seq_len // multiple) * multiple

    @cached_property
    def slot_bytes(self) -> int:
        """Virtual bytes from one slot to the next."""
        return self.slot_tokens * self.token_bytes

    @cached_property
    def slot_pages(self) -> int:
        """Pages of a slot that is mapped whole."""
        return self.slot_bytes // self.page_bytes

    @cached_property
    def view_shape(self) -> tuple[int, int, int, int, int, int]:
        """`[num_slots, slot_tokens, num_layers, 2, num_kv_heads, head_dim]`."""
        return (self.num_slots, self.slot_tokens, self.num_layers, 2, self.num_kv_heads, self.head_dim)

    @cached_property
    def view_bytes(self) -> int:
        """Virtual bytes of the whole view."""
        return self.num_slots * self.slot_bytes

    @property
    def tokens_per_page(self) -> float:
        """Tokens that one page holds; not a whole number where a token straddles two pages."""
        return self.page_bytes / self.token_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages that a slot of `tokens` tokens needs."""
        reach = -(-tokens // KV_TAIL_TOKENS) * KV_TAIL_TOKENS
        return -(-reach * self.token_bytes // self.page_bytes)

    def tokens_in(self, pages: int) -> int:
        """Whole tokens that `pages` mapped pages hold, counted from the start of a slot; at most `max_seq_len`."""
        tokens = pages * self.page_bytes // self.token_bytes
        return min(tokens // KV_TAIL_TOKENS * KV_TAIL_TOKENS, self.max_seq_len)
