"""One suite for every implementation of attention, compared with `reference_attention` in float64.

`reference` runs on the host backend in strict mode: reading a token that is not mapped ends the process. `triton`
runs on a GPU, and without one in Pallas' interpreter over an ordinary array whose unused part is NaN. What is mapped
behind a request's last token holds NaN, but for `cudnn`, which is promised numbers: test_attention_cudnn.py.
"""

import contextlib
import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import abstract_cache, dequantized, fitting_scales, plain_cache
from compile_helpers import entry_dependencies
from reference_attention import reference_attention

from jax_vattention import KVCache, KVCacheManager, KVCacheSpec, LayerGroup, RaggedBatch, attention
from jax_vattention.attention import api, implementations, picked
from jax_vattention.attention.features import Features
from jax_vattention.errors import NotDifferentiableError

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

NONE = Features()
HOST_PAGE_BYTES = 4096
ON_GPU = ("mosaic", "triton", "cudnn")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
every_implementation = pytest.mark.parametrize(
    "implementation", ["reference", "triton-interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
every_decode = pytest.mark.parametrize(
    "implementation",
    ["reference", "triton-interpret", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cudnn"))],
)
real_memory = pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=pytest.mark.gpu)])
real_memory_decode = pytest.mark.parametrize(
    "implementation", ["reference", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cudnn"))]
)


def device_for(implementation):
    if implementation not in ON_GPU:
        return jax.devices("cpu")[0]
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("no NVIDIA GPU")


def make_spec(
    implementation, *, head_dim=64, kv_heads=2, num_slots=6, max_seq_len=700, dtype=None, layers=2, **options
):
    """What `implementation` serves of it: `cudnn` no float32, which is the default, and one layout."""
    page_bytes = 2 << 20 if implementation in ON_GPU else HOST_PAGE_BYTES
    if implementation == "cudnn":
        options = {"layout": "layer_major", **options}
    if dtype is None:
        dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    return KVCacheSpec(layers, kv_heads, head_dim, num_slots, max_seq_len, dtype, page_bytes, **options)


def run_attention(implementation, q, cache, *, layer, batch, scale=None, features=NONE):
    """`attention`, or the Triton kernel in Pallas' interpreter."""
    if implementation != "triton-interpret":
        options = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
        return attention(q, cache, layer=layer, batch=batch, scale=scale, **options, implementation=implementation)
    pallas_triton = pytest.importorskip("jax_vattention.attention.pallas_triton")
    scale = cache.spec.head_dim**-0.5 if scale is None else scale
    view = cache.layer_view(layer)
    features = features.bounded(batch)
    out, order = pallas_triton.run(q, view, cache.order, batch, features, scale=scale, interpret=True)
    return out, cache.with_order(order)


def _program(q, cache, layer, batch, features=NONE, *, implementation, scale=None):
    out, cache = run_attention(implementation, q, cache, layer=layer, batch=batch, scale=scale, features=features)
    return out, cache.order


program = jax.jit(_program, static_argnames=("implementation", "scale"))
program_of_layer = jax.jit(_program, static_argnames=("implementation", "scale", "layer"))


def program_for(spec):
    """With the layer as an operand, if the cache is one array."""
    return program if not spec.groups and spec.layout == "token_major" else program_of_layer


@jax.jit
def fill(cache, values, slot, count):
    """Writes `values` `[tokens, layers, 2, heads, dim]` into a slot, and NaN into the rest of `count` mapped tokens."""
    positions = jnp.arange(values.shape[0], dtype=jnp.int32)
    for layer in range(cache.spec.num_layers):
        kv = values[:, layer]
        slots = jnp.full_like(positions, slot)
        cache = cache.append(kv[:, 0], kv[:, 1], layer=layer, slots=slots, positions=positions, mask=positions < count)
    return cache.order


@contextlib.contextmanager
def opened_manager(implementation, spec, kv_scales=None):
    """A manager with every slot allocated; the test has to drop its caches before it ends."""
    device = device_for(implementation)
    options = {"strict": device.platform == "cpu", "kv_scales": kv_scales}
    pool = spec.page_bytes * (spec.num_slots * spec.pages_for(spec.max_seq_len) if device.platform == "cpu" else 128)
    with jax.default_device(device), KVCacheManager(spec, pool_bytes=pool, device=device, **options) as manager:
        yield manager


def fill_manager(manager, contents, seen=None, garbage=np.nan):
    """Writes tokens, and behind them what no query may see.

    Args:
      manager: its slots are all allocated.
      contents: slot -> K and V `[tokens, layers, 2, heads, dim]`.
      seen: slot -> tokens whose queries are over.
      garbage: a number, or K and V of a token `[layers, 2, heads, dim]`.
    """
    spec = manager.spec
    while manager.stats().slots_live < spec.num_slots:
        manager.allocate()
    for slot, kv in contents.items():
        cache = manager.step({slot: len(kv)})
        # Garbage to the end of the last page; on a GPU pages are large: some tiles of it are enough.
        count = min(int(cache.mapped_lens[slot]), len(kv) + 300)
        values = np.broadcast_to(garbage, (spec.max_seq_len + 300, *kv.shape[1:])).astype(np.float32)
        values[: len(kv)] = kv
        manager.finish(fill(cache, jnp.asarray(values, wide_dtype(spec)), slot, count))
        del cache
        if seen is not None:
            # Now pages behind windows are not mapped any more: reading there ends the process.
            manager.finish(manager.step({}, seq_lens={slot: seen[slot]}))
            manager.sync()


def wide_dtype(spec):
    """Of queries, and of K and V before they are stored."""
    return jnp.float32 if spec.quantized else spec.dtype


def random_kv(rng, spec, tokens, kv_scales=None):
    shape = (tokens, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    kv = np.asarray(jnp.asarray(rng.standard_normal(shape), wide_dtype(spec)), np.float32)
    return dequantized(kv, kv_scales) if spec.quantized else kv


def make_batch(slots, q_lens, kv_lens, max_q_len=None):
    starts = np.concatenate([[0], np.cumsum(q_lens)[:-1]])
    arrays = [jnp.asarray(x, jnp.int32) for x in (slots, starts, q_lens, kv_lens)]
    return RaggedBatch(*arrays, max_q_len=max(q_lens) if max_q_len is None else max_q_len)


def check(
    implementation,
    spec,
    q_heads,
    requests,
    *,
    tokens=None,
    max_q_len=None,
    scale=None,
    layers=(1,),
    features=NONE,
    garbage=None,
    kv_scales=None,
    q_dtype=None,
):
    """`requests`: (q_len, kv_len) each; kv_len 0 with q_len 0 is an idle row whose slot has nothing mapped."""
    if garbage is None:
        garbage = 1e4 if implementation == "cudnn" else np.nan
    rng = np.random.default_rng(0)
    q_lens, kv_lens = (list(x) for x in zip(*requests, strict=True))
    slots = list(range(spec.num_slots))[::-1][: len(requests)]
    lengths = {slot: length for slot, length in zip(slots, kv_lens, strict=True) if length}
    contents = {slot: random_kv(rng, spec, length, kv_scales) for slot, length in lengths.items()}
    tokens = sum(q_lens) if tokens is None else tokens
    q = jnp.asarray(rng.standard_normal((tokens, q_heads, spec.head_dim)), q_dtype or wide_dtype(spec))
    batch = make_batch(slots, q_lens, kv_lens, max_q_len)
    seen = {slot: kv_len - q_len for slot, q_len, kv_len in zip(slots, q_lens, kv_lens, strict=True)}
    with contextlib.ExitStack() as stack:
        if implementation == "triton-interpret":
            cache = plain_cache(spec, contents, seen, kv_scales)
        else:
            manager = stack.enter_context(opened_manager(implementation, spec, kv_scales))
            fill_manager(manager, contents, seen, garbage)
            cache = manager.step({slot: len(kv) for slot, kv in contents.items()})
        for layer in layers:
            out, order = program_for(spec)(q, cache, layer, batch, features, implementation=implementation, scale=scale)
            assert out.shape == q.shape
            assert out.dtype == q.dtype
            np.testing.assert_array_equal(np.asarray(order), 0)
            compare(np.asarray(out.astype(jnp.float32)), q, contents, slots, q_lens, layer, spec, scale, features)
        del cache


def compare(out, q, contents, slots, q_lens, layer, spec, scale, features=NONE):
    start = 0
    prefix_lens = [0] * len(slots) if features.prefix_lens is None else np.asarray(features.prefix_lens)
    for slot, q_len, prefix_len in zip(slots, q_lens, prefix_lens, strict=True):
        if q_len:
            kv = contents[slot][:, layer]
            mine = slice(start, start + q_len)
            window = spec.kv_groups[spec.places[layer][0]].window
            expected = reference_attention(
                q[mine].astype(jnp.float32),
                kv[:, 0],
                kv[:, 1],
                scale=scale,
                window=window,
                soft_cap=features.soft_cap,
                sinks=features.sinks,
                prefix_len=prefix_len,
            )
            tolerance = TOLERANCE[q.dtype.name]
            np.testing.assert_allclose(out[mine], expected, atol=tolerance, rtol=tolerance)
        start += q_len
    np.testing.assert_array_equal(out[start:], 0)


def boundary_lengths(spec):
    """One below, at and one above the ends of tiles and pages."""
    pages = {round(pages * spec.tokens_per_page) for pages in (1, 2, 60)}
    ends = {16, 32, 64, 128, 256} | {end for end in pages if end < spec.max_seq_len}
    return sorted({end + step for end in ends for step in (-1, 0, 1) if end + step > 0} | {1, spec.max_seq_len})


@every_decode
def test_decode_at_boundaries(implementation):
    spec = make_spec(implementation, max_seq_len=1100 if implementation in ON_GPU else 300)
    lengths = boundary_lengths(spec)
    for first in range(0, len(lengths), spec.num_slots):
        some = lengths[first : first + spec.num_slots]
        some += [1] * (spec.num_slots - len(some))
        check(implementation, spec, 6, [(1, length) for length in some])


@every_implementation
def test_prefill_at_boundaries(implementation):
    spec = make_spec(implementation, num_slots=3, max_seq_len=1100 if implementation == "triton" else 300)
    lengths = boundary_lengths(spec)
    for first in range(0, len(lengths), spec.num_slots):
        some = lengths[first : first + spec.num_slots]
        some += [1] * (spec.num_slots - len(some))
        requests = [(length, length) for length in some]
        check(implementation, spec, 6, requests, tokens=3 * spec.max_seq_len, max_q_len=spec.max_seq_len)


@every_implementation
@pytest.mark.parametrize("max_q_len", [200, 512])
def test_prefill_chunks_decodes_and_idle_rows_mixed(implementation, max_q_len):
    requests = [(1, 130), (0, 0), (65, 65), (1, 1), (190, 300), (0, 0)]
    check(implementation, make_spec(implementation), 6, requests, tokens=300, max_q_len=max_q_len, layers=(0, 1))


@every_decode
def test_decode_with_idle_rows_and_padding(implementation):
    requests = [(0, 0), (1, 33), (0, 0), (1, 600), (0, 0), (0, 0)]
    check(implementation, make_spec(implementation), 4, requests, tokens=9, max_q_len=1, layers=(0, 1))


@every_decode
def test_nothing_is_read_when_all_rows_are_idle(implementation):
    check(implementation, make_spec(implementation), 4, [(0, 0)] * 6, tokens=6, max_q_len=1)
    if implementation != "cudnn":
        check(implementation, make_spec(implementation), 4, [(0, 0)] * 6, tokens=40, max_q_len=8)


@every_implementation
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("max_q_len", [1, 70], ids=["decode", "prefill"])
def test_head_dims(implementation, head_dim, max_q_len):
    spec = make_spec(implementation, head_dim=head_dim, num_slots=2, max_seq_len=200, layers=1)
    check(implementation, spec, 4, [(max_q_len, 150), (1, 2)], layers=(0,))


@every_implementation
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 2), (8, 1), (40, 5), (96, 1)])
@pytest.mark.parametrize("max_q_len", [1, 20], ids=["decode", "prefill"])
def test_grouped_heads(implementation, q_heads, kv_heads, max_q_len):
    spec = make_spec(implementation, head_dim=32, kv_heads=kv_heads, num_slots=2, max_seq_len=200, layers=1)
    check(implementation, spec, q_heads, [(max_q_len, 150), (1, 2)], layers=(0,))


@every_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("max_q_len", [1, 90], ids=["decode", "prefill"])
def test_half_precision(implementation, dtype, max_q_len):
    spec = make_spec(implementation, dtype=dtype, num_slots=2)
    check(implementation, spec, 8, [(max_q_len, 400), (1, 77)])


def _groups(window):
    return (LayerGroup((0, 2)), LayerGroup((1, 3), window=window))


VARIANTS = {
    "layer_major": {"layout": "layer_major"},
    "window 1": {"groups": _groups(1)},
    "window 50": {"groups": _groups(50)},
    "window 64, layer_major": {"groups": _groups(64), "layout": "layer_major"},
    "window 1000": {"groups": _groups(1000)},
}


@every_implementation
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts_and_windows(implementation, variant):
    """Requests shorter, as long and longer than the window; pages behind it are not mapped."""
    decode = [(1, 1), (1, 50), (1, 51), (1, 64), (1, 640), (0, 0)]
    prefill = [(1, 300), (200, 200), (64, 64), (130, 670), (1, 1), (0, 0)]
    for dtype in ("float32", "bfloat16") if implementation in ON_GPU else ("float32",):
        spec = make_spec(implementation, layers=4, dtype=dtype, **VARIANTS[variant])
        check(implementation, spec, 6, decode, max_q_len=1, tokens=6, layers=(0, 3))
        check(implementation, spec, 6, prefill, tokens=400, layers=(1, 2))


@every_decode
def test_scale_is_a_factor_of_the_scores(implementation):
    check(implementation, make_spec(implementation), 4, [(1, 50), (1, 3)], scale=0.5)


# A prefix below, inside, and longer than the chunk, and longer than what is cached; what follows that is not mapped.
STEPS = {
    "decode": [(1, 1), (1, 64), (1, 65), (1, 330), (0, 0), (1, 7)],
    "mixed": [(30, 130), (0, 0), (65, 65), (1, 1), (150, 300), (70, 70)],
}
PREFIX_LENS = {"decode": [1, 0, 64, 400, 3, 7], "mixed": [90, 5, 20, 9, 290, 500]}


def make_features(step, *, soft_cap=None, sinks=None, prefix=False):
    """`sinks`: of the first and the last of 8 heads; the others are in between."""
    sinks = None if sinks is None else jnp.linspace(*sinks, 8, dtype=jnp.float32)
    return Features(soft_cap, sinks, jnp.asarray(PREFIX_LENS[step], jnp.int32) if prefix else None)


FEATURES = {
    "cap": {"soft_cap": 0.7},
    "sinks": {"sinks": (-3, 6)},
    "prefix": {"prefix": True},
    "cap, sinks and prefix": {"soft_cap": 2.0, "sinks": (6, -3), "prefix": True},
}


@every_implementation
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("used", "dtype"), [*((used, "float32") for used in FEATURES), ("cap, sinks and prefix", "bfloat16")]
)
def test_features(implementation, step, used, dtype):
    spec = make_spec(implementation, head_dim=32, dtype=dtype, layers=1)
    features = make_features(step, **FEATURES[used])
    check(implementation, spec, 8, STEPS[step], tokens=320, layers=(0,), scale=0.5, features=features)


FLOAT8 = {
    "token_major": {},
    "layer_major": {"layout": "layer_major"},
    "window 50": {"groups": _groups(50)},
}


def random_scales(spec):
    """Every head has another one, none of them a power of two."""
    shape = (spec.num_layers, 2, spec.num_kv_heads)
    return np.random.default_rng(3).uniform(0.009, 0.09, shape).astype(np.float32)


@every_implementation
@pytest.mark.parametrize(
    ("variant", "q_dtype"),
    [*(("token_major", dtype) for dtype in TOLERANCE), ("layer_major", "bfloat16"), ("window 50", "float32")],
)
def test_float8(implementation, variant, q_dtype):
    """As exact as other dtypes, compared with what is stored; garbage behind a request's last token is NaN here too."""
    spec = make_spec(implementation, layers=4, dtype=jnp.float8_e4m3fn, **FLOAT8[variant])
    layers = (0, 3) if variant == "token_major" else (3,)  # others compile a program for each
    options = {"layers": layers, "kv_scales": random_scales(spec), "q_dtype": q_dtype}
    check(implementation, spec, 6, STEPS["decode"], max_q_len=1, **options)
    check(implementation, spec, 6, STEPS["mixed"], tokens=320, **options)


@every_implementation
@pytest.mark.parametrize("step", STEPS)
def test_features_of_float8(implementation, step):
    spec = make_spec(implementation, head_dim=80, kv_heads=4, dtype=jnp.float8_e4m3fn)
    features = make_features(step, **FEATURES["cap, sinks and prefix"])
    check(implementation, spec, 8, STEPS[step], tokens=320, features=features, kv_scales=random_scales(spec))


@every_implementation
@pytest.mark.parametrize("q_len", [1, 100], ids=["decode", "prefill"])
def test_float8_is_close_to_what_was_appended(implementation, q_len):
    """Rounding to 4 bits is an error of 2.6%, of K and of V; the mean of random numbers keeps that of V whole."""
    spec = make_spec(implementation, num_slots=1, layers=1, dtype=jnp.float8_e4m3fn)
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((600, 1, 2, spec.num_kv_heads, spec.head_dim)).astype(np.float32)
    q = jnp.asarray(rng.standard_normal((q_len, 8, spec.head_dim)), jnp.float32)
    scales = fitting_scales(kv)
    with contextlib.ExitStack() as stack:
        if implementation == "triton-interpret":
            cache = plain_cache(spec, {0: dequantized(kv, scales)}, None, scales)
        else:
            manager = stack.enter_context(opened_manager(implementation, spec, scales))
            fill_manager(manager, {0: kv})
            cache = manager.step({0: 600})
        out, _ = program(q, cache, 0, make_batch([0], [q_len], [600]), implementation=implementation)
        del cache
    expected = reference_attention(q, kv[:, 0, 0], kv[:, 0, 1])
    error = np.linalg.norm(np.asarray(out) - expected) / np.linalg.norm(expected)
    assert error < 0.05


def test_triton_refuses_float8_views_that_it_cannot_address():
    """Offsets in them would be 32 bits and signed; no cache that a spec describes is so large and no larger."""
    pallas_triton = pytest.importorskip("jax_vattention.attention.pallas_triton")
    spec = make_spec("triton", max_seq_len=1000, dtype=jnp.float8_e4m3fn)
    view = abstract_cache(spec).layer_view(0)
    for tokens, refused in ((2**20, False), (2**21 + 1, True), (2**22, True), (2**22 + 1, False)):
        k = jax.ShapeDtypeStruct((1, tokens, 2, 2, 4, 64), spec.dtype)
        answer = pallas_triton.refusal(None, dataclasses.replace(view, k=k), None, NONE)
        assert (answer is not None) == refused


@every_implementation
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("used", ["cap", "sinks"])
def test_features_and_windows(implementation, step, used):
    spec = make_spec(implementation, head_dim=32, layers=4, **VARIANTS["window 50"])
    features = make_features(step, **FEATURES[used])
    check(implementation, spec, 8, STEPS[step], tokens=320, layers=(1,), features=features)


@every_implementation
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("sinks", [(-1e30, 1e30), (-float("inf"), -100), (100, 0)], ids=str)
def test_sinks_of_any_size(implementation, step, sinks):
    """From no weight at all to all of it; nothing overflows on the way."""
    spec = make_spec(implementation, head_dim=32, layers=1)
    features = Features(sinks=jnp.asarray([*sinks] * 4, jnp.float32))
    check(implementation, spec, 8, STEPS[step], tokens=320, layers=(0,), features=features)


@every_implementation
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (6, 2), (96, 1)])
@pytest.mark.parametrize("max_q_len", [1, 20], ids=["decode", "prefill"])
def test_features_of_grouped_heads(implementation, q_heads, kv_heads, max_q_len):
    spec = make_spec(implementation, head_dim=32, kv_heads=kv_heads, num_slots=2, max_seq_len=200, layers=1)
    sinks = jnp.linspace(-2, 4, q_heads, dtype=jnp.float32)
    features = Features(soft_cap=1.5, sinks=sinks, prefix_lens=jnp.asarray([140, 2], jnp.int32))
    check(implementation, spec, q_heads, [(max_q_len, 150), (1, 2)], layers=(0,), features=features)


@every_implementation
def test_chunks_equal_one_pass(implementation):
    spec = make_spec(implementation, num_slots=1)
    rng = np.random.default_rng(1)
    kv = random_kv(rng, spec, 300)
    q = jnp.asarray(rng.standard_normal((300, 4, spec.head_dim)), spec.dtype)
    with contextlib.ExitStack() as stack:
        if implementation == "triton-interpret":
            cache = plain_cache(spec, {0: kv})
        else:
            manager = stack.enter_context(opened_manager(implementation, spec))
            fill_manager(manager, {0: kv})
            cache = manager.step({0: 300})

        def run(cache, first, last):
            batch = make_batch([0], [last - first], [last])
            return np.asarray(program(q[first:last], cache, 0, batch, implementation=implementation)[0])

        whole = run(cache, 0, 300)
        parts = np.concatenate([run(cache, *chunk) for chunk in ((0, 127), (127, 256), (256, 300))])
        del cache
    np.testing.assert_allclose(parts, whole, atol=1e-5, rtol=1e-5)


@real_memory_decode
def test_reads_and_writes_keep_their_order(implementation):
    """Each read sees the append before it and not the one after it, though both are of the same token."""
    spec = make_spec(implementation, num_slots=1, layers=1, max_seq_len=300)
    rounds, tokens = 8, 256  # results are exact in bfloat16

    @jax.jit
    def overwrite(q, cache, values, batch):
        reads = []
        index = batch.token_index(1)
        for value in values:
            new = jnp.full((1, spec.num_kv_heads, spec.head_dim), value, spec.dtype)
            cache = cache.append(new, new, layer=0, slots=index.slots, positions=index.positions)
            out, cache = attention(q, cache, layer=0, batch=batch, implementation=implementation)
            reads.append(out[0, 0, 0])
        return jnp.stack(reads), cache.order

    q = jnp.zeros((1, 4, spec.head_dim), spec.dtype)
    with opened_manager(implementation, spec) as manager:
        fill_manager(manager, {0: np.zeros((tokens, 1, 2, spec.num_kv_heads, spec.head_dim), np.float32)}, garbage=0)
        cache = manager.step({0: tokens})
        values = jnp.arange(1, rounds + 1, dtype=jnp.float32) * tokens
        for _ in range(20):
            reads, order = overwrite(q, cache, values, make_batch([0], [1], [tokens]))
            np.testing.assert_allclose(np.asarray(reads, np.float32), np.arange(1, rounds + 1), rtol=1e-5)
            manager.finish(order)
        del cache


@pytest.mark.parametrize("max_q_len", [1, 64], ids=["decode", "prefill"])
def test_order_is_a_data_dependency_of_the_compiled_program(max_q_len):
    """order -> read -> order, in what the CPU's scheduler gets to see."""
    spec = make_spec("reference")
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    cache = abstract_cache(spec)
    rows = int32((6,))
    batch = RaggedBatch(slots=rows, q_starts=rows, q_lens=rows, kv_lens=rows, max_q_len=max_q_len)
    q = jax.ShapeDtypeStruct((64, 4, spec.head_dim), spec.dtype)

    def read(order, q, cache, batch):
        return attention(q, cache.with_order(order), layer=0, batch=batch, implementation="reference")[1].order

    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(read).lower(int32((4,)), q, cache, batch).compile()
    nodes = entry_dependencies(compiled)
    token = next(name for name, (opcode, _) in nodes.items() if opcode == "parameter" and name.startswith("order"))
    reads = [name for name, (opcode, before) in nodes.items() if opcode == "while" and token in before]
    assert reads, "the read does not depend on the order token"
    *_, result = nodes
    assert nodes[result][1].intersection(reads), "the order token that is returned does not depend on the read"


def test_a_prefix_changes_nothing_in_a_decode_step():
    """Its query is the last token and sees every key: the program is the same."""
    spec = make_spec("reference")
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = RaggedBatch(*[int32((6,))] * 4, max_q_len=1)
    q = jax.ShapeDtypeStruct((6, 4, spec.head_dim), spec.dtype)
    texts = [
        program.lower(q, abstract_cache(spec), int32(()), batch, features, implementation="reference").as_text()
        for features in (NONE, Features(prefix_lens=int32((6,))))
    ]
    assert texts[0] == texts[1]


@real_memory
@pytest.mark.parametrize(("dtype", "max_seq_len"), [(jnp.float32, 5_000_000), (jnp.float8_e4m3fn, 1_500_000)])
def test_offsets_beyond_32_bits(implementation, dtype, max_seq_len):
    """The view has more than 2**32 elements, and the last slot is used; float8 gets rows for that."""
    spec = make_spec(implementation, num_slots=4, max_seq_len=max_seq_len, layers=2, dtype=dtype)
    assert spec.view_bytes > 2**32 * spec.dtype.itemsize
    device = device_for(implementation)
    options = {"strict": True} if device.platform == "cpu" else {}
    rng = np.random.default_rng(2)
    kv = random_kv(rng, spec, 200, np.ones((2, 2, 2), np.float32))
    with (
        jax.default_device(device),
        KVCacheManager(spec, pool_bytes=spec.page_bytes * 400, device=device, **options) as manager,
    ):
        for _ in range(spec.num_slots):
            manager.allocate()
        cache = manager.step({3: 200})
        manager.finish(fill(cache, jnp.asarray(kv, wide_dtype(spec)), 3, 200))
        for q_len in (1, 30):
            q = jnp.asarray(rng.standard_normal((q_len, 4, spec.head_dim)), wide_dtype(spec))
            out, order = program(q, cache, 1, make_batch([3], [q_len], [200]), implementation=implementation)
            manager.finish(order)
            expected = reference_attention(q, kv[:, 1, 0], kv[:, 1, 1])
            np.testing.assert_allclose(np.asarray(out), expected, atol=2e-5, rtol=2e-5)
        del cache


@pytest.mark.parametrize("max_q_len", [1, 64], ids=["decode", "prefill"])
def test_temporary_memory_does_not_grow_with_the_cache(max_q_len):
    def temporary_bytes(max_seq_len):
        spec = make_spec("reference", max_seq_len=max_seq_len, num_slots=4)
        int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        cache = abstract_cache(spec)
        batch = RaggedBatch(*[int32((4,))] * 4, max_q_len=max_q_len)
        q = jax.ShapeDtypeStruct((64, 4, spec.head_dim), spec.dtype)
        with jax.default_device(jax.devices("cpu")[0]):
            compiled = program.lower(q, cache, int32(()), batch, implementation="reference").compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1024) == temporary_bytes(1 << 20)


class TestArguments:
    """What is refused, and how the implementation is chosen."""

    spec = KVCacheSpec(2, 2, 64, 4, 256, jnp.float32, HOST_PAGE_BYTES)

    def cache(self):
        return plain_cache(self.spec, {0: np.ones((5, 2, 2, 2, 64), np.float32)})

    def run(self, shape=(1, 4, 64), dtype=jnp.float32, **options):
        options = {"layer": 0, "batch": make_batch([0], [1], [5]), **options}
        return attention(jnp.ones(shape, dtype), self.cache(), **options)[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shape": (4, 64)}, "tokens, num_q_heads, head_dim"),
            ({"shape": (1, 4, 32)}, "head_dim 32, the cache has 64"),
            ({"shape": (1, 3, 64)}, "3 heads, which is not a multiple of the cache's 2"),
            ({"layer": 2}, "layer: expected 0 to 1, got 2"),
            ({"layer": -1}, "layer: expected 0 to 1, got -1"),
            ({"implementation": "fast"}, "mosaic, triton, cudnn, mosaic_blackwell, reference, got 'fast'"),
            ({"implementation": ()}, "empty sequence"),
            ({"soft_cap": 0}, "soft_cap must be positive and finite, got 0; pass None"),
            ({"soft_cap": -1.0}, "soft_cap must be positive and finite, got -1.0"),
            ({"soft_cap": float("inf")}, "soft_cap must be positive and finite, got inf"),
            ({"soft_cap": float("nan")}, "soft_cap must be positive and finite, got nan"),
            ({"sinks": jnp.zeros(2)}, r"sinks must be float32\[4\], one for each query head; got float32\[2\]"),
            ({"sinks": jnp.zeros((1, 4))}, r"sinks must be float32\[4\].* got float32\[1, 4\]"),
            ({"sinks": jnp.zeros(4, jnp.bfloat16)}, r"got bfloat16\[4\].*astype\('float32'\)"),
            ({"sinks": [0.0] * 4}, r"sinks must be float32\[4\].* got list\[4\]"),
            ({"prefix_lens": jnp.zeros(2, jnp.int32)}, r"prefix_lens must be int32\[1\], one for each request"),
            ({"prefix_lens": jnp.zeros(1)}, r"got float32\[1\].*astype\('int32'\)"),
            ({"prefix_lens": 3}, r"prefix_lens must be int32\[1\].* got int\[\]"),
        ],
    )
    def test_values_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.run(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": jnp.int32}, "float32, float16, bfloat16, got int32"),
            ({"layer": 1.0}, "layer: expected an int or an int32 scalar"),
        ],
    )
    def test_types_that_do_not_fit(self, options, message):
        with pytest.raises(TypeError, match=message):
            self.run(**options)

    def test_a_prefix_does_not_go_with_a_window(self):
        spec = dataclasses.replace(self.spec, groups=(LayerGroup((0,)), LayerGroup((1,), window=9)))
        cache = plain_cache(spec, {0: np.ones((5, 2, 2, 2, 64), np.float32)})
        options = {"batch": make_batch([0], [1], [5]), "prefix_lens": jnp.asarray([3], jnp.int32)}
        attention(jnp.ones((1, 4, 64)), cache, layer=0, **options, implementation="reference")
        with pytest.raises(
            ValueError, match=r"a window, here of 9 tokens: pass prefix_lens=None .* LayerGroup without"
        ):
            attention(jnp.ones((1, 4, 64)), cache, layer=1, **options)

    @pytest.mark.parametrize("name", ["scale", "soft_cap"])
    def test_numbers_that_are_compiled_in_are_not_traced(self, name):
        with pytest.raises(TypeError, match=f"{name} must be a Python number, not a traced value"):
            jax.jit(lambda value: self.run(**{name: value}))(1.0)

    @pytest.fixture
    def picky(self, monkeypatch):
        """An implementation that gives 7 and serves no sinks."""
        module = types.ModuleType("picky")
        module.run = lambda q, view, order, batch, features, *, scale: (jnp.full_like(q, 7), order)
        module.refusal = lambda q, view, batch, features: None if features.sinks is None else "sinks"
        implementation = api._Implementation("picky", ("cpu",))
        monkeypatch.setitem(sys.modules, f"{api.__package__}.picky", module)
        monkeypatch.setattr(api, "_IMPLEMENTATIONS", {"picky": implementation, **api._IMPLEMENTATIONS})

    @pytest.mark.usefixtures("picky")
    def test_an_implementation_that_does_not_serve_the_arguments_is_passed_over(self):
        sinks = jnp.full(4, -1e30)
        with jax.default_device(jax.devices("cpu")[0]):
            for which in (None, ("picky", "reference")):
                np.testing.assert_array_equal(np.asarray(self.run(implementation=which)), 7)
                np.testing.assert_allclose(np.asarray(self.run(implementation=which, sinks=sinks)), 1, rtol=1e-6)
            np.testing.assert_array_equal(np.asarray(self.run(implementation="picky")), 7)
            with pytest.raises(ValueError, match="'picky' does not serve sinks: pass implementation=None"):
                self.run(implementation="picky", sinks=sinks)

    def test_a_backend_that_this_jax_does_not_have_is_passed_over(self, monkeypatch):
        gone = api._Implementation("no_such_module", ("cpu",))
        monkeypatch.setattr(api, "_IMPLEMENTATIONS", {"gone": gone, **api._IMPLEMENTATIONS})
        with jax.default_device(jax.devices("cpu")[0]):
            np.testing.assert_allclose(np.asarray(self.run()), 1, rtol=1e-6)
            with pytest.raises(ValueError, match=r"'gone' does not serve jax .* \(No module named"):
                self.run(implementation="gone")

    def test_first_implementation_for_the_platform_is_used(self):
        assert implementations() == ("mosaic", "triton", "cudnn", "mosaic_blackwell", "reference")
        with jax.default_device(jax.devices("cpu")[0]):
            chosen = [self.run(implementation=which) for which in (None, ("triton", "reference"), "reference")]
        for out in chosen:
            np.testing.assert_allclose(np.asarray(out), 1, rtol=1e-6)

    @pytest.mark.usefixtures("picky")
    def test_what_was_picked_is_said_once_for_arguments_of_a_kind(self, caplog):
        kind = jax.devices("cpu")[0].device_kind
        api._say_once.cache_clear()
        with jax.default_device(jax.devices("cpu")[0]), caplog.at_level("INFO", "jax_vattention.attention"):
            for sinks in (None, jnp.zeros(4), None, jnp.ones(4)):
                self.run(sinks=sinks)
                self.run(sinks=sinks, implementation="reference")  # named: nothing to say
        heads = "decode, float32, 4 query and 2 KV heads of 64, token_major"
        only = "; ".join(f"'{name}' runs on cuda only" for name in ("mosaic", "triton", "cudnn", "mosaic_blackwell"))
        assert caplog.messages == [
            f"attention on {kind}: {heads}: 'picky'",
            f"attention on {kind}: {heads}, sinks: 'reference' ('picky' does not serve sinks; {only})",
        ]

    @pytest.mark.usefixtures("picky")
    @pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
    def test_picked_tells_without_running(self, abstract):
        arguments = (jnp.ones((1, 4, 64)), self.cache(), make_batch([0], [1], [5]), jnp.zeros(4))
        if abstract:
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        q, cache, batch, sinks = arguments
        with jax.default_device(jax.devices("cpu")[0]):
            tell = functools.partial(picked, q, cache, layer=0, batch=batch)
            assert tell() == "picky"
            assert tell(sinks=sinks) == "reference"
            assert tell(implementation=("triton", "reference")) == "reference"
            with pytest.raises(ValueError, match="'triton' runs on cuda only; 'picky' does not serve sinks: pass"):
                tell(implementation=("triton", "picky"), sinks=sinks)
            with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
                picked(q, cache, layer=2, batch=batch)

    @pytest.mark.gpu
    def test_picked_on_a_gpu(self):
        spec = dataclasses.replace(self.spec, dtype=jnp.bfloat16, head_dim=128, page_bytes=2 << 20)
        q = jax.ShapeDtypeStruct((1, 4, 128), jnp.bfloat16)
        for device, names in ((device_for("triton"), ("mosaic", "triton")), (jax.devices("cpu")[0], ("reference",))):
            with jax.default_device(device):
                assert picked(q, abstract_cache(spec), layer=0, batch=make_batch([0], [1], [5])) in names

    def test_no_tokens(self):
        assert self.run(shape=(0, 4, 64)).shape == (0, 4, 64)

    def test_query_may_have_another_dtype_than_the_cache(self):
        out = self.run(dtype=jnp.bfloat16)
        assert out.dtype == jnp.bfloat16


class TestDerivatives:
    """There are none, and one that is not asked for costs nothing."""

    spec = KVCacheSpec(1, 2, 64, 2, 64, jnp.float32, HOST_PAGE_BYTES)
    q = jnp.ones((1, 4, 64))
    batch = make_batch([0], [1], [5])

    def cache(self):
        return plain_cache(self.spec, {0: np.ones((5, 1, 2, 2, 64), np.float32)})

    def read(self, q, cache, **options):
        return attention(q, cache, layer=0, batch=self.batch, **options)[0].sum()

    def of_q(self, implementation):
        cache = self.cache()
        return lambda x: self.read(x * self.q, cache, implementation=implementation)

    def of_sinks(self, implementation):
        cache = self.cache()
        return lambda x: self.read(self.q, cache, sinks=jnp.full(4, x), implementation=implementation)

    def of_view(self, implementation):
        cache = self.cache()

        def read(x):
            scaled = KVCache(((x * cache.view,),), cache.mapped, cache.order, self.spec)
            return self.read(self.q, scaled, implementation=implementation)

        return read

    def of_append(self, implementation):
        cache = self.cache()
        at = {"slots": jnp.asarray([0], jnp.int32), "positions": jnp.asarray([4], jnp.int32)}

        def read(x):
            kv = jnp.full((1, 2, 64), x)
            return self.read(self.q, cache.append(kv, kv, layer=0, **at), implementation=implementation)

        return read

    @pytest.mark.parametrize("implementation", [None, "reference", "triton"])
    @pytest.mark.parametrize("what", ["q", "sinks", "view", "append"])
    @pytest.mark.parametrize("mode", ["grad", "jvp", "grad of jit", "grad of scan"])
    def test_asking_for_one_raises(self, implementation, what, mode):
        read = getattr(self, f"of_{what}")(implementation)
        scanned = lambda x: jax.lax.scan(lambda carry, _: (read(carry), None), x, length=2)[0]  # noqa: E731
        ask = {
            "grad": jax.grad(read),
            "jvp": lambda x: jax.jvp(read, (x,), (x,)),
            "grad of jit": jax.grad(jax.jit(read)),
            "grad of scan": jax.grad(scanned),
        }[mode]
        with pytest.raises(NotDifferentiableError, match=r"use jax.nn.dot_product_attention for training"):
            ask(1.0)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_the_rest_of_a_program_has_its_derivative(self, transform):
        cache = self.cache()
        kv = jnp.full((1, 2, 64), 2.0)
        at = {"slots": jnp.asarray([0], jnp.int32), "positions": jnp.asarray([6], jnp.int32)}

        def loss(x):
            after = cache.append(jax.lax.stop_gradient(x) * kv, kv, layer=0, **at)
            return x * self.read(jax.lax.stop_gradient(x) * self.q, after) / self.q.size

        with jax.default_device(jax.devices("cpu")[0]):
            np.testing.assert_allclose(jax.grad(transform(loss))(3.0), 1, rtol=1e-6)


@jax.jit
def append_and_read(q, k, v, cache, batch):
    index = batch.token_index(q.shape[0])
    layer = cache.spec.num_layers - 1
    cache = cache.append(k, v, layer=layer, slots=index.slots, positions=index.positions, mask=index.mask)
    out, cache = attention(q, cache, layer=layer, batch=batch)
    return out, cache.order


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, jnp.bfloat16), (96, jnp.bfloat16), (128, jnp.bfloat16), (128, jnp.float32)]
)
def test_lengths_around_page_ends(device, head_dim, dtype, decode):
    """A page of 2 MiB holds 8 to 32 tokens here, and what follows a request's last page is not mapped."""
    device = jax.devices(device)[0]
    probe = KVCacheSpec(32, 8, head_dim, 1, 1, dtype)
    # Slots without a row to spare: what follows the last slot is no address of ours.
    max_seq_len = probe.kv_groups[0].slot_tokens * -(-4 * probe.page_bytes // probe.slot_bytes)
    ends = [int(pages * probe.tokens_per_page) for pages in (1, 2, 3)]
    lengths = [end + offset for end in ends for offset in (-1, 0, 1)] + [max_seq_len]
    spec = KVCacheSpec(32, 8, head_dim, len(lengths), max_seq_len, dtype)
    assert spec.kv_groups[0].slot_tokens == max_seq_len
    rng = np.random.default_rng(0)
    tokens = sum(lengths)
    q, k, v = (
        jnp.asarray(rng.standard_normal((tokens, heads, head_dim)), dtype) for heads in (2 * spec.num_kv_heads, 8, 8)
    )
    slots = list(range(len(lengths)))
    with (
        jax.default_device(device),
        KVCacheManager(
            spec, pool_bytes=64 * spec.page_bytes, device=device, strict=device.platform == "cpu"
        ) as manager,
    ):
        for _ in slots:
            manager.allocate()
        cache = manager.step(dict(zip(slots, lengths, strict=True)))
        out, order = append_and_read(q, k, v, cache, make_batch(slots, lengths, lengths))
        manager.finish(order)
        if decode:
            last = np.cumsum(lengths) - 1
            q = q[last]
            batch = RaggedBatch.decode(jnp.asarray(slots, jnp.int32), jnp.asarray(lengths, jnp.int32))
            out, order = program(q, manager.step({}), spec.num_layers - 1, batch, implementation=None)
            manager.finish(order)
        del cache
    end = 0
    for row, length in enumerate(lengths):
        own = slice(end, end + length)
        wanted = reference_attention(
            *(np.asarray(x.astype(jnp.float32)) for x in (q[row : row + 1] if decode else q[own], k[own], v[own]))
        )
        found = (
            np.asarray(out.astype(jnp.float32))[row : row + 1] if decode else np.asarray(out.astype(jnp.float32))[own]
        )
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE[jnp.dtype(dtype).name], rtol=2e-2)
        end += length


@real_memory
@pytest.mark.parametrize("max_q_len", [1, 7])
def test_no_length_no_slot_and_no_prefix_makes_a_program_fault(implementation, max_q_len):
    spec = make_spec(implementation, layers=32, kv_heads=8)
    with opened_manager(implementation, spec) as manager:
        rng = np.random.default_rng(0)
        good = random_kv(rng, spec, 5)
        fill_manager(manager, {0: good})
        cache = manager.step({1: 3})
        slots = [0, 1, 2, -1, spec.num_slots, 2**31 - 1]
        kv_lens = [5, 10**6, 2**31 - 1, 9, 9, 9]
        q = jnp.asarray(rng.standard_normal((6 * max_q_len, 8, spec.head_dim)), spec.dtype)
        q_lens = [min(max_q_len, 5), *[max_q_len] * 5]
        features = Features(prefix_lens=jnp.asarray([3, 2**31 - 1, 5, -(2**31), 9, 2**31 - 1], jnp.int32))
        batch = make_batch(slots, q_lens, kv_lens)
        out, order = program(q, cache, 1, batch, features, implementation=implementation)
        manager.finish(order)
        out = np.asarray(out)[: q_lens[0]]
        compare(out, q[: q_lens[0]], {0: good}, [0], q_lens[:1], 1, spec, None, Features(prefix_lens=[3]))
        del cache
