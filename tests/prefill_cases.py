"""Cases of a prefill kernel, in Pallas' interpreter, against the reference."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from caches import plain_cache
from mosaic_interpreter import assert_no_races, interpreting
from reference_attention import reference_attention
from test_attention import random_kv

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch
from jax_vattention.attention.features import Features
from jax_vattention.spec import KV_TAIL_TOKENS


def check(kernel, requests, *, interpreted=True, **options) -> None:
    """Runs the kernel of a module that has `run` and `Tiling`.

    Args:
      interpreted: or on the GPU.
      requests: pairs of queries and keys of a request.
      options: of the shapes, the features and the tiling; `large`: so many first tokens of each request have K and V
        that are larger by these factors; `quiet`: every other head has queries so small that its scores do not grow.
    """
    options = {"head_dim": 64, "kv_heads": 2, "group": 2, "dtype": "bfloat16", "layout": "token_major"} | options
    tiling = {"block_k": 64, "blocks": 2} | {
        field.name: options[field.name] for field in dataclasses.fields(kernel.Tiling) if field.name in options
    }
    heads, group, dim, window = options["kv_heads"], options["group"], options["head_dim"], options.get("window")
    q_lens, kv_lens = (list(each) for each in zip(*requests, strict=True))
    groups = (LayerGroup((0,)), LayerGroup((1,), window=window)) if window else ()
    spec = KVCacheSpec(
        2, heads, dim, len(requests) + 1, 320, options["dtype"], 4096, layout=options["layout"], groups=groups
    )
    rng = np.random.default_rng(0)
    # What no token was written to is NaN, and so is what no window sees, but for whole runs.
    contents = {slot: random_kv(rng, spec, length) for slot, length in enumerate(kv_lens) if length}
    first, *factors = options.get("large", (0, 1, 1))
    for kv in contents.values():
        kv[:first] *= np.asarray(factors, np.float32)[:, None, None]  # powers of 2, so that they are of the dtype
    seen = window and {
        slot: (kv_len - q_len + 1 - window) // KV_TAIL_TOKENS * KV_TAIL_TOKENS - 1 + window
        for slot, (q_len, kv_len) in enumerate(requests)
    }
    cache = plain_cache(spec, contents, seen)
    starts = 3 + np.concatenate([[0], np.cumsum(np.asarray(q_lens) + 5)[:-1]])
    tokens = int(starts[-1]) + q_lens[-1] + 9
    q = rng.standard_normal((tokens, heads * group, dim))
    if options.get("quiet"):
        q[:, ::2] *= 2.0**-12
    own = np.concatenate([np.arange(q_len) + start for start, q_len in zip(starts, q_lens, strict=True)])
    q[np.delete(np.arange(tokens), own)] = np.asarray([np.nan, np.inf] * (dim // 2))  # of no request
    q = jnp.asarray(q, spec.dtype)
    arrays = [jnp.asarray(each, jnp.int32) for each in (range(len(requests)), starts, q_lens, kv_lens)]
    batch = RaggedBatch(*arrays, max_q_len=256)
    sinks = jnp.asarray(rng.standard_normal(heads * group), jnp.float32) if options.get("sinks") else None
    prefix_lens = options.get("prefix_lens")
    features = Features(
        options.get("soft_cap"), sinks, None if prefix_lens is None else jnp.asarray(prefix_lens, jnp.int32)
    ).bounded(batch)
    scale = options.get("scale", dim**-0.5)
    with interpreting(interpreted) as params:
        out, order = kernel.run(
            q, cache.layer_view(1), cache.order, batch, features, scale=scale, tiling=kernel.Tiling(**tiling),
            interpret=params,
        )  # fmt: skip
    np.testing.assert_array_equal(order, 0)
    if interpreted:
        assert_no_races()
    out = np.array(out.astype(jnp.float32))
    for row, (q_len, _) in enumerate(requests):
        own = slice(starts[row], starts[row] + q_len)
        if q_len:
            expected = reference_attention(
                np.asarray(q[own].astype(jnp.float32)), contents[row][:, 1, 0], contents[row][:, 1, 1], scale=scale,
                soft_cap=options.get("soft_cap"), sinks=sinks, window=window,
                prefix_len=0 if prefix_lens is None else prefix_lens[row],
            )  # fmt: skip
            np.testing.assert_allclose(out[own], expected, atol=1e-2 * factors[1], rtol=1e-2)
        out[own] = 0
    np.testing.assert_array_equal(out, 0)
