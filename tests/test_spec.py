from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_vattention import KVCacheSpec, LayerGroup
from jax_vattention.spec import KV_TAIL_TOKENS

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
    assert spec.kv_groups[0].slot_tokens == 8192
    assert spec.view_shape == (4, 512, 32, 2, 16, 8, 128)
    assert spec.view_bytes == 4 * 8192 * 128 * 1024
    assert [spec.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_layer_major_llama_3_8b():
    spec = KVCacheSpec(**SIZES, layout="layer_major")
    (group,) = spec.kv_groups
    assert group.planes == 64
    assert group.plane_shape == (4, 8192, 8, 128)
    # A page holds 1,024 tokens of K or V of one layer, and a request takes one in every plane.
    assert spec.tokens_per_page == 1024
    assert [spec.pages_for(n) for n in (0, 1, 1024, 1025)] == [0, 64, 64, 128]
    assert spec.view_bytes == KVCacheSpec(**SIZES).view_bytes
    with pytest.raises(ValueError, match="this cache has several arrays"):
        _ = spec.view_shape


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, "float8_e4m3fn"])
def test_float8_llama_3_8b(dtype):
    spec = KVCacheSpec(**SIZES, dtype=dtype)
    assert spec.quantized
    assert not KVCacheSpec(**SIZES).quantized
    assert spec.token_bytes == 64 * 1024
    assert spec.tokens_per_page == 32
    assert [spec.pages_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


@pytest.mark.parametrize("layout", ["token_major", "layer_major"])
@pytest.mark.parametrize(
    ("max_seq_len", "gib"), [(2**15, 2), (2**15 + 1, None), (3 * 2**14, None), (2**16, None), (2**16 + 2048, 4.125)]
)
def test_planes_of_float8_are_never_of_2_to_4_gib(layout, max_seq_len, gib):
    """Triton kernels could not address them; more rows cost addresses only. None: above 4 GiB, by less than a slot."""
    layers = 1 if layout == "layer_major" else 2
    heads = 8 if layout == "layer_major" else 2
    spec = KVCacheSpec(layers, heads, 1024, 8, max_seq_len, jnp.float8_e4m3fn, layout=layout)
    (group,) = spec.kv_groups
    plane_bytes = group.view_bytes // group.planes
    if gib is None:
        assert 2**32 < plane_bytes <= 2**32 + 8 * spec.page_bytes
        assert spec.tokens_in(spec.pages_for(max_seq_len)) == max_seq_len == spec.max_seq_len
    else:
        assert plane_bytes == gib * 2**30
    # 2-byte elements are counted without trouble.
    wide = KVCacheSpec(layers, heads, 1024, 4, max_seq_len, jnp.bfloat16, layout=layout)
    assert wide.kv_groups[0].slot_tokens < max_seq_len + 2048


def test_groups():
    groups = (LayerGroup(range(0, 32, 2), window=1024), LayerGroup(range(1, 32, 2), num_kv_heads=2, head_dim=64))
    spec = KVCacheSpec(**SIZES, groups=groups)
    windowed, full = spec.kv_groups
    assert (windowed.window, windowed.num_kv_heads, windowed.head_dim) == (1024, 8, 128)
    assert (full.window, full.num_kv_heads, full.head_dim) == (None, 2, 64)
    assert spec.places == tuple((layer % 2, layer // 2) for layer in range(32))
    assert spec.token_bytes == 16 * 2 * 2 * (8 * 128 + 2 * 64)
    assert spec.pages_for(17) == windowed.pages_for(17) + full.pages_for(17)
    # Pages before a token hold nothing of it, and the first token behind them is all there.
    for token in (0, 1, 31, 32, 33, 1000):
        pages = windowed.pages_before(token)
        assert pages * windowed.page_bytes <= token * windowed.token_bytes < (pages + 1) * windowed.page_bytes
        assert windowed.first_token_in(pages) <= token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": (LayerGroup(range(31)),)}, "expected each of the layers 0 to 31 in one group"),
        ({"groups": (LayerGroup(range(32)), LayerGroup((0,)))}, "expected each of the layers 0 to 31 in one group"),
        ({"groups": (LayerGroup(range(32)), LayerGroup(()))}, "expected each of the layers 0 to 31 in one group"),
        ({"layout": "heads_major"}, "KVCacheSpec.layout: expected one of token_major, layer_major, got 'heads_major'"),
        ({"large_page_bytes": (3 << 20,)}, "large_page_bytes: expected ascending multiples"),
        ({"large_page_bytes": (8 << 20, 4 << 20)}, "large_page_bytes: expected ascending multiples"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        KVCacheSpec(**SIZES, **options)


def test_a_group_checks_itself():
    with pytest.raises(ValueError, match=r"LayerGroup.window: expected a positive integer, got 0"):
        LayerGroup((0,), window=0)
    with pytest.raises(TypeError, match="expected LayerGroup"):
        KVCacheSpec(**SIZES, groups=((0, 1),))


@pytest.mark.parametrize("name", [*SIZES, "page_bytes"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"KVCacheSpec.{name}: expected a positive integer, got {value}"):
        KVCacheSpec(**{**SIZES, name: value})


@pytest.mark.parametrize("value", [1.5, "8", None])
def test_sizes_must_be_integers(value):
    with pytest.raises(TypeError, match="expected a positive integer"):
        KVCacheSpec(**{**SIZES, "num_layers": value})


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2", "float64", "no such type", object()])
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
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn]),
    tokens=st.integers(0, 20_000),
)
def test_arithmetic(num_layers, num_kv_heads, head_dim, max_seq_len, page_bytes, dtype, tokens):
    spec = KVCacheSpec(num_layers, num_kv_heads, head_dim, 3, max_seq_len, dtype, page_bytes)
    (group,) = spec.kv_groups
    assert group.slot_tokens >= max_seq_len
    assert spec.slot_bytes == group.slot_tokens * spec.token_bytes == spec.slot_pages * page_bytes
    tokens = min(tokens, max_seq_len)
    pages = spec.pages_for(tokens)
    assert spec.tokens_in(pages) >= tokens
    # The waste of a slot is under one page, and what a kernel may read behind the last token.
    assert pages * page_bytes < (tokens + KV_TAIL_TOKENS - 1) * spec.token_bytes + page_bytes
    assert pages <= spec.slot_pages
