"""Attention written down as its definition, in NumPy and float64: what every implementation is compared with."""

import numpy as np


def reference_attention(q, k, v, *, scale=None, window=None, soft_cap=None, sinks=None, prefix_len=0):
    """One request.

    Args:
      q: `[q_len, num_q_heads, head_dim]`, the last `q_len` tokens of the request.
      k: `[kv_len, num_kv_heads, head_dim]`.
      v: `[kv_len, num_kv_heads, head_dim]`.
      scale: `head_dim ** -0.5` if not given.
      window: a query of position `p` sees the keys from `p - window + 1` on.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
      sinks: `[num_q_heads]`: a score for each head that takes part in the softmax and has no value.
      prefix_len: a query of position `p` sees the keys up to `max(p, prefix_len - 1)`.

    Returns:
      float64 `[q_len, num_q_heads, head_dim]`.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    q_len, num_q_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    k, v = (np.repeat(x, num_q_heads // num_kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * (head_dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    positions = kv_len - q_len + np.arange(q_len)
    keys = np.arange(kv_len)
    seen = keys <= np.maximum(positions, prefix_len - 1)[:, None]
    if window is not None:
        seen &= keys > positions[:, None] - window
        v = np.where(np.any(seen, axis=0)[:, None, None], v, 0)
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (num_q_heads, q_len, 1))
        scores = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights[..., :kv_len], v)
