"""What some models' attention does beyond a causal softmax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """None stands for a feature that is not used: a program does nothing for it."""

    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    """Scores become `soft_cap * tanh(scores / soft_cap)`."""
    sinks: jax.Array | None = None
    """float32 `[num_q_heads]`: `exp(sink)` is added to the denominator of the softmax of each query, once."""
    prefix_lens: jax.Array | None = None
    """int32 `[num_requests]`: a query of position `p` sees the keys `0 .. max(p, prefix_len - 1)`. An implementation
    gets what `bounded` returns: no prefix is longer than what the cache holds of its request."""

    @classmethod
    def checked(
        cls,
        soft_cap: float | None,
        sinks: jax.Array | None,
        prefix_lens: jax.Array | None,
        *,
        num_q_heads: int,
        view: LayerView,
        batch: RaggedBatch,
    ) -> Features:
        """What a caller asked for.

        Raises:
          ValueError, TypeError: it cannot be done.
        """
        if sinks is not None:
            _check("sinks", sinks, num_q_heads, jnp.float32, "one for each query head")
        if prefix_lens is not None:
            _check("prefix_lens", prefix_lens, batch.num_requests, jnp.int32, "one for each request of the batch")
            if view.window is not None:
                raise ValueError(
                    f"attention: prefix_lens do not go with a layer that has a window, here of {view.window} tokens: "
                    "pass prefix_lens=None for this layer, or put it in a LayerGroup without a window"
                )
        return cls(None if soft_cap is None else _checked_cap(soft_cap), sinks, prefix_lens)

    def bounded(self, batch: RaggedBatch) -> Features:
        """With prefixes cut to what the cache holds, and without them for a batch that they change nothing for."""
        if self.prefix_lens is None:
            return self
        # The one query of a decode step is its request's last token: it sees every key anyway.
        prefix_lens = None if batch.max_q_len == 1 else jnp.clip(self.prefix_lens, 0, batch.kv_lens)
        return dataclasses.replace(self, prefix_lens=prefix_lens)


def _checked_cap(soft_cap: float) -> float:
    if isinstance(soft_cap, jax.core.Tracer):
        raise TypeError("attention: soft_cap must be a Python number, not a traced value: it is compiled in")
    if not 0 < float(soft_cap) < float("inf"):
        raise ValueError(f"attention: soft_cap must be positive and finite, got {soft_cap}; pass None for no cap")
    return float(soft_cap)


def _check(name: str, array: Any, size: int, dtype: Any, meaning: str) -> None:
    expected = jnp.dtype(dtype).name
    found = getattr(array, "dtype", type(array).__name__)
    if np.shape(array) != (size,) or found != dtype:
        raise ValueError(
            f"attention: {name} must be {expected}[{size}], {meaning}; got {found}{list(np.shape(array))}: "
            f"reshape it, or convert it with .astype('{expected}')"
        )
