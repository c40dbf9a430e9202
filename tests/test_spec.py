from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_vattention import KVCacheSpec

SIZES = {
    "num_layers": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_slots": 4,
    "max_seq_len": 8192,
}


def test_llama_3_8b():
    spec = KVCacheSpec(**SIZES, dtype=jnp.bfloat16)
    assert spec.token_bytes == 128 * 1024
    assert spec.tokens_per_page == 16
    assert spec.slot_tokens == 8192
    assert spec.view_shape == (4, 8192, 32, 2, 8, 128)
    assert spec.view_bytes == 4 * 8192 * 128 * 1024
    assert [spec.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize("name", [*SIZES, "page_bytes"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"KVCacheSpec.{name}: expected a positive integer, got {value}"):
        KVCacheSpec(**{**SIZES, name: value})


@pytest.mark.parametrize("value", [1.5, "8", None])
def test_sizes_must_be_integers(value):
    with pytest.raises(TypeError, match="expected a positive integer"):
        KVCacheSpec(**{**SIZES, "num_layers": value})


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such type", object()])
def test_dtype_must_be_supported(dtype):
    with pytest.raises((TypeError, ValueError), match=r"KVCacheSpec.dtype: expected one of float32, float16, bfloat16"):
        KVCacheSpec(**SIZES, dtype=dtype)


def test_positions_must_fit_int32():
    with pytest.raises(ValueError, match="positions are int32"):
        KVCacheSpec(**{**SIZES, "max_seq_len": 2**31 - 2, "head_dim": 127})


@given(
    num_layers=st.integers(1, 8),
    num_kv_heads=st.integers(1, 8),
    head_dim=st.integers(1, 256),
    max_seq_len=st.integers(1, 20_000),
    page_bytes=st.sampled_from([4096, 65536, 2**21]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    tokens=st.integers(0, 20_000),
)
def test_arithmetic(num_layers, num_kv_heads, head_dim, max_seq_len, page_bytes, dtype, tokens):
    spec = KVCacheSpec(num_layers, num_kv_heads, head_dim, 3, max_seq_len, dtype, page_bytes)
    assert spec.slot_tokens >= max_seq_len
    assert spec.slot_bytes == spec.slot_tokens * spec.token_bytes == spec.slot_pages * page_bytes
    tokens = min(tokens, max_seq_len)
    pages = spec.pages_for(tokens)
    assert spec.tokens_in(pages) >= tokens
    # The waste of a slot is under one page.
    assert pages * page_bytes < tokens * spec.token_bytes + page_bytes
    assert pages <= spec.slot_pages
