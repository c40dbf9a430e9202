"""The next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, temperatures: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """Draws one token a row: the most likely one where the temperature is 0.

    Args:
      logits: float32 `[rows, vocab_size]`.
      temperatures: float32 `[rows]`.
      seeds: uint32 `[rows]`.
      positions: int32 `[rows]`: position of the token that is drawn. A draw depends on seed and position alone.

    Returns:
      int32 `[rows]`.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        def one(row: jax.Array, temperature: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, row / jnp.maximum(temperature, 1e-6)).astype(jnp.int32)

        return jnp.where(temperatures > 0, jax.vmap(one)(logits, temperatures, seeds, positions), greedy)

    # Random bits for a whole vocabulary are not free: greedy batches skip them.
    return jax.lax.cond(jnp.any(temperatures > 0), draw, lambda: greedy)
