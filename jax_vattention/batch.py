"""A ragged batch: which tokens of a flat token array belong to which request, and where they go in the cache."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenIndex(NamedTuple):
    """Where each token of a flat token array goes. All arrays are `[tokens]`."""

    slots: jax.Array
    """int32: row of the cache."""
    positions: jax.Array
    """int32: position in the request; also the RoPE position."""
    mask: jax.Array
    """bool: False for padding, which is neither written nor read."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """The requests of one step. A token array `[tokens, ...]` holds their new tokens one request after the other.

    Request `r` owns the tokens `q_starts[r] : q_starts[r] + q_lens[r]`; its last new token is token number
    `kv_lens[r] - 1` of the request, and its queries see all earlier ones. Tokens that no request owns are
    padding, and so is a request with `q_lens[r] == 0`. All shapes are static, so a program is compiled for a
    number of tokens and requests, never for a length.
    """

    slots: jax.Array
    """int32 `[requests]`: row of the cache."""
    q_starts: jax.Array
    """int32 `[requests]`, ascending: first new token of a request in the token array."""
    q_lens: jax.Array
    """int32 `[requests]`: new tokens in this step; 0 for a row that is idle."""
    kv_lens: jax.Array
    """int32 `[requests]`: tokens with valid K and V once this step's are appended."""
    max_q_len: int = dataclasses.field(metadata={"static": True})
    """No request has more new tokens than this. 1 for a decode step."""

    @classmethod
    def decode(cls, slots: jax.Array, kv_lens: jax.Array, active: jax.Array | None = None) -> RaggedBatch:
        """One new token a request: `slots` and `kv_lens` int32 `[requests]`, `active` bool `[requests]` or all."""
        rows = jnp.arange(slots.shape[0], dtype=jnp.int32)
        q_lens = jnp.ones_like(rows) if active is None else active.astype(jnp.int32)
        return cls(slots=slots, q_starts=rows, q_lens=q_lens, kv_lens=kv_lens, max_q_len=1)

    @property
    def num_requests(self) -> int:
        """Rows of the batch, idle ones included."""
        return self.slots.shape[0]

    def token_index(self, num_tokens: int) -> TokenIndex:
        """Slot, position and mask of each of `num_tokens` tokens. Compute it once in a program and pass it on."""
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        # All at once: the search that is the default is a loop, with launches in each round.
        owner = jnp.searchsorted(self.q_starts, token, side="right", method="compare_all").astype(jnp.int32) - 1
        owner = jnp.maximum(owner, 0)
        offset = token - self.q_starts[owner]
        mask = (offset >= 0) & (offset < self.q_lens[owner])
        positions = self.kv_lens[owner] - self.q_lens[owner] + offset
        return TokenIndex(self.slots[owner], jnp.where(mask, positions, 0), mask)
