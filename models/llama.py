"""The Llama family in Flax nnx, reading and writing K and V through a `KVCache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_vattention.attention import attention
from jax_vattention.batch import RaggedBatch, TokenIndex
from jax_vattention.cache import KVCache

from .config import LlamaConfig

_DTYPES = ("float32", "float16", "bfloat16")


def _dot(x: jax.Array, weight: nnx.Param, out_dtype: Any = None) -> jax.Array:
    """`x` `[tokens, in]` times `weight` `[in, out]`."""
    matrix = weight[...]
    # Float32 means float32: GPUs otherwise round the operands to tf32. CPUs run the same code either way.
    precision = jax.lax.Precision.HIGHEST if matrix.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, matrix, precision=precision, preferred_element_type=out_dtype or matrix.dtype)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE over pairs (i, i + head_dim / 2).

    `x` is `[tokens, heads, head_dim]`, `cos` and `sin` are `[tokens, 1, head_dim / 2]`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rope_table(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, float32 `[tokens, 1, head_dim / 2]`; the same for all layers."""
    frequencies = jnp.asarray(config.inverse_frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


class RMSNorm(nnx.Module):
    """Root mean square norm. Computed in float32, whatever the dtype of its input.

    Args:
      size: elements of the last axis.
      eps: added to the mean square.
      dtype: of the result.
    """

    def __init__(self, size: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))  # [size]
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` `[..., size]`, scaled to a root mean square of 1, times the weights."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(self.dtype)


class LlamaLayer(nnx.Module):
    """One transformer layer.

    Weights are `[in, out]`, and matrices that multiply the same input are one array. A plain dot then reads them
    where they are. On CPU `[out, in]` takes 1.4 times as long with 4 rows, and separate matrices take 1.1 to 1.4
    times as long with 1 row (SmolLM2-135M's layers, float32, 2 cores, jax 0.10 and 0.11).

    Args:
      config: dimensions.
      layer: number of this layer in the cache.
      dtype: of the matrices.
      rngs: for the random weights.
    """

    def __init__(self, config: LlamaConfig, layer: int, *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        hidden, wide = config.hidden_size, config.intermediate_size
        self.config = config
        self.layer = layer
        self.attention_norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.qkv = nnx.Param(init(rngs.params(), (hidden, config.q_size + 2 * config.kv_size), dtype))
        self.out = nnx.Param(init(rngs.params(), (config.q_size, hidden), dtype))
        self.mlp_norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.gate_up = nnx.Param(init(rngs.params(), (hidden, 2 * wide), dtype))
        self.down = nnx.Param(init(rngs.params(), (wide, hidden), dtype))

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        batch: RaggedBatch,
        index: TokenIndex,
        rope: tuple[jax.Array, jax.Array],
        *,
        implementation: str | Sequence[str] | None,
    ) -> tuple[jax.Array, KVCache]:
        """`x` `[tokens, hidden_size]` -> the same shape, and the cache with this layer's K and V appended."""
        attended, cache = self._attend(self.attention_norm(x), cache, batch, index, rope, implementation)
        x = x + attended
        return x + self._feed_forward(self.mlp_norm(x)), cache

    def _attend(
        self,
        x: jax.Array,
        cache: KVCache,
        batch: RaggedBatch,
        index: TokenIndex,
        rope: tuple[jax.Array, jax.Array],
        implementation: str | Sequence[str] | None,
    ) -> tuple[jax.Array, KVCache]:
        config, tokens = self.config, x.shape[0]
        q, k, v = jnp.split(_dot(x, self.qkv), [config.q_size, config.q_size + config.kv_size], axis=-1)
        q = _rotate(q.reshape(tokens, config.num_heads, config.head_dim), *rope)
        k = _rotate(k.reshape(tokens, config.num_kv_heads, config.head_dim), *rope)
        v = v.reshape(tokens, config.num_kv_heads, config.head_dim)
        if not cache.spec.quantized:  # float8 needs the scales, which append knows
            k, v = k.astype(cache.spec.dtype), v.astype(cache.spec.dtype)
        cache = cache.append(
            k,
            v,
            layer=self.layer,
            slots=index.slots,
            positions=index.positions,
            mask=index.mask,
        )
        read, cache = attention(q, cache, layer=self.layer, batch=batch, implementation=implementation)
        return _dot(read.reshape(tokens, config.q_size), self.out, jnp.float32), cache

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(_dot(x, self.gate_up), 2, axis=-1)
        return _dot(jax.nn.silu(gate) * up, self.down, jnp.float32)


class Llama(nnx.Module):
    """A Llama model: GQA, RoPE, RMSNorm, SwiGLU, tied or untied embeddings.

    One array per layer and weight, the layers unrolled: XLA copies every slice of stacked weights before a
    product reads it. Under `nnx.eval_shape` nothing is computed, which is how checkpoints are loaded.

    Args:
      config: dimensions.
      dtype: element type of the weights and of what is multiplied with them: float32, float16 or bfloat16. The
        residual stream is float32, where a rounding error of a layer would reach all later ones.
      rngs: for the random weights.
    """

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        if dtype.name not in _DTYPES:
            raise ValueError(f"Llama: expected a dtype of {', '.join(_DTYPES)}, got {dtype.name}")
        init = nnx.initializers.normal(0.02)
        self.config = config
        self.dtype = dtype
        if not config.tie_word_embeddings:
            self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List([LlamaLayer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = nnx.Param(init(rngs.params(), (config.hidden_size, config.vocab_size), dtype))

    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache,
        batch: RaggedBatch,
        *,
        implementation: str | Sequence[str] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs the tokens of one step through all layers.

        Args:
          tokens: int32 `[tokens]`, the new tokens of all requests one after the other.
          cache: where K and V are appended and read.
          batch: which token belongs to which request.
          implementation: of attention; see `jax_vattention.attention`.

        Returns:
          The hidden states `[tokens, hidden_size]` after the last norm, as `logits` takes them, and the cache.
        """
        index = batch.token_index(tokens.shape[0])
        rope = _rope_table(self.config, index.positions)
        x = self._embed(tokens).astype(jnp.float32)
        for layer in self.layers:
            x, cache = layer(x, cache, batch, index, rope, implementation=implementation)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]` that `__call__` returned."""
        return _dot(hidden, self.head, jnp.float32)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[tokens, hidden_size]`. Tied weights are held once, in the head's orientation."""
        if self.config.tie_word_embeddings:
            return jnp.take(self.head[...], tokens, axis=1, mode="clip").T
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
