"""Scales of a float8 cache: what is stored times its scale is the value. One for K and one for V of each KV head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_vattention.spec import KVCacheSpec

FLOAT8_MAX = 448.0
"""The largest number of float8_e4m3fn, which has no infinity: what is beyond it would be stored as NaN."""

Scales = tuple[tuple[jax.Array, ...], ...]
"""For each group of layers, as its planes are: in `token_major` one array, float32 `[layers, 2, num_kv_heads]`; in
`layer_major` one of `[1, 2, num_kv_heads]` for each layer. Index 0 of the second axis is K."""


def cache_scales(spec: KVCacheSpec, given: Any = None) -> Scales | None:
    """The scales of a cache; None if it is not float8.

    Args:
      spec: dimensions of the cache.
      given: float32 `[num_layers, 2, num_kv_heads]`, or a sequence of one `[2, num_kv_heads]` for each layer, which
        groups with other numbers of heads need. None: all are 1.

    Raises:
      ValueError, TypeError: the cache is not float8, or a scale is missing or not a positive number.
    """
    if not spec.quantized:
        if given is not None:
            raise ValueError(
                f"kv_scales: expected None for a cache of {spec.dtype.name}, which stores values as they are; pass "
                "KVCacheSpec(dtype='float8_e4m3fn') or leave kv_scales out"
            )
        return None
    layers = _by_layer(spec, given)
    return tuple(
        (jnp.stack([layers[layer] for layer in group.layers]),)
        if spec.layout == "token_major"
        else tuple(layers[layer][None] for layer in group.layers)
        for group in spec.kv_groups
    )


def quantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` as the nearest float8_e4m3fn; what is too large becomes the largest one, and only NaN becomes NaN."""
    # Clipped first: the conversion itself makes NaN of what is out of range.
    return jnp.clip(x.astype(jnp.float32) / scale, -FLOAT8_MAX, FLOAT8_MAX).astype(jnp.float8_e4m3fn)


def _by_layer(spec: KVCacheSpec, given: Any) -> list[jax.Array]:
    """float32 `[2, num_kv_heads]` for each layer."""
    heads = [spec.kv_groups[g].num_kv_heads for g, _ in spec.places]
    if given is None:
        return [jnp.ones((2, each), jnp.float32) for each in heads]
    if not isinstance(given, (Sequence, np.ndarray, jax.Array)):
        raise TypeError(f"kv_scales: expected an array or a sequence of arrays, got {type(given).__name__}")
    if len(given) != spec.num_layers:
        raise ValueError(f"kv_scales: expected scales of {spec.num_layers} layers, got those of {len(given)}")
    return [_checked(layer, scales, heads[layer]) for layer, scales in enumerate(given)]


def _checked(layer: int, scales: Any, heads: int) -> jax.Array:
    if np.shape(scales) != (2, heads):
        raise ValueError(
            f"kv_scales: expected shape {(2, heads)} for layer {layer}, K and V of each KV head, got {np.shape(scales)}"
        )
    if not jnp.issubdtype(jnp.result_type(scales), jnp.floating):
        raise TypeError(
            f"kv_scales: expected float32 for layer {layer}, got {jnp.result_type(scales)}; convert it with "
            ".astype('float32')"
        )
    scales = jnp.asarray(scales, jnp.float32)
    if isinstance(scales, jax.core.Tracer):
        return scales
    values = np.asarray(scales)
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size:
        raise ValueError(
            f"kv_scales: expected positive and finite float32 numbers, got {wrong[0]} for layer {layer}; for a head "
            f"whose largest magnitude is m pass m / {FLOAT8_MAX:g}, or 1 where m is 0"
        )
    return scales
