"""The jitted programs of the engine: one for prefill, one that decodes several tokens."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import GPU_COMPILER_OPTIONS, KVCache
from jax_vattention.engine.sampling import sample


class Model(Protocol):
    """What the engine needs of a model: an `nnx.Module` with these two methods."""

    def __call__(self, tokens: jax.Array, cache: KVCache, batch: RaggedBatch) -> tuple[jax.Array, KVCache]:
        """Tokens int32 `[tokens]` to hidden states `[tokens, hidden_size]`; appends to and reads from the cache."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[rows, hidden_size]` to float32 `[rows, vocab_size]`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of a batch, one entry a row. Rows that nothing runs in are not active."""

    slots: Any
    """int32 `[rows]`."""
    cached: Any
    """int32 `[rows]`: tokens with K and V in the cache, before the program."""
    active: Any
    """bool `[rows]`."""
    tokens_left: Any
    """int32 `[rows]`: tokens that may still be generated."""
    temperatures: Any
    """float32 `[rows]`."""
    seeds: Any
    """uint32 `[rows]`."""


class Programs:
    """The compiled programs for one model, batch size and cache.

    Args:
      model: an `nnx.Module` that is a `Model`.
      eos_ids: tokens that end a request.
      decode_tokens: most tokens that a decode program adds to a row.
      device: what to compile for.
    """

    def __init__(self, model: Model, *, eos_ids: frozenset[int], decode_tokens: int, device: jax.Device):
        graphdef, state = nnx.split(model)
        # Flat, so that no call walks the model's tree again.
        self._weights, treedef = jax.tree.flatten(state)

        def merge(weights: list[jax.Array]) -> Model:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))

        options = GPU_COMPILER_OPTIONS if device.platform == "gpu" else None
        eos = jnp.asarray(sorted(eos_ids), jnp.int32)
        self._prefill = jax.jit(functools.partial(_prefill, merge), compiler_options=options)
        self._decode = jax.jit(functools.partial(_decode, merge, eos, decode_tokens), compiler_options=options)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def prefill(
        self, cache: KVCache, rows: Rows, tokens: jax.Array, q_starts: jax.Array, q_lens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Runs chunks of prompts and samples the token after each.

        Args:
          cache: backs `cached + q_lens` tokens of each row.
          rows: the batch.
          tokens: int32 `[tokens]`, the chunks one after the other.
          q_starts: int32 `[rows]`, ascending: where in `tokens` a row's chunk starts.
          q_lens: int32 `[rows]`: tokens of a row's chunk; 0 for a row without one.

        Returns:
          int32 `[rows]`, the next token of each row that is at its prompt's end; and the order token.
        """
        run = self._get(("prefill", tokens.shape), self._prefill, cache, rows, tokens, q_starts, q_lens)
        return run(self._weights, cache, rows, tokens, q_starts, q_lens)

    def decode(self, cache: KVCache, rows: Rows, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Generates up to `decode_tokens` tokens for each active row.

        Args:
          cache: backs `cached + min(decode_tokens, tokens_left)` tokens of each row.
          rows: the batch.
          tokens: int32 `[rows]`: the last token of each row, which is not in the cache yet.

        Returns:
          int32 `[rows, decode_tokens]` tokens and int32 `[rows]`, how many of them are valid, an end-of-sequence
          token included; and the order token.
        """
        return self._get("decode", self._decode, cache, rows, tokens)(self._weights, cache, rows, tokens)

    def _get(self, name: Any, program: Any, *arguments: Any) -> Any:
        """The compiled program, and the time that compiling took apart from the time of running."""
        if name not in self._compiled:
            start = time.perf_counter()
            self._compiled[name] = program.lower(self._weights, *arguments).compile()
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[name]


def _prefill(merge, weights, cache, rows: Rows, tokens, q_starts, q_lens):
    model = merge(weights)
    kv_lens = rows.cached + q_lens
    batch = RaggedBatch(rows.slots, q_starts, q_lens, kv_lens, max_q_len=tokens.shape[0])
    hidden, cache = model(tokens, cache, batch)
    last = jnp.maximum(q_starts + q_lens - 1, 0)
    logits = model.logits(hidden[last])
    return sample(logits, rows.temperatures, rows.seeds, kv_lens), cache.order


def _decode(merge, eos, decode_tokens: int, weights, cache, rows: Rows, tokens):
    model = merge(weights)

    def unfinished(carry):
        step, active, *_ = carry
        return (step < decode_tokens) & jnp.any(active)

    def one_token(carry):
        step, active, tokens, counts, produced, cache = carry
        kv_lens = rows.cached + step + 1
        hidden, cache = model(tokens, cache, RaggedBatch.decode(rows.slots, kv_lens, active))
        drawn = sample(model.logits(hidden), rows.temperatures, rows.seeds, kv_lens)
        tokens = jnp.where(active, drawn, tokens)
        produced = produced.at[:, step].set(tokens)
        counts = counts + active
        active = active & ~jnp.isin(tokens, eos) & (counts < rows.tokens_left)
        return step + 1, active, tokens, counts, produced, cache

    start = (
        jnp.int32(0),
        rows.active,
        tokens,
        jnp.zeros_like(tokens),
        jnp.zeros((tokens.shape[0], decode_tokens), jnp.int32),
        cache,
    )
    _, _, _, counts, produced, cache = jax.lax.while_loop(unfinished, one_token, start)
    return produced, counts, cache.order
