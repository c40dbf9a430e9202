"""Decode kernels against the float32 reference, in Pallas' interpreter for Mosaic GPU."""

import jax.numpy as jnp
import numpy as np
import test_attention as suite
from caches import plain_cache
from mosaic_interpreter import assert_no_races, interpreting
from reference_attention import reference_attention

from jax_vattention import KVCacheSpec, LayerGroup
from jax_vattention.attention.features import Features
from jax_vattention.spec import KV_TAIL_TOKENS


def check_decode(
    run, lengths, *, tiling, queries=None, head_dim=64, kv_heads=2, group=4, dtype="bfloat16", layout="token_major",
    window=None, prefix=None, soft_cap=None, sinks=False, paged=False, interpreted=True,
):  # fmt: skip
    """`run` of a kernel, for requests of these lengths and numbers of queries; one unless said, and none of nothing.

    Args:
      interpreted: or on the GPU.
    """
    requests = len(lengths)
    q_lens = [int(length > 0) for length in lengths] if queries is None else queries
    groups = () if window is None else (LayerGroup((0, 1), window=window),)
    spec = KVCacheSpec(2, kv_heads, head_dim, requests + 1, 704, dtype, 4096, layout=layout, groups=groups)
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.1, (2, 2, kv_heads)).astype(np.float32) if spec.quantized else None
    # What no token was written to is NaN, and what lies behind a window, of which runs are mapped.
    contents = {slot: suite.random_kv(rng, spec, length, scales) for slot, length in enumerate(lengths) if length}
    seen = {}
    for slot, kv in contents.items():
        first = 0 if window is None else max(0, lengths[slot] - q_lens[slot] - window + 1)
        kv[:first] = np.nan
        seen[slot] = first // KV_TAIL_TOKENS * KV_TAIL_TOKENS + (window or 0) - 1
    placed, paging = contents, {}
    if paged:
        table = np.stack([rng.permutation(704 // 16) for _ in lengths])
        placed = {slot: _shuffled(kv, table[slot]) for slot, kv in contents.items()}
        paging = {"page_table": jnp.asarray(table, jnp.int32)}
    cache = plain_cache(spec, placed, seen, scales)
    tokens = sum(q_lens) + 2
    # No GPU multiplies float32, which would say more of an interpreted kernel.
    dtype = jnp.bfloat16 if spec.quantized and not interpreted else suite.wide_dtype(spec)
    q = jnp.asarray(rng.standard_normal((tokens, kv_heads * group, head_dim)), dtype)
    batch = suite.make_batch(range(requests), q_lens, lengths, max_q_len=max(1, *q_lens))
    logits = jnp.asarray(rng.standard_normal(kv_heads * group), jnp.float32) if sinks else None
    features = Features(soft_cap, logits, None if prefix is None else jnp.asarray(prefix, jnp.int32))
    with interpreting(interpreted) as params:
        out, order = run(
            q, cache.layer_view(1), cache.order, batch, features, scale=head_dim**-0.5, tiling=tiling, **paging,
            interpret=params, interpret_tables=interpreted,
        )  # fmt: skip
    np.testing.assert_array_equal(order, 0)
    out = np.asarray(out.astype(jnp.float32))
    if interpreted:
        assert_no_races()
    np.testing.assert_array_equal(out[-2:], 0)
    wide, at = np.asarray(q.astype(jnp.float32)), 0
    for row, (length, count) in enumerate(zip(lengths, q_lens, strict=True)):
        if not count:
            continue
        kv = contents[row][:, 1]
        expected = reference_attention(
            wide[at : at + count],
            kv[:, 0],
            kv[:, 1],
            window=window,
            soft_cap=soft_cap,
            sinks=logits,
            prefix_len=0 if prefix is None else min(prefix[row], length),
        )
        np.testing.assert_allclose(out[at : at + count], expected, atol=1e-2, rtol=1e-2)
        at += count


def _shuffled(kv, pages):
    """`[tokens, ...]` with its token `16 * i + j` at `16 * pages[i] + j`, and NaN elsewhere."""
    placed = np.full((len(pages) * 16, *kv.shape[1:]), np.nan, np.float32)
    tokens = np.arange(len(kv))
    placed[pages[tokens // 16] * 16 + tokens % 16] = kv
    return placed
