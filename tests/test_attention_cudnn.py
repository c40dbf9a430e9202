"""cuDNN over the view: what is refused, and on a GPU what test_attention.py does not ask of the others."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention as suite
from caches import abstract_cache, plain_cache
from reference_attention import reference_attention

from jax_vattention import KVCacheManager, KVCacheSpec, LayerGroup, RaggedBatch, attention
from jax_vattention.attention import cudnn
from jax_vattention.attention.features import Features

SPEC = KVCacheSpec(2, 8, 128, 4, 2048, jnp.bfloat16, layout="layer_major")
PAGE_TOKENS = 1024
"""Of `SPEC`, as a GPU has it."""


def refusal(spec=SPEC, *, q_heads=32, dtype=jnp.bfloat16, max_q_len=1, features=suite.NONE, layer=0):
    q = jnp.zeros((4, q_heads, spec.head_dim), dtype)
    rows = jnp.zeros(4, jnp.int32)
    batch = RaggedBatch(rows, rows, rows, rows, max_q_len=max_q_len)
    found = []

    def look(cache):
        found.append(cudnn.refusal(q, cache.layer_view(layer), batch, features))

    jax.eval_shape(look, abstract_cache(spec))
    return found[0]


replaced = functools.partial(dataclasses.replace, SPEC)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spec": replaced(layout="token_major")}, "layout='token_major': "),
        ({"max_q_len": 2}, "requests of several queries"),
        ({"spec": replaced(groups=(LayerGroup((0, 1), window=64),))}, "windows"),
        ({"features": Features(soft_cap=30.0)}, "soft_cap"),
        ({"features": Features(sinks=jnp.zeros(32))}, "sinks"),
        ({"dtype": jnp.float16}, "types but bfloat16 and float16"),
        ({"spec": replaced(dtype=jnp.float32), "dtype": jnp.float32}, "types but bfloat16 and float16"),
        ({"spec": replaced(head_dim=60)}, "head_dim 60"),
        ({"spec": replaced(head_dim=256)}, "head_dim 256"),
        ({"spec": replaced(head_dim=80)}, "pages that hold no whole number of 128 tokens"),
        ({"spec": replaced(num_kv_heads=5), "q_heads": 40}, "pages that hold no whole number of 128 tokens"),
    ],
    ids=str,
)
def test_what_is_not_served_is_said(options, reason):
    assert refusal(**options).startswith(reason)


def test_without_cudnn_it_is_passed_over(monkeypatch):
    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    assert refusal() == f"jax {jax.__version__} (cuDNN is not detected.)"


def by_xla(monkeypatch):
    """`jax.nn.dot_product_attention` without cuDNN: NaN where a length is 0, as cuDNN before 9.25 has it."""
    original = jax.nn.dot_product_attention

    def attend(*operands, implementation, key_value_seq_lengths, **options):
        out = original(*operands, key_value_seq_lengths=key_value_seq_lengths, **options, implementation="xla")
        return jnp.where((key_value_seq_lengths == 0)[:, None, None, None], jnp.nan, out)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


def run(q, spec, contents, slots, kv_lens, q_starts=None, active=None):
    cache = plain_cache(spec, contents)
    # Nothing is NaN here: XLA, in the place of cuDNN, multiplies what it does not see by 0.
    cache = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0, x) if x.dtype == spec.dtype else x, cache)
    batch = RaggedBatch.decode(*(jnp.asarray(x, jnp.int32) for x in (slots, kv_lens)), active)
    if q_starts is not None:
        batch = dataclasses.replace(batch, q_starts=jnp.asarray(q_starts, jnp.int32))
    return cudnn.run(q, cache.layer_view(1), cache.order, batch, suite.NONE, scale=spec.head_dim**-0.5)


def small(lengths):
    spec = KVCacheSpec(2, 2, 16, 5, 64, jnp.bfloat16, 4096, layout="layer_major")
    rng = np.random.default_rng(0)
    contents = {slot: suite.random_kv(rng, spec, length) for slot, length in lengths.items()}
    q = jnp.asarray(rng.standard_normal((6, 4, 16)), spec.dtype)
    return spec, contents, q


def expected(q, contents, slot):
    kv = contents[slot][:, 1]
    return reference_attention(q[None].astype(jnp.float32), kv[:, 0], kv[:, 1])[0]


def test_queries_go_to_the_rows_of_their_slots_and_back(monkeypatch):
    """Slots in any order, idle rows that name the slot of another, padding between and behind requests."""
    by_xla(monkeypatch)
    spec, contents, q = small({4: 33, 0: 5, 2: 64})
    slots, kv_lens = [4, 0, 0, 2], [33, 7, 5, 64]
    active = jnp.asarray([True, False, True, True])
    out, order = run(q, spec, contents, slots, kv_lens, q_starts=[0, 1, 2, 4], active=active)
    np.testing.assert_array_equal(order, 0)
    assert out.dtype == q.dtype
    out = np.asarray(out.astype(jnp.float32))
    for token, slot in ((0, 4), (2, 0), (4, 2)):
        np.testing.assert_allclose(out[token], expected(q[token], contents, slot), atol=2e-2)
    np.testing.assert_array_equal(out[[1, 3, 5]], 0)


def test_of_two_requests_that_name_one_slot_one_gets_nan(monkeypatch):
    by_xla(monkeypatch)
    spec, contents, q = small({1: 9, 3: 5})
    out = np.asarray(run(q, spec, contents, [1, 3, 1], [9, 5, 9])[0].astype(jnp.float32))
    np.testing.assert_array_equal(out[0], np.nan)
    for token, slot in ((1, 3), (2, 1)):
        np.testing.assert_allclose(out[token], expected(q[token], contents, slot), atol=2e-2)


def test_a_request_without_a_slot_takes_none_from_others(monkeypatch):
    """What `attention` makes of a slot that does not exist: slot 0 and the length 0."""
    by_xla(monkeypatch)
    spec, contents, q = small({0: 9})
    out = np.asarray(run(q, spec, contents, [0, 0], [9, 0])[0].astype(jnp.float32))
    np.testing.assert_allclose(out[0], expected(q[0], contents, 0), atol=2e-2)
    np.testing.assert_array_equal(out[1:], 0)


# On the GPU


def check(requests, *, q_heads=32, layers=(1,), **options):
    garbage = options.pop("garbage", None)
    sizes = {"head_dim": 128, "kv_heads": 8, "max_seq_len": 2 * PAGE_TOKENS + 100, "num_slots": 6} | options
    spec = suite.make_spec("cudnn", **sizes)
    suite.check("cudnn", spec, q_heads, requests, layers=layers, tokens=len(requests) + 1, max_q_len=1, garbage=garbage)


@pytest.mark.gpu
@pytest.mark.parametrize("end", [64, 128, 256, 512, PAGE_TOKENS, 2 * PAGE_TOKENS])
def test_lengths_around_ends_of_tiles_and_pages(end):
    """What follows a request's last page is not mapped, nor is anything of two slots."""
    check([(1, 1), (1, end - 1), (0, 0), (1, end), (1, end + 1), (0, 0)], layers=(0, 1))


@pytest.mark.gpu
def test_the_last_slot_full_to_its_end():
    """What follows the last slot is no address of the cache."""
    spec = suite.make_spec("cudnn", head_dim=128, kv_heads=8, max_seq_len=PAGE_TOKENS, num_slots=2)
    assert spec.kv_groups[0].slot_tokens == PAGE_TOKENS
    suite.check("cudnn", spec, 32, [(1, PAGE_TOKENS), (1, PAGE_TOKENS)], max_q_len=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"head_dim": 64, "q_heads": 8},
        {"head_dim": 32, "q_heads": 8},
        {"kv_heads": 1, "q_heads": 12},
        {"kv_heads": 4, "q_heads": 4},
        {"kv_heads": 8, "q_heads": 96},
    ],
    ids=str,
)
def test_shapes(options):
    check([(1, 1), (1, 63), (0, 0), (1, 300), (1, PAGE_TOKENS), (1, 1500)], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 0.0])
@pytest.mark.parametrize("part", ["K", "V"])
def test_garbage_behind_a_request(part, value):
    """Nor does NaN or infinity reach a result (cuDNN 9.19, H100), though only numbers are promised not to."""
    garbage = np.zeros((2, 2, 8, 128), np.float32)
    garbage[:, "KV".index(part)] = value
    lengths = [1, 63, 65, 127, 129, PAGE_TOKENS - 1]
    check([(1, length) for length in lengths], garbage=garbage)


@pytest.mark.gpu
def test_no_length_and_no_slot_makes_a_program_fault():
    spec = suite.make_spec("cudnn", head_dim=128, kv_heads=8)
    rng = np.random.default_rng(0)
    good = suite.random_kv(rng, spec, 5)
    with suite.opened_manager("cudnn", spec) as manager:
        suite.fill_manager(manager, {0: good}, garbage=0)
        cache = manager.step({1: 3})
        batch = suite.make_batch([0, 1, 2, -1, 6, 2**31 - 1], [1] * 6, [5, 10**6, 2**31 - 1, 9, 9, 9])
        q = jnp.asarray(rng.standard_normal((6, 32, 128)), spec.dtype)
        out, order = suite.program_of_layer(q, cache, 1, batch, implementation="cudnn")
        manager.finish(order)
        out = np.asarray(out.astype(jnp.float32))
        np.testing.assert_allclose(out[0], expected(q[0], {0: good}, 0), atol=2e-2)
        np.testing.assert_array_equal(out[2:], 0)
        del cache


@pytest.mark.gpu
@pytest.mark.parametrize("max_seq_len", [700_000, 5_000_000])
def test_offsets_beyond_32_bits(max_seq_len):
    """The last slot, of a view with more than 2**31 elements and with more than 2**34; and its stride beyond 2**31."""
    spec = suite.make_spec("cudnn", head_dim=128, kv_heads=8, num_slots=4, max_seq_len=max_seq_len)
    assert math.prod(spec.kv_groups[0].plane_shape) > 2**31
    device = suite.device_for("cudnn")
    rng = np.random.default_rng(2)
    kv = suite.random_kv(rng, spec, 1500)
    with (
        jax.default_device(device),
        KVCacheManager(spec, pool_bytes=spec.page_bytes * 100, device=device) as manager,
    ):
        for _ in range(spec.num_slots):
            manager.allocate()
        cache = manager.step({3: 1500})
        manager.finish(suite.fill(cache, jnp.asarray(kv, spec.dtype), 3, 1500))
        q = jnp.asarray(rng.standard_normal((1, 32, 128)), spec.dtype)
        batch = suite.make_batch([3], [1], [1500])
        out, order = suite.program_of_layer(q, cache, 1, batch, implementation="cudnn")
        manager.finish(order)
        np.testing.assert_allclose(np.asarray(out.astype(jnp.float32))[0], expected(q[0], {3: kv}, 3), atol=2e-2)
        del cache


@pytest.mark.gpu
def test_it_is_taken_where_no_other_is_named():
    spec = suite.make_spec("cudnn", head_dim=128, kv_heads=8)
    with suite.opened_manager("cudnn", spec) as manager:
        kv = suite.random_kv(np.random.default_rng(0), spec, 40)
        suite.fill_manager(manager, {0: kv}, garbage=0)
        cache = manager.step({})
        q = jnp.ones((1, 32, 128), spec.dtype)
        batch = suite.make_batch([0], [1], [40])
        out, cache = attention(q, cache, layer=1, batch=batch, implementation=("cudnn", "reference"))
        np.testing.assert_allclose(np.asarray(out.astype(jnp.float32))[0], expected(q[0], {0: kv}, 0), atol=2e-2)
        del cache
