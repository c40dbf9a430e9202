"""Programs compiled for GPUs on a machine that has none: the view is never copied and temporary memory is fixed."""

import jax
import jax.numpy as jnp
import pytest
from caches import abstract_cache
from compile_helpers import TARGETS, assert_views_not_copied, compile_for, cuda_plugin_installed, instructions

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch, attention

pytestmark = [
    pytest.mark.compile_gpu,
    pytest.mark.skipif(not cuda_plugin_installed(), reason="jax's CUDA plugin is not installed"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

REQUESTS = 16
Q_HEADS = 32


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract_batch(max_q_len):
    rows = int32(REQUESTS)
    return RaggedBatch(slots=rows, q_starts=rows, q_lens=rows, kv_lens=rows, max_q_len=max_q_len)


def llama_spec(max_seq_len=131072, dtype=jnp.bfloat16, head_dim=128, kv_heads=8):
    return KVCacheSpec(32, kv_heads, head_dim, num_slots=REQUESTS, max_seq_len=max_seq_len, dtype=dtype)


def abstract_q(spec, max_q_len):
    tokens = REQUESTS if max_q_len == 1 else 1024
    return jax.ShapeDtypeStruct((tokens, Q_HEADS, spec.head_dim), spec.dtype)


def straight(q, cache, layer, batch):
    out, cache = attention(q, cache, layer=layer, batch=batch)
    out, cache = attention(out, cache, layer=layer + 1, batch=batch)
    return out, cache.order


def scanned(q, cache, layer, batch):
    def step(carry, index):
        q, order = carry
        q, after = attention(q, cache.with_order(order), layer=layer + index, batch=batch)
        return (q, after.order), None

    return jax.lax.scan(step, (q, cache.order), jnp.arange(4, dtype=jnp.int32))[0]


def looped(q, cache, layer, batch):
    def step(carry):
        index, q, cache = carry
        q, cache = attention(q, cache, layer=layer + index, batch=batch)
        return index + 1, q, cache

    _, q, cache = jax.lax.while_loop(lambda carry: carry[0] < layer, step, (jnp.int32(0), q, cache))
    return q, cache.order


def conditional(q, cache, layer, batch):
    def read(q, cache):
        q, cache = attention(q, cache, layer=layer, batch=batch)
        return q, cache.order

    return jax.lax.cond(layer > 0, read, lambda q, cache: (q, cache.order), q, cache)


PROGRAMS = {"straight": straight, "scan": scanned, "while_loop": looped, "cond": conditional}


def compiled(target, program, spec, max_q_len):
    args = (abstract_q(spec, max_q_len), abstract_cache(spec), int32(), abstract_batch(max_q_len))
    return compile_for(target, PROGRAMS[program], *args)


def gpu_kernels(each):
    """Kernels of attention; `attention_decode` of Mosaic counts, and not the one that joins its results."""
    calls = [rest for *_, opcode, rest in instructions(each) if opcode == "custom-call"]
    joins = 'name = "attention_decode_combine"'
    return [
        rest for rest in calls if ("triton" in rest and joins not in rest) or 'custom_call_target="mosaic_gpu' in rest
    ]


def mosaic_kernels(each):
    return [rest for rest in gpu_kernels(each) if 'custom_call_target="mosaic_gpu' in rest]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("max_q_len", [1, 512], ids=["decode", "prefill"])
def test_view_is_not_copied(program, max_q_len):
    short, long = llama_spec(max_seq_len=8192), llama_spec(max_seq_len=131072)
    programs = [compiled("h100", program, spec, max_q_len) for spec in (short, long)]
    for spec, each in zip((short, long), programs, strict=True):
        assert_views_not_copied(each, spec)
    temporary = [each.memory_analysis().temp_size_in_bytes for each in programs]
    assert temporary[0] == temporary[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("max_q_len", [1, 512], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_kernels_fit_every_gpu(target, max_q_len, dtype, head_dim):
    spec = llama_spec(dtype=dtype, head_dim=head_dim)
    each = compiled(target, "straight", spec, max_q_len)
    assert_views_not_copied(each, spec)
    assert len(gpu_kernels(each)) == 2, "the GPU implementation was not chosen"
    hopper = target == "h100" and dtype == jnp.bfloat16 and head_dim in (64, 128)
    assert len(mosaic_kernels(each)) == (2 if hopper and jax.__version_info__ >= (0, 11) else 0)


SINKS = jax.ShapeDtypeStruct((Q_HEADS,), jnp.float32)
WITH_FEATURES = {
    "all": (KVCacheSpec(2, 8, 128, REQUESTS, 131072), {"sinks": SINKS, "prefix_lens": int32(REQUESTS)}),
    "cap, sinks and window": (
        KVCacheSpec(2, 8, 256, REQUESTS, 131072, jnp.float32, groups=(LayerGroup((0,)), LayerGroup((1,), window=4096))),
        {"sinks": SINKS},
    ),
}


def capped(q, cache, batch, arrays):
    for layer in (0, 1):
        q, cache = attention(q, cache, layer=layer, batch=batch, soft_cap=30.0, **arrays)
    return q, cache.order


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("max_q_len", [1, 512], ids=["decode", "prefill"])
@pytest.mark.parametrize("features", WITH_FEATURES)
def test_features_fit_every_gpu(target, max_q_len, features):
    spec, arrays = WITH_FEATURES[features]
    args = (abstract_q(spec, max_q_len), abstract_cache(spec), abstract_batch(max_q_len), arrays)
    each = compile_for(target, capped, *args)
    assert_views_not_copied(each, spec)
    assert len(gpu_kernels(each)) == 2, "the GPU implementation was not chosen"
