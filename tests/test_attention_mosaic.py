"""The Hopper kernel, in Pallas' interpreter and on the GPU, by the cases and the reference of test_attention.py."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import prefill_cases
import pytest
import test_attention as suite
from caches import plain_cache, view_without_contents
from decode_cases import check_decode
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_interpreter import interpreter

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch, attention
from jax_vattention.attention import (
    decode_shape,
    decode_split,
    float8_queries,
    mosaic_decode,
    mosaic_mixed,
    mosaic_pace,
    mosaic_prefill,
    mosaic_rows,
    mosaic_view,
    pallas_mosaic,
    prefill_split,
    target,
)
from jax_vattention.attention.features import Features

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


# Queries are columns of products.
COLUMNS = [
    ([130, 1, 64, 63, 300], {"keys_as_rows": True, "blocks": 1, "head_dim": 128, "block_k": 128, "paged": True}),
    ([0, 55, 0, 600, 0, 5], {"keys_as_rows": True, "blocks": 3, "streams": 2, "room": 4}),
    ([257, 64], {"keys_as_rows": True, "layout": "layer_major", "group": 8, "dtype": "float16", "head_dim": 192}),
    ([60, 200], {"keys_as_rows": True, "group": 12, "kv_heads": 1, "soft_cap": 2.0, "sinks": True, "block_k": 128}),
    ([300, 40, 101, 0], {"keys_as_rows": True, "window": 100, "block_k": 128}),
    ([130, 60, 9], {"keys_as_rows": True, "queries": [3, 3, 3], "prefix": [129, 0, 5], "blocks": 3}),
    ([220, 33], {"keys_as_rows": True, "queries": [4, 1], "window": 50, "behind": 1}),
    # V is widened in registers; of some last tiles a half is computed.
    (
        [0, 119, 0, 600, 64, 65],
        {"keys_as_rows": True, "head_dim": 128, "dtype": "float8_e4m3fn", "block_k": 128, "room": 3},
    ),
    (
        [130, 60, 9],
        {"keys_as_rows": True, "head_dim": 128, "dtype": "float8_e4m3fn", "queries": [3, 1, 3], "window": 60},
    ),
    ([257, 64], {"keys_as_rows": True, "head_dim": 256, "dtype": "float8_e4m3fn", "block_k": 128, "soft_cap": 2.0}),
]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([130, 1, 64, 63, 300], {"blocks": 1}),
        ([0, 33, 0, 600, 0, 5], {"blocks": 3, "streams": 2}),
        ([257, 64], {"layout": "layer_major", "group": 8, "streams": 2}),
        ([70, 200], {"group": 1, "dtype": "float16", "head_dim": 96}),
        ([70, 200], {"group": 12, "kv_heads": 1, "soft_cap": 2.0, "sinks": True}),
        ([300, 40, 101, 0], {"window": 100, "blocks": 1}),
        ([300, 2, 65, 0, 64], {"queries": [2, 2, 1, 0, 2]}),
        ([130, 60, 9], {"queries": [3, 3, 3], "prefix": [129, 0, 5], "blocks": 3}),
        ([220, 33], {"queries": [4, 1], "window": 50}),
        ([130, 40], {"paged": True}),
        ([0, 0], {}),
        # Eight KV heads are read together, where there are as many and not said otherwise.
        ([100, 7, 0, 33], {"kv_heads": 8, "blocks": 3}),
        ([41, 70], {"kv_heads": 16, "group": 8, "layout": "layer_major", "block_k": 128, "head_dim": 128}),
        ([70, 9], {"kv_heads": 8, "group": 1, "soft_cap": 2.0, "sinks": True, "dtype": "float16", "head_dim": 96}),
        ([60, 2, 25, 0], {"kv_heads": 8, "group": 2, "queries": [2, 1, 3, 0], "window": 30}),
        ([33, 17], {"kv_heads": 8, "queries": [2, 2], "prefix": [32, 0], "group": 3, "block_k": 128}),
        ([40, 9], {"kv_heads": 8, "group": 2, "queries": [2, 1], "dtype": "float8_e4m3fn", "sinks": True}),
        ([40, 0, 17], {"kv_heads": 8, "dtype": "float8_e4m3fn", "block_k": 128, "head_dim": 128, "streams": 2}),
        ([150, 0, 33], {"dtype": "float8_e4m3fn", "group": 12, "kv_heads": 1}),
        ([70, 150], {"dtype": "float8_e4m3fn", "group": 2, "queries": [3, 1], "head_dim": 128, "window": 60}),
        ([40, 17], {"kv_heads": 8, "together": 1}),
        # Streams that may have more tiles under way, and fewer again: at every mark the interpreter says the other.
        ([700, 5, 420], {"behind": 1, "blocks": 1}),
        ([300, 411], {"behind": 2, "mark": 2, "stages": 1, "kv_heads": 8, "dtype": "float8_e4m3fn"}),
        *COLUMNS,
    ],
    ids=str,
)
def test_in_the_interpreter(lengths, options):
    check_tiled(lengths, {"together": 8} | options)


def check_tiled(lengths, options, **also):
    options = {"blocks": 2} | options
    fields = {field.name for field in dataclasses.fields(decode_shape.Tiling)}
    tiling = decode_shape.Tiling(**{name: options[name] for name in options.keys() & fields})
    options = {name: options[name] for name in options.keys() - fields}
    check_decode(mosaic_decode.run, lengths, tiling=tiling, **options, **also)


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "options"), COLUMNS, ids=str)
def test_queries_as_columns(lengths, options):
    check_tiled(lengths, options, interpreted=False)
    check_tiled(lengths, options | {"blocks": 128}, interpreted=False)


class Leaking(mosaic_rows.Wgmma):
    """Adds what is in idle rows of queries and of weights to all scores and weights."""

    def __init__(self, shape, local, **memory):
        super().__init__(shape, local, **memory)
        self.used = shape.product_rows

    def leak(self, operand, dtype):
        return jnp.abs(operand[self.used :].astype(jnp.float32)).sum().astype(dtype)

    def scores(self, q, k, meanwhile):
        return super().scores(q, k, meanwhile) + self.leak(q[...], jnp.float32)

    def add(self, acc, shrunk, weights, v):
        return super().add(acc, shrunk, weights + self.leak(weights, weights.dtype), v)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float8_e4m3fn"}, {"kv_heads": 8}, {"queries": [3, 2], "prefix": [60, 0]}], ids=str
)
def test_idle_rows_of_products_are_zeros(options):
    tiling = decode_shape.Tiling(blocks=2, together=8)
    check_decode(functools.partial(mosaic_decode.run, products=Leaking), [130, 40], tiling=tiling, **options)


def split_queries(twice, interpret):
    """`float8_queries.split` of `[64, head_dim]`, in a kernel of its own."""

    def split(queries, parts_out, factors_out, twice, parts):
        twice[...] = queries[...]
        factors_out[...] = float8_queries.split(twice, parts, interpreted=True)
        parts_out[...] = parts[...]

    return plgpu.kernel(
        split,
        out_type=(jax.ShapeDtypeStruct(twice.shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct((64,), jnp.float32)),
        scratch_types=(plgpu.SMEM(twice.shape, twice.dtype), plgpu.SMEM(twice.shape, jnp.float8_e4m3fn)),
        interpret=interpret,
    )(twice)


def test_queries_in_two_float8_parts_are_as_exact_as_bfloat16():
    rng = np.random.default_rng(0)
    tile = rng.standard_normal((32, 96)) * 10.0 ** np.resize([-6, -1, 0, 2, 4, -36, 36], 32)[:, None]
    tile[5] = 0
    tile = jnp.asarray(tile, jnp.bfloat16)
    twice = jnp.repeat(tile.reshape(4, 1, 8, 96), 2, axis=1).reshape(64, 96)
    parts, factors = (np.asarray(each.astype(jnp.float32)) for each in split_queries(twice, interpreter()))
    first, second = np.moveaxis(parts.reshape(4, 2, 8, 96), 1, 0)
    whole = (first + second / float8_queries.LOST).reshape(32, 96) * factors.reshape(4, 2, 8)[:, 0].reshape(32, 1)
    expected = np.asarray(tile.astype(jnp.float32))
    largest = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 2.0**-100)
    assert (np.abs(whole - expected) <= np.abs(expected) * 2.0**-8 + largest * 2.0**-21).all()
    np.testing.assert_array_equal(float8_queries.row_at(float8_queries.place(jnp.arange(32))), np.arange(32))


def test_what_is_not_served_is_said_and_the_next_one_taken():
    cache = plain_cache(KVCacheSpec(1, 2, 64, 4, 256, jnp.float32, 4096), {0: np.ones((5, 1, 2, 2, 64), np.float32)})
    batch = suite.make_batch([0], [1], [5])
    q = jnp.ones((1, 4, 64))
    with pytest.raises(ValueError, match="'mosaic' does not serve"):
        attention(q, cache, layer=0, batch=batch, implementation="mosaic")
    np.testing.assert_allclose(attention(q, cache, layer=0, batch=batch)[0], 1, rtol=1e-6)


# On the GPU


def check(
    requests, *, q_heads=32, layers=(31,), num_layers=32, dtype="bfloat16", features=suite.NONE, scales=None, **options
):
    """`test_attention.check`, at the Llama-3-8B shape unless said; skipped where the GPU is no Hopper."""
    if target.capability() != "9.0":
        pytest.skip("no Hopper GPU")
    sizes = {"head_dim": 128, "kv_heads": 8, "max_seq_len": 1100, "num_slots": len(requests)} | options
    spec = suite.make_spec("mosaic", dtype=dtype, layers=num_layers, **sizes)
    tokens, longest = sum(count for count, _ in requests) + 1, max(count for count, _ in requests)
    options = {"tokens": tokens, "max_q_len": longest, "layers": layers, "features": features, "kv_scales": scales}
    suite.check("mosaic", spec, q_heads, requests, **options, q_dtype=jnp.bfloat16 if spec.quantized else None)


@pytest.mark.gpu
@pytest.mark.parametrize("end", [8, 16, 32, 64, 128, 512])
def test_lengths_around_ends_of_boxes_tiles_and_pages(end):
    """A page holds 16 tokens, and what follows a request's last one is not mapped."""
    check([(1, end - 1), (1, end), (1, end + 1)])


@pytest.mark.gpu
@pytest.mark.parametrize("end", [18, 36, 54, 73])
def test_pages_that_hold_no_whole_number_of_boxes(end):
    """Of 28 layers a page holds 18.3 tokens."""
    check([(1, end - 1), (1, end), (1, end + 1)], num_layers=28, layers=(0, 27))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "layer_major", "num_layers": 2, "layers": (1,)},
        {"dtype": "float16", "num_layers": 2, "layers": (0, 1)},
        {"head_dim": 64, "q_heads": 8},
        {"kv_heads": 1, "q_heads": 12, "num_layers": 2, "layers": (1,)},
        {"kv_heads": 32, "num_layers": 4, "layers": (1,)},
        {"kv_heads": 1, "q_heads": 1, "num_layers": 2, "layers": (1,)},
        {"kv_heads": 3, "q_heads": 9, "num_layers": 2, "layers": (1,)},
        {"head_dim": 96, "num_layers": 4, "layers": (1,)},
        {"head_dim": 192, "num_layers": 4, "layers": (3,)},
        {"head_dim": 256, "kv_heads": 4, "q_heads": 16, "num_layers": 4, "layers": (3,)},
        {"groups": (LayerGroup((0, 1), window=100),), "num_layers": 2, "layers": (1,)},
        {"groups": (LayerGroup((0, 1), window=700),), "num_layers": 2, "layers": (1,), "head_dim": 256},
    ],
    ids=str,
)
def test_shapes(options):
    check([(1, 1), (1, 63), (0, 0), (1, 300), (1, 1000)], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_several_queries(window):
    """As speculative decoding asks for."""
    groups = () if window is None else (LayerGroup(tuple(range(8)), window=window),)
    check([(4, 4), (1, 63), (0, 0), (3, 300), (4, 1000), (2, 66)], num_layers=8, layers=(7,), groups=groups)


@pytest.mark.gpu
def test_features():
    features = Features(20.0, jnp.linspace(-2, 3, 32), jnp.asarray([3, 64, 0, 0], jnp.int32))
    check([(4, 4), (2, 63), (1, 300), (4, 1000)], num_layers=8, layers=(7,), features=features)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "times"),
    [(64, 8, 1), (96, 8, 1), (128, 8, 1), (128, 8, 3), (128, 16, 2), (192, 8, 3), (256, 8, 1)],
)
@pytest.mark.parametrize("layout", ["token_major", "layer_major"])
def test_float8(head_dim, kv_heads, times, layout):
    """Of more requests than there are streams for their heads, all heads of a token are read together."""
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (2, 2, kv_heads)).astype(np.float32)
    options = {"dtype": "float8_e4m3fn", "num_layers": 2, "layers": (1,), "layout": layout}
    requests = [(1, 1), (1, 63), (0, 0), (1, 300), (1, 1000), (1, 129)] * times
    check(requests, scales=scales, head_dim=head_dim, kv_heads=kv_heads, **options)


@pytest.mark.gpu
def test_one_schedule_serves_several_layers():
    """What streams count in is 0 again when a kernel is over, whoever was the last."""
    if target.capability() != "9.0":
        pytest.skip("no Hopper GPU")
    rng, lengths = np.random.default_rng(0), [1000, 1, 77, 690]
    spec = KVCacheSpec(2, 8, 128, len(lengths), 1024)
    contents = {slot: suite.random_kv(rng, spec, length) for slot, length in enumerate(lengths)}
    q = jnp.asarray(rng.standard_normal((len(lengths), 32, 128)), jnp.bfloat16)
    batch = suite.make_batch(range(len(lengths)), [1] * len(lengths), lengths)

    @jax.jit
    def program(q, cache, batch):
        found = []
        for _ in range(3):
            out, cache = attention(q, cache, layer=1, batch=batch, implementation="mosaic")
            found.append(out)
        return found

    first, *others = (np.asarray(each.astype(jnp.float32)) for each in program(q, plain_cache(spec, contents), batch))
    suite.compare(first, q, contents, list(contents), [1] * len(lengths), 1, spec, None)
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_pace_changes_no_result(monkeypatch, dtype):
    """Streams count how far they are, and leave the counter at 0."""
    if target.capability() != "9.0":
        pytest.skip("no Hopper GPU")
    rng, lengths = np.random.default_rng(0), [6000, 3000, 1]
    spec = KVCacheSpec(1, 8, 128, len(lengths), 6144, dtype)
    scales = np.full((1, 2, 8), 0.05, np.float32) if spec.quantized else None
    contents = {slot: suite.random_kv(rng, spec, length, scales) for slot, length in enumerate(lengths)}
    cache = plain_cache(spec, contents, kv_scales=scales)
    q = jnp.asarray(rng.standard_normal((len(lengths), 32, 128)), jnp.bfloat16)
    batch = suite.make_batch(range(len(lengths)), [1] * len(lengths), lengths)
    default = decode_shape.default_tiling(128, spec.dtype, len(lengths) * 8)
    split, tables = decode_split.split, []

    def remembered(*args, **options):
        tables.append(split(*args, **options))
        return tables[-1]

    monkeypatch.setattr(decode_split, "split", remembered)

    def outcome(behind):
        def program(q, cache, batch):
            tiling = dataclasses.replace(default, behind=behind)
            out, _ = mosaic_decode.run(q, cache.layer_view(0), cache.order, batch, Features(), scale=0.1, tiling=tiling)
            return out.astype(jnp.float32), tables.pop().streams

        out, streams = map(np.asarray, jax.jit(program)(q, cache, batch))
        assert not streams[:, decode_split.ARRIVED].any()
        return out, streams[:, decode_split.PROGRESS]

    (without, nothing), (paced, after) = outcome(0), outcome(1)
    np.testing.assert_array_equal(paced, without)
    assert not nothing.any()
    assert not after.any()
    monkeypatch.setattr(mosaic_pace, "end", lambda *_: None)
    again, counted = outcome(1)
    np.testing.assert_array_equal(again, without)
    step = 256  # keys: four tiles of 64, or two of 128
    shares = 8 * sum(-(-length // decode_split.GRAIN) for length in lengths) * decode_split.GRAIN / default.blocks
    assert counted[0] == pytest.approx(default.blocks * (shares // step), rel=0.2)
    assert not counted[1:].any()


# Prefill


@pytest.mark.parametrize(
    ("requests", "options"),
    [
        ([(200, 200)], {"blocks": 1}),
        ([(5, 5), (0, 0), (150, 300), (1, 90)], {}),
        ([(70, 170), (64, 64)], {"layout": "layer_major", "group": 4}),
        ([(130, 259)], {"head_dim": 128, "dtype": "float16"}),
        ([(40, 300), (30, 33)], {"window": 50}),
        ([(40, 140), (70, 70), (30, 90)], {"prefix_lens": [100, 200, 85], "group": 1}),
        ([(40, 140)], {"soft_cap": 2.0, "sinks": True}),
        ([(20, 30)], {"scale": -0.2, "group": 3, "kv_heads": 3}),
        ([(0, 0), (0, 0)], {}),
        ([(1, 9), (2, 20)], {"blocks": 5}),  # more blocks than there is padding to fill
        ([(150, 300)], {"ping_pong": False, "own_out": False, "q_stages": 1, "block_k": 128, "stages": 3}),
        ([(150, 300), (1, 90)], {"overlap": False}),
        ([(70, 170), (64, 64), (130, 130)], {"blocks": 1, "l2_bytes": 1}),  # in sections of heads and of requests
        ([(150, 300), (1, 90)], {"blocks": 2, "group": 4, "l2_bytes": 1, "layout": "layer_major", "sinks": True}),
    ],
    ids=str,
)
def test_prefill_in_the_interpreter(requests, options):
    prefill_cases.check(mosaic_prefill, requests, **options)


LARGE = [
    ([(100, 300), (1, 90)], {"large": (60, 2**5, 1)}),  # scores grow by about 60: the first attempt finds them
    ([(100, 300), (1, 90)], {"large": (60, 2**12, 1)}),  # by some thousands: weights overflow
    ([(100, 300)], {"large": (60, 2**3, 1), "sinks": True}),
    ([(100, 300)], {"large": (60, 2**5, 2.0**90)}),  # sums with V overflow
    ([(129, 300)], {"large": (200, 2**12, 1), "window": 150, "soft_cap": 500.0}),
    ([(65, 192), (60, 188)], {}),  # a row sees all of a tile and no key behind it
]
"""Of which several do not fit into the range that an optimistic attempt has."""
MORE_LARGE = [
    ([(100, 300)], {"large": (60, 2**12, 1), "dtype": "float16"}),
    ([(100, 300), (1, 90)], {"large": (60, 2**12, 1), "quiet": True}),  # in one block of a cluster only
    ([(65, 192), (60, 188)], {"prefix_lens": [128, 192]}),
    ([(100, 300)], {"large": (60, 2**12, 1), "group": 3, "kv_heads": 3}),
]
"""Not interpreted, for it takes long."""


@pytest.mark.parametrize(("requests", "options"), LARGE, ids=str)
def test_scores_that_grow_in_the_interpreter(requests, options):
    prefill_cases.check(mosaic_prefill, requests, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("requests", "options"), LARGE + MORE_LARGE, ids=str)
def test_scores_that_grow(requests, options):
    for sizes in ({}, {"cluster": 2}, {"blocks": 132, "block_k": 128}, {"blocks": 132, "block_k": 128, "cluster": 2}):
        prefill_cases.check(mosaic_prefill, requests, interpreted=False, **options | sizes)


CLUSTERS = [
    ([(70, 200), (20, 90)], {"dtype": "float16", "stages": 3}),
    ([(150, 300), (1, 90), (40, 128)], {"blocks": 4, "group": 4, "layout": "layer_major", "own_out": False}),
    ([(40, 300), (30, 33)], {"window": 50, "q_stages": 1, "sinks": True}),
    ([(100, 300), (1, 90)], {"large": (60, 2**12, 1)}),
    ([(150, 300), (1, 90)], {"blocks": 2, "group": 4, "l2_bytes": 1}),
]


@pytest.fixture
def clusters(monkeypatch):
    """As many blocks of a cluster as a tiling says, where that is interpreted.

    What the interpreter lacks is done otherwise: a copy to all blocks by each block for itself, and the verdict on a
    first attempt is that of a block (the blocks of these cases agree).
    """
    monkeypatch.setattr(mosaic_prefill, "tiling_of", lambda tiling, *_, **__: tiling)
    monkeypatch.setattr(
        mosaic_prefill, "number_of_block", lambda: 2 * jax.lax.axis_index("cluster") + jax.lax.axis_index("peer")
    )
    monkeypatch.setattr(mosaic_prefill, "any_of_cluster", lambda flags, _: (flags[0] != 0) | (flags[1] != 0))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "blocks", "expected"), [(8, 2, 132, 2), (6, 2, 132, 1), (8, 8, 132, 1), (8, 2, 3, 1)]
)
def test_clusters_divide_the_blocks_and_the_heads_of_a_group(heads, kv_heads, blocks, expected):
    q, view = jnp.zeros((1, heads, 64)), view_without_contents(4, 256, heads=kv_heads)
    tiling = mosaic_prefill.Tiling(cluster=2, blocks=blocks)
    assert mosaic_prefill.tiling_of(tiling, tiling, q, view, interpret=False).cluster == expected
    assert mosaic_prefill.tiling_of(tiling, tiling, q, view, interpret=True).cluster == 1


@pytest.mark.parametrize(("requests", "options"), CLUSTERS, ids=str)
def test_clusters_in_the_interpreter(clusters, requests, options):
    prefill_cases.check(mosaic_prefill, requests, cluster=2, **options)


@pytest.mark.parametrize(("tokens", "refused"), [(64, None), (72, "slots of 72 tokens")])
def test_slots_that_are_not_whole_runs_are_refused(tokens, refused):
    assert mosaic_view.refusal(jnp.zeros((1, 8, 8), jnp.bfloat16), view_without_contents(2, tokens)) == refused


# Both in one kernel


MIXED = [
    ([(5, 5), (1, 200), (0, 0), (150, 300), (1, 90), (1, 1)], {"blocks": 3}),
    ([(1, 130), (1, 8)], {"layout": "layer_major", "group": 4}),
    ([(40, 140), (0, 0)], {}),
    ([(40, 140), (1, 30), (1, 90)], {"prefix_lens": [100, 30, 85], "head_dim": 128}),
    ([(5, 5), (1, 200), (150, 300), (1, 310)], {"blocks": 3, "stages": 3, "decode": {"behind": 1, "mark": 2}}),
    ([(40, 300), (1, 300), (1, 20)], {"window": 50, "sinks": True, "decode": {"block_k": 128}}),
    ([(150, 300), (1, 90), (40, 40)], {"blocks": 1, "group": 4, "l2_bytes": 1}),
]
MORE_MIXED = [
    ([(40, 300), (1, 300), (1, 20)], {"window": 50, "sinks": True, "soft_cap": 2.0}),
    ([(100, 300), (1, 90)], {"large": (60, 2**12, 1)}),
    ([(200, 300), *[(1, 310)] * 8], {"blocks": 5}),  # the prefill is not in a hurry
    ([(37, 44), (1, 45)], {"group": 3, "kv_heads": 3}),
]
"""Not interpreted, for it takes long."""


def check_mixed(requests, *, decode=None, **options):
    decode_tiling = decode and decode_shape.Tiling(**decode)

    def run(*arguments, interpret, **also):
        also |= {"interpret": interpret, "interpret_tables": bool(interpret)}
        return mosaic_mixed.run(*arguments, decode_tiling=decode_tiling, **also)

    prefill_cases.check(types.SimpleNamespace(run=run, Tiling=mosaic_mixed.Tiling), requests, **options)


@pytest.mark.parametrize(("requests", "options"), MIXED, ids=str)
def test_mixed_in_the_interpreter(requests, options):
    check_mixed(requests, **options)


def test_mixed_clusters_in_the_interpreter(clusters):
    check_mixed([(5, 5), (1, 200), (150, 300), (1, 90)], blocks=4, cluster=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("requests", "options"), MIXED + MORE_MIXED, ids=str)
def test_mixed_in_one_kernel(requests, options):
    check_mixed(requests, interpreted=False, **options)
    check_mixed(requests, interpreted=False, **options | {"blocks": 132, "cluster": 2})


@pytest.mark.parametrize(
    ("chunk", "offset", "expected"), [(2048, 0, 1), (512, 4096, 1), (2048, 30720, 0), (8192, 0, 0)]
)
def test_a_prefill_takes_its_time_where_decodes_take_longer(chunk, offset, expected):
    heads, decodes = 32, 64
    tiling = mosaic_mixed.Tiling()
    rows = jnp.arange(decodes + 1, dtype=jnp.int32)
    q_lens, kv_lens = jnp.where(rows == 0, chunk, 1), jnp.where(rows == 0, offset + chunk, 4096)
    starts = jnp.cumsum(q_lens) - q_lens
    view = view_without_contents(decodes + 1, 32768, heads=8)
    batch = RaggedBatch(rows, starts, q_lens, kv_lens, max_q_len=chunk)
    q = jnp.zeros((chunk + decodes, heads, 8))
    sizes = prefill_split.Sizes(q.shape[0], q.shape[0], 128, tiling.block_k)
    counts = prefill_split.schedule(batch, view, Features(), sizes, apart=True, interpret=True).counts
    split = decode_split.split(
        batch, view, Features(), tokens=decodes + 1, sets=8, streams=tiling.blocks, apart=q.shape[0], interpret=True
    )
    shape = types.SimpleNamespace(num_q_heads=heads, tiling=tiling)
    assert mosaic_mixed._there_is_time(counts[2], split.streams[0, decode_split.NUM_UNITS], shape) == expected


@pytest.mark.parametrize("other", [{}, {"heads": 17}, {"registers": True}], ids=str)
def test_what_one_kernel_has_no_registers_for_goes_to_two(other, monkeypatch, caplog):
    called = []

    def kernel(name, refusal=None):
        def run(q, view, order, batch, features, *, scale):
            called.append(name)
            return q, order

        return types.SimpleNamespace(run=run, refusal=refusal)

    monkeypatch.setattr(target, "REGISTERS_STAY", other.get("registers", False))
    pallas_mosaic._say_that_there_are_two.cache_clear()
    kernels = pallas_mosaic.Kernels(kernel("decode"), kernel("prefill"), kernel("mixed", mosaic_mixed.refusal))
    view, rows = view_without_contents(2, 256), jnp.zeros(2, jnp.int32)
    batch = RaggedBatch(rows, rows, rows, rows, max_q_len=64)
    caplog.set_level("INFO", "jax_vattention.attention")
    for _ in range(2):
        kernels.run(jnp.zeros((65, other.get("heads", 16), 8)), view, rows, batch, Features(), scale=1.0)
    if other:
        assert called == ["decode", "prefill"] * 2
        [line] = caplog.messages  # once
        assert ("17 query heads" if "heads" in other else "registers") in line
    else:
        assert called == ["mixed"] * 2
        assert caplog.messages == []
