"""A Llama forward pass in plain float32 numpy, straight from a GGUF's tensors. Shares no code with the package."""

from __future__ import annotations

import gguf
import numpy as np


def _rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope_interleaved(x, theta):
    """Turns the pairs (0, 1), (2, 3), ... of `x` `[tokens, heads, head_dim]`: GGUF keeps Q and K for these."""
    tokens, _, head_dim = x.shape
    out = np.empty_like(x)
    for pair in range(head_dim // 2):
        angle = np.arange(tokens) * theta ** (-2 * pair / head_dim)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[:, :, 2 * pair], x[:, :, 2 * pair + 1]
        out[:, :, 2 * pair] = even * cos - odd * sin
        out[:, :, 2 * pair + 1] = even * sin + odd * cos
    return out


def _attention(q, k, v):
    """Full causal attention. `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`."""
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros_like(q)
    for head in range(heads):
        for token in range(tokens):
            scores = k[: token + 1, head // group] @ q[token, head] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[: token + 1, head // group]
    return out


def logits(path, ids):
    """Float32 logits `[tokens, vocab_size]` of one request with the token ids `ids`."""
    reader = gguf.GGUFReader(path)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def setting(key):
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    theta, eps = setting("rope.freq_base"), setting("attention.layer_norm_rms_epsilon")
    tokens, head_dim = len(ids), setting("embedding_length") // heads

    x = weights["token_embd.weight"][np.asarray(ids)]
    for number in range(setting("block_count")):
        layer = {name: weights[f"blk.{number}.{name}.weight"] for name in _LAYER}
        y = _rms_norm(x, layer["attn_norm"], eps)
        q = _rope_interleaved((y @ layer["attn_q"].T).reshape(tokens, heads, head_dim), theta)
        k = _rope_interleaved((y @ layer["attn_k"].T).reshape(tokens, kv_heads, head_dim), theta)
        v = (y @ layer["attn_v"].T).reshape(tokens, kv_heads, head_dim)
        x = x + _attention(q, k, v).reshape(tokens, heads * head_dim) @ layer["attn_output"].T
        y = _rms_norm(x, layer["ffn_norm"], eps)
        gate = y @ layer["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["ffn_up"].T)) @ layer["ffn_down"].T
    return _rms_norm(x, weights["output_norm.weight"], eps) @ weights["token_embd.weight"].T


_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
