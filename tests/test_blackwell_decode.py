"""The decode kernel for Blackwell GPUs: in Pallas' interpreter, and compiled for a GPU that is not there."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from caches import abstract_cache
from compile_helpers import assert_views_not_copied, compile_for, cuda_plugin_installed, instructions
from decode_cases import check_decode

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch
from jax_vattention.attention import api, blackwell_decode
from jax_vattention.attention.features import Features

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([300, 1, 128, 0, 127], {"blocks": 3, "head_dim": 128}),
        ([130, 0, 33], {"layout": "layer_major", "dtype": "float16", "head_dim": 96, "soft_cap": 2.0, "sinks": True}),
        ([300, 65, 0, 40], {"queries": [2, 1, 0, 2], "window": 100, "blocks": 1}),
        ([130, 60, 9], {"queries": [3, 3, 3], "prefix": [129, 0, 5], "head_dim": 256, "kv_heads": 1}),
        ([150, 0, 33], {"dtype": "float8_e4m3fn", "head_dim": 192, "group": 12, "kv_heads": 1}),
    ],
    ids=str,
)
def test_in_the_interpreter(lengths, options):
    options = {"blocks": 2} | options
    tiling = dataclasses.replace(
        blackwell_decode.default_tiling(options.get("head_dim", 64)), blocks=options.pop("blocks")
    )
    check_decode(blackwell_decode.run, lengths, tiling=tiling, **options)


def test_what_is_not_served_is_said():
    spec = KVCacheSpec(1, 2, 64, 4, 256, jnp.bfloat16, 4096)
    q = jax.ShapeDtypeStruct((4, 32, 64), jnp.bfloat16)
    view, batch = abstract_cache(spec).layer_view(0), abstract_batch(requests=2, max_q_len=4)
    assert blackwell_decode.refusal(q, view, batch, Features(None, None, None)) is None
    batch = dataclasses.replace(batch, max_q_len=5)
    refused = blackwell_decode.refusal(q, view, batch, Features(None, None, None))
    assert refused == "5 queries of 16 query heads for a KV head"


def abstract_batch(requests, max_q_len):
    rows = jax.ShapeDtypeStruct((requests,), jnp.int32)
    return RaggedBatch(slots=rows, q_starts=rows, q_lens=rows, kv_lens=rows, max_q_len=max_q_len)


def needs_compiler(test):
    """Marks it."""
    there = cuda_plugin_installed() and jax.__version_info__ >= (0, 11)
    test = pytest.mark.skipif(not there, reason="jax's CUDA plugin is not installed, or too old")(test)
    return pytest.mark.compile_b200(test)


@needs_compiler
@pytest.mark.parametrize(
    ("head_dim", "layout"),
    [(64, "layer_major"), (96, "token_major"), (128, "layer_major"), (192, "token_major"), (256, "token_major")],
)
def test_compiles(head_dim, layout):
    compiles(KVCacheSpec(2, 8, head_dim, 16, 131072, jnp.bfloat16, layout=layout))


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 256])
def test_float8_compiles(head_dim):
    compiles(KVCacheSpec(2, 8, head_dim, 16, 131072, jnp.float8_e4m3fn))


def compiles(spec):
    q = jax.ShapeDtypeStruct((16, 32, spec.head_dim), jnp.bfloat16)
    compiled = compile_for("b200", attention, q, abstract_cache(spec), abstract_batch(16, 1))
    assert_views_not_copied(compiled, spec)
    [kernel] = [rest for *_, rest in instructions(compiled) if 'custom_call_target="mosaic_gpu' in rest]
    assert "tcgen05.mma" in kernel


def attention(q, cache, batch):
    """Of the second layer."""
    features = Features(None, None, None)
    return blackwell_decode.run(q, cache.layer_view(1), cache.order, batch, features, scale=0.1)


@needs_compiler
@pytest.mark.parametrize(("max_q_len", "window", "kernels"), [(1, None, 1), (4, 1000, 1), (512, None, 2)])
def test_all_that_is_asked_for_by_name_compiles(max_q_len, window, kernels):
    groups = () if window is None else (LayerGroup((0, 1), window=window),)
    spec = KVCacheSpec(2, 8, 128, 16, 131072, jnp.bfloat16, groups=groups)
    q = jax.ShapeDtypeStruct((1024, 32, 128), jnp.bfloat16)

    def program(q, cache, batch):
        return api.attention(q, cache, layer=1, batch=batch, implementation="mosaic_blackwell")[0]

    compiled = compile_for("b200", program, q, abstract_cache(spec), abstract_batch(16, max_q_len))
    assert_views_not_copied(compiled, spec)
    found = [rest for *_, rest in instructions(compiled) if 'custom_call_target="mosaic_gpu' in rest]
    assert len(found) == kernels
