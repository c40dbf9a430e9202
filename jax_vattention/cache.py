"""The KV cache as a jitted program receives it."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp

from jax_vattention import ffi
from jax_vattention.spec import KVCacheSpec

GPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
"""For `jax.jit(compiler_options=)` of every GPU program that takes a cache. XLA counts the view's virtual size as
device memory; where that is more than there is, its rematerialisation pass computes things twice to make room."""


class _Traced:
    """The view inside a program that is being traced: part of a cache's structure, not one of its leaves."""

    def __init__(self, view: jax.core.Tracer):
        self._view = weakref.ref(view)  # the structure of an output outlives the trace
        self._key = id(view)

    def get(self) -> jax.Array | None:
        return self._view()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Traced) and self.get() is not None and self.get() is other.get())

    def __hash__(self) -> int:
        return self._key


@jax.tree_util.register_pytree_with_keys_class
class KVCache:
    """A view of the whole cache, what of it is mapped, and the token that orders writes and reads.

    Pass it to a jitted program as an ordinary argument, never donated. Inside, `append` and `attention` each return
    the cache to go on with; it may be carried through `scan`, `while_loop` and `cond`. A program returns the last
    one, or its `order`, for `KVCacheManager.finish`.

    The view does not leave a program. An array that a program returns is a new array, so returning the view would
    copy all of it, and touch what is not mapped. Inside a program the view is therefore no leaf of this pytree: a
    cache that comes out has an order token and no view. The next program gets its cache from `KVCacheManager.step`.

    Args:
      view: `[num_slots, slot_tokens, num_layers, 2, num_kv_heads, head_dim]`; index 0 of the fourth axis is K, 1 V.
      mapped_lens: int32 `[num_slots]`: tokens of each slot with memory behind them.
      order: int32 `[4]`: the order token. It is a status too: (writes dropped, slot, position and mapped length of
        the first of them).
      spec: dimensions.
    """

    def __init__(self, view: jax.Array | None, mapped_lens: jax.Array, order: jax.Array, spec: KVCacheSpec):
        self._view = view
        self.mapped_lens = mapped_lens
        self.order = order
        self.spec = spec

    @property
    def view(self) -> jax.Array:
        """The whole cache as one array. Read it where tokens are mapped only, and never return it from a program.

        Raises:
          ValueError: this cache came out of a program.
        """
        if self._view is None:
            raise ValueError(
                "this cache came out of a program and has no view any more: pass it to KVCacheManager.finish(), and "
                "take the cache for the next program from KVCacheManager.step()"
            )
        return self._view

    def with_order(self, order: jax.Array) -> KVCache:
        """The same cache with the order token of a later read or write."""
        return KVCache(self._view, self.mapped_lens, order, self.spec)

    def __repr__(self) -> str:
        # Never the arrays themselves: printing the view would touch what is not mapped.
        return f"KVCache(view_shape={self.spec.view_shape}, dtype={self.spec.dtype.name})"

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Leaves: the view (outside of traced programs only), `mapped_lens`, `order`."""
        key = jax.tree_util.GetAttrKey
        leaves = ((key("mapped_lens"), self.mapped_lens), (key("order"), self.order))
        if isinstance(self._view, jax.core.Tracer):
            return leaves, (self.spec, _Traced(self._view))
        return ((key("view"), self._view), *leaves), (self.spec, None)

    @classmethod
    def tree_unflatten(cls, structure: tuple, leaves: tuple) -> KVCache:
        """The inverse of `tree_flatten_with_keys`."""
        spec, traced = structure
        if traced is None:
            view, mapped_lens, order = leaves
            return cls(view, mapped_lens, order, spec)
        mapped_lens, order = leaves
        left_program = isinstance(order, jax.Array) and not isinstance(order, jax.core.Tracer)
        return cls(None if left_program else traced.get(), mapped_lens, order, spec)

    def append(
        self,
        k: jax.Array,
        v: jax.Array | None = None,
        *,
        layer: int | jax.Array,
        slots: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None = None,
    ) -> KVCache:
        """Writes the K and V of a ragged batch of tokens in place.

        A token whose position is not below its slot's mapped length is dropped, and `KVCacheManager.finish` raises.
        No two tokens of one call may have the same slot and position.

        Args:
          k: `[tokens, num_kv_heads, head_dim]`; or, without `v`, K and V as `[tokens, 2, num_kv_heads, head_dim]`.
          v: `[tokens, num_kv_heads, head_dim]`.
          layer: which layer; an int, or an int32 scalar.
          slots: int32 `[tokens]`.
          positions: int32 `[tokens]`: the token's position in its request.
          mask: bool `[tokens]`: False for padding, which is not written. None: all are written.

        Returns:
          The cache with the next order token.

        Raises:
          ValueError, TypeError: a shape, dtype or layer does not fit the cache.
        """
        spec = self.spec
        self._check_kv(k, v)
        tokens = k.shape[0]
        _check("slots", slots, (tokens,), jnp.int32)
        _check("positions", positions, (tokens,), jnp.int32)
        if mask is None:
            mask = jnp.ones(tokens, jnp.bool_)
        _check("mask", mask, (tokens,), jnp.bool_)
        if isinstance(layer, int) and not 0 <= layer < spec.num_layers:
            raise ValueError(f"layer: expected 0 to {spec.num_layers - 1}, got {layer}")
        order = ffi.append(
            self.view,
            k,
            k if v is None else v,
            layer=jnp.asarray(layer, jnp.int32),
            slots=slots,
            positions=positions,
            mask=mask,
            mapped_lens=self.mapped_lens,
            order=self.order,
        )
        return self.with_order(order)

    def _check_kv(self, k: jax.Array, v: jax.Array | None) -> None:
        spec = self.spec
        tokens = k.shape[0] if k.ndim else 0
        heads = (spec.num_kv_heads, spec.head_dim)
        if v is None:
            _check("k (with K and V, as v is None)", k, (tokens, 2, *heads), spec.dtype)
        else:
            _check("k", k, (tokens, *heads), spec.dtype)
            _check("v", v, (tokens, *heads), spec.dtype)


def _check(name: str, array: jax.Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises unless `array` has this shape and dtype."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype != jnp.dtype(dtype):
        expected = jnp.dtype(dtype).name
        raise TypeError(f"{name}: expected dtype {expected}, got {array.dtype}; convert it with .astype('{expected}')")
