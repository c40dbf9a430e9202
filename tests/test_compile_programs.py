"""Whole programs, compiled for GPUs that are not there and for the CPU: no instruction copies the view."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import abstract_cache
from compile_helpers import TARGETS, assert_views_not_copied, compile_for, cuda_plugin_installed, target_device
from flax import nnx

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch, attention
from jax_vattention.engine.programs import Programs, Rows
from jax_vattention.models import Llama, LlamaConfig

REQUESTS, Q_HEADS = 4, 8

on_every_target = pytest.mark.parametrize(
    "target",
    [
        "cpu",
        *(
            pytest.param(
                target,
                marks=[
                    pytest.mark.compile_gpu,
                    pytest.mark.skipif(not cuda_plugin_installed(), reason="jax's CUDA plugin is not installed"),
                    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
                ],
            )
            for target in TARGETS
        ),
    ],
)


def compile_on(target, fn, *arguments):
    if target == "cpu":
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        return jitted.lower(*arguments).compile()
    return compile_for(target, fn, *arguments)


def loops(compiled):
    """Of a program for a GPU: each costs launches of its own in every round, outside of CUDA graphs."""
    return compiled.as_text().count(" while(")


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


WINDOWS = (LayerGroup((0, 2)), LayerGroup((1, 3), window=1024))
VARIANTS = {
    "token_major": {},
    "layer_major": {"layout": "layer_major"},
    "windows": {"groups": WINDOWS},
    "windows, layer_major": {"groups": WINDOWS, "layout": "layer_major"},
}


def make_cache(max_seq_len, *, num_layers=4, num_kv_heads=2, head_dim=64, num_slots=64, **options):
    return abstract_cache(
        KVCacheSpec(num_layers, num_kv_heads, head_dim, num_slots, max_seq_len, jnp.bfloat16, **options)
    )


def layer_step(q, cache, batch, layer):
    """What a model does in a layer: append this step's K and V, then attend."""
    index = batch.token_index(q.shape[0])
    kv = q[:, : cache.spec.num_kv_heads]
    cache = cache.append(kv, kv, layer=layer, slots=index.slots, positions=index.positions, mask=index.mask)
    return attention(q, cache, layer=layer, batch=batch)


def straight(q, cache, batch):
    for layer in (0, 1):  # one of each kind, where there are two
        q, cache = layer_step(q, cache, batch, layer)
    return q, cache


def scan(q, cache, batch):
    return jax.lax.scan(
        lambda carry, layer: (layer_step(*carry, batch, layer), None), (q, cache), jnp.arange(4, dtype=jnp.int32)
    )[0]


def while_loop(q, cache, batch):
    def body(carry):
        layer, q, cache = carry
        return layer + 1, *layer_step(q, cache, batch, layer)

    return jax.lax.while_loop(lambda c: c[0] < jnp.max(batch.kv_lens), body, (jnp.int32(0), q, cache))[1:]


def cond(q, cache, batch):
    q, cache = jax.lax.cond(
        batch.kv_lens[0] > 5, lambda q, c: layer_step(q, c, batch, 0), lambda q, c: (q, c), q, cache
    )
    return layer_step(q, cache, batch, 1)


def known_lengths(q, cache, batch):
    """With lengths that XLA knows it simplifies loops, and moves out of them what it takes for constant."""
    starts = jnp.arange(REQUESTS, dtype=jnp.int32) * batch.max_q_len
    full = jnp.full(REQUESTS, batch.max_q_len, jnp.int32)
    return straight(q, cache, RaggedBatch(jnp.arange(REQUESTS), starts, full, full, max_q_len=batch.max_q_len))


CASES = [
    *((program, "token_major") for program in (straight, scan, while_loop, cond, known_lengths)),
    # A traced layer number cannot choose one of several arrays: no scan and no loop over layers.
    *((program, variant) for variant in ("layer_major", "windows") for program in (straight, cond, known_lengths)),
    (straight, "windows, layer_major"),
]


@on_every_target
@pytest.mark.parametrize("max_q_len", [1, 64], ids=["decode", "prefill"])
@pytest.mark.parametrize(("program", "variant"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_append_and_attention(target, program, variant, max_q_len):
    if target in ("h100", "b200") and program in (cond, known_lengths):
        pytest.skip("a program is the same for all GPUs but for its kernels, which the others have too")
    rows = int32(REQUESTS)
    batch = RaggedBatch(rows, rows, rows, rows, max_q_len=max_q_len)
    q = jax.ShapeDtypeStruct((REQUESTS * max_q_len, Q_HEADS, 64), jnp.bfloat16)
    temporary = []
    both = {"cpu": program in (straight, scan, while_loop), "h100": program is straight and variant == "token_major"}
    for max_seq_len in (4096, 131_072) if both.get(target) else (131_072,):
        cache = make_cache(max_seq_len, **VARIANTS[variant])
        compiled = compile_on(target, program, q, cache, batch)
        assert_views_not_copied(compiled, cache.spec)
        if target != "cpu":
            assert loops(compiled) == (program in (scan, while_loop))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert max(temporary) == min(temporary) < 32 * 2**20


def abstract_rows(size):
    return Rows(
        slots=int32(size),
        cached=int32(size),
        active=jax.ShapeDtypeStruct((size,), jnp.bool_),
        tokens_left=int32(size),
        temperatures=jax.ShapeDtypeStruct((size,), jnp.float32),
        seeds=jax.ShapeDtypeStruct((size,), jnp.uint32),
    )


@on_every_target
def test_the_programs_of_the_engine(target):
    """Of heads as SmolLM2 has them, which is the model of the README: 9 are no multiple of anything else."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=512,
        num_layers=4,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
    )
    model = nnx.eval_shape(lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    device = jax.devices("cpu")[0] if target == "cpu" else target_device(target)
    programs = Programs(model, eos_ids=frozenset({1}), decode_tokens=8, device=device)
    temporary: dict[str, list[int]] = {"prefill": [], "decode": []}
    for max_seq_len in (4096, 131_072):
        cache = make_cache(max_seq_len, num_kv_heads=3)
        rows, starts = abstract_rows(REQUESTS), int32(REQUESTS)
        for name, compiled in {
            "prefill": compile_on(
                target, programs._prefill, programs._weights, cache, rows, int32(256), starts, starts
            ),
            "decode": compile_on(target, programs._decode, programs._weights, cache, rows, starts),
        }.items():
            assert_views_not_copied(compiled, cache.spec)
            if target != "cpu":
                assert loops(compiled) == (name == "decode")  # over its tokens
            temporary[name].append(compiled.memory_analysis().temp_size_in_bytes)
            assert compiled.as_text().count("jax_vattention.append") >= config.num_layers
    for sizes in temporary.values():
        assert np.unique(sizes).size == 1
