"""Caches for tests that need no manager, and ways to read one token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_vattention import KVCache
from jax_vattention.cache import LayerView
from jax_vattention.scales import FLOAT8_MAX, cache_scales
from jax_vattention.spec import KV_TAIL_TOKENS


def abstract_cache(spec):
    """Shapes and dtypes of a cache, to compile programs for."""

    def int32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    views = tuple(
        tuple(jax.ShapeDtypeStruct(group.plane_shape, spec.dtype) for _ in range(group.planes))
        for group in spec.kv_groups
    )
    mapped = tuple(int32(2, spec.num_slots) for _ in views)
    return KVCache(views, mapped, int32(4), spec, jax.eval_shape(lambda: cache_scales(spec)))


def view_without_contents(slots, slot_tokens, *, window=None, mapped_first=None, heads=1):
    """A layer's view for what looks at its sizes and at what is mapped: from `mapped_first` of each slot to its end."""
    bounds = [[0] * slots if mapped_first is None else mapped_first, [slot_tokens] * slots]
    k = jnp.zeros((slots, slot_tokens, heads, 8), jnp.float32)
    return LayerView(k, k, jnp.int32(0), jnp.asarray(bounds, jnp.int32), window)


def fitting_scales(kv):
    """float32 `[layers, 2, heads]`: just large enough for each head of `[tokens, layers, 2, heads, dim]`."""
    return np.abs(kv).max((0, -1)) / np.float32(FLOAT8_MAX)


def dequantized(kv, scales):
    """What a float8 cache with these scales makes of `[tokens, layers, 2, heads, dim]`."""
    scaled = np.clip(kv / scales[..., None], -FLOAT8_MAX, FLOAT8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[..., None]


def plain_cache(spec, contents, seen=None, kv_scales=None):
    """Ordinary arrays, NaN where nothing was written, and behind the windows of `seen` tokens.

    Args:
      contents: slot -> K and V `[tokens, layers, 2, heads, dim]`.
      seen: slot -> tokens whose queries are over.
      kv_scales: of float8, `[layers, 2, heads]`; all 1 if not given.
    """
    scales = np.ones((spec.num_layers, 2, 1), np.float32) if kv_scales is None else kv_scales
    views, mapped = [], []
    for group in spec.kv_groups:
        planes = [np.full(group.plane_shape, np.nan, np.float32) for _ in range(group.planes)]
        bounds = np.zeros((2, spec.num_slots), np.int32)
        bounds[1] = spec.max_seq_len
        for slot, kv in contents.items():
            first = 0 if group.window is None or not seen else max(0, seen[slot] - group.window + 1)
            bounds[0, slot] = first
            for index, layer in enumerate(group.layers):
                for part in range(2):
                    plane = plane_at(spec, planes, index, part)
                    tokens = np.arange(first, len(kv))
                    plane[_places(spec, slot, tokens)] = kv[first:, layer, part] / scales[layer, part][:, None]
        views.append(tuple(jnp.asarray(plane).astype(spec.dtype) for plane in planes))
        mapped.append(jnp.asarray(bounds))
    return KVCache(tuple(views), tuple(mapped), jnp.zeros(4, jnp.int32), spec, cache_scales(spec, kv_scales))


def plane_at(spec, planes, index, part):
    """K (`part` 0) or V (1) of a group's layer number `index`: `[slots, tokens, heads, dim]`, or with runs."""
    return planes[0][:, :, index, part] if spec.layout == "token_major" else planes[2 * index + part]


def _places(spec, slot, tokens):
    """Where tokens of a slot are in what `plane_at` returns."""
    return (slot, tokens // KV_TAIL_TOKENS, tokens % KV_TAIL_TOKENS) if spec.layout == "token_major" else (slot, tokens)


@jax.jit
def _rows(plane, slot, position):
    """`[heads, dim]`, or in `token_major` `[layers, 2, heads, dim]`."""
    if plane.ndim == 4:
        return jax.lax.dynamic_slice(plane, (slot, position, 0, 0), (1, 1, *plane.shape[2:]))[0, 0]
    start = (slot, position // KV_TAIL_TOKENS, 0, 0, position % KV_TAIL_TOKENS, 0, 0)
    return jax.lax.dynamic_slice(plane, start, (1, 1, *plane.shape[2:4], 1, *plane.shape[5:]))[0, 0, :, :, 0]


def read_token(cache, slot, position):
    """One token, for each layer `[2, heads, dim]` in float32, read through the views; nothing else is touched."""
    found = {}
    for group, planes in zip(cache.spec.kv_groups, cache.views, strict=True):
        rows = [np.asarray(_rows(plane, slot, position), np.float32) for plane in planes]
        for index, layer in enumerate(group.layers):
            if cache.spec.layout == "token_major":
                found[layer] = rows[0][index]
            else:
                found[layer] = np.stack(rows[2 * index : 2 * index + 2])
    return [found[layer] for layer in range(cache.spec.num_layers)]
