"""Attention of other libraries, on ordinary arrays of the same lengths: cuDNN through JAX, torch, and FlashInfer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._attention import Outcome, Sizes, Work, after, random_arrays
from benchmarks._report import BenchmarkError
from benchmarks._timing import back_to_back

_PADDED_BYTES = 8 * 2**30
"""Most memory for K and V padded to the longest request. JAX never gives it back, and later rows need theirs."""

_PAGE_TOKENS = 16  # of FlashInfer's pages
_WORKSPACE_BYTES = 256 * 2**20  # of FlashInfer


def _padded_layers(work: Work, sizes: Sizes) -> int:
    """How many layers fit, padded to the longest request.

    Raises:
      BenchmarkError: not even one.
    """
    padded = len(work.kv_lens) * max(work.kv_lens) * sizes.token_bytes
    if padded > _PADDED_BYTES:
        raise BenchmarkError(f"K and V padded to the longest request take {padded / 2**30:.0f} GiB a layer")
    return min(sizes.chained, _PADDED_BYTES // padded)


def _q_len(work: Work) -> int:
    """Queries of each request.

    Raises:
      BenchmarkError: requests differ.
    """
    [q_len, *others] = set(work.q_lens)
    if others:
        raise BenchmarkError("expected the same number of queries in every request")
    return q_len


def cudnn(work: Work, sizes: Sizes, seconds: float) -> Outcome:
    """cuDNN through `jax.nn.dot_product_attention`, with lengths as operands in decode."""
    layers, q_len, requests = _padded_layers(work, sizes), _q_len(work), len(work.kv_lens)
    queries = random_arrays(layers, (requests, q_len, sizes.num_q_heads, sizes.head_dim), seed=4)
    shape = (requests, max(work.kv_lens), sizes.num_kv_heads, sizes.head_dim)
    keys, values = random_arrays(layers, shape, seed=5), random_arrays(layers, shape, seed=6)
    lengths = None if q_len > 1 else (jnp.ones(requests, jnp.int32), jnp.asarray(work.kv_lens, jnp.int32))
    # Its causal mask counts from the first key: a chunk behind others would see too few of them.
    causal = q_len > 1 and q_len == max(work.kv_lens)
    program = jax.jit(functools.partial(dot_product_attention, causal=causal, implementation="cudnn"))
    timing = back_to_back(
        lambda: program(queries, keys, values, lengths), jax.block_until_ready, seconds=seconds
    ).divided(layers)
    return Outcome(timing, layers)


def dot_product_attention(
    queries: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    lengths: tuple[jax.Array, jax.Array] | None,
    *,
    causal: bool,
    implementation: Any,
) -> list[jax.Array]:
    """The program that is timed; arrays are `[requests, tokens, heads, dim]`, `lengths` of queries and of keys."""
    q_lens, kv_lens = lengths or (None, None)
    results: list[jax.Array] = []
    for q, k, v in zip(queries, keys, values, strict=True):
        out = jax.nn.dot_product_attention(
            after(q, results),
            k,
            v,
            is_causal=causal,
            query_seq_lengths=q_lens,
            key_value_seq_lengths=kv_lens,
            implementation=implementation,
        )
        results.append(out)
    return results


def torch_device() -> tuple[Any, str, Callable[[Any], None]]:
    """torch, the device of it that JAX uses too, and what waits for that.

    Raises:
      BenchmarkError: torch sees no GPU, where JAX does.
    """
    import torch

    if jax.default_backend() != "gpu":
        return torch, "cpu", lambda _: None
    if not torch.cuda.is_available():
        raise BenchmarkError(f"torch {torch.__version__} finds no GPU")
    return torch, "cuda", lambda _: torch.cuda.synchronize()


def torch_sdpa(work: Work, sizes: Sizes, seconds: float, *, backend: str | None = None) -> Outcome:
    """torch's `scaled_dot_product_attention`.

    Args:
      backend: a name of `torch.nn.attention.SDPBackend`; None: whichever torch picks.
    """
    torch, device, wait = torch_device()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layers, q_len, requests = _padded_layers(work, sizes), _q_len(work), len(work.kv_lens)
    backends = [getattr(SDPBackend, backend)] if backend else list(_usual_backends(SDPBackend))

    def random(tokens: int, heads: int) -> Any:
        # [requests, heads, tokens, dim], in memory as the other libraries have it.
        shape = (requests, tokens, heads, sizes.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2)

    queries = [random(q_len, sizes.num_q_heads) for _ in range(layers)]
    keys = [random(max(work.kv_lens), sizes.num_kv_heads) for _ in range(layers)]
    values = [random(max(work.kv_lens), sizes.num_kv_heads) for _ in range(layers)]
    options = _torch_mask(torch, device, work, q_len)

    def launch() -> Any:
        for q, k, v in zip(queries, keys, values, strict=True):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        return out

    with sdpa_kernel(backends), torch.inference_mode():
        timing = back_to_back(launch, wait, seconds=seconds)
    return Outcome(timing.divided(layers), layers)


def _usual_backends(backends: Any) -> Sequence[Any]:
    return backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.MATH


def _torch_mask(torch: Any, device: str, work: Work, q_len: int) -> dict[str, Any]:
    """Which keys a query sees, as options of `scaled_dot_product_attention`."""
    longest = max(work.kv_lens)
    if q_len == longest:
        return {"is_causal": True}
    if q_len > 1:
        from torch.nn.attention.bias import causal_lower_right

        return {"attn_mask": causal_lower_right(q_len, longest)}
    if len(set(work.kv_lens)) == 1:
        return {}
    lengths = torch.tensor(work.kv_lens, device=device)
    return {"attn_mask": (torch.arange(longest, device=device) < lengths[:, None])[:, None, None, :]}


def flashinfer_decode(work: Work, sizes: Sizes, seconds: float) -> Outcome:
    """FlashInfer's paged decode on tensor cores; pages lie in no order, as in a server that has run for a while."""
    import flashinfer

    torch, device, wait = torch_device()
    pages = [-(-length // _PAGE_TOKENS) for length in work.kv_lens]
    kv_shape = (sum(pages), 2, _PAGE_TOKENS, sizes.num_kv_heads, sizes.head_dim)
    q_shape = (len(pages), sizes.num_q_heads, sizes.head_dim)

    def random(shape: tuple[int, ...]) -> list[Any]:
        return [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(sizes.chained)]

    def int32(values: Any) -> Any:
        return torch.tensor(np.asarray(values, np.int32), device=device)

    queries, caches = random(q_shape), random(kv_shape)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        int32(np.cumsum([0, *pages])),
        int32(np.random.default_rng(0).permutation(sum(pages))),
        int32([(length - 1) % _PAGE_TOKENS + 1 for length in work.kv_lens]),
        sizes.num_q_heads,
        sizes.num_kv_heads,
        sizes.head_dim,
        _PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )

    def launch() -> Any:
        for q, cache in zip(queries, caches, strict=True):
            out = wrapper.run(q, cache)
        return out

    return Outcome(back_to_back(launch, wait, seconds=seconds).divided(sizes.chained), sizes.chained)
