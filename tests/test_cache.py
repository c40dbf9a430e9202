"""KVCache: append writes where it should and nowhere else, and the view never leaves a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from caches import read_token
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_vattention import KVCache, KVCacheManager, KVCacheSpec, LayerGroup, errors
from jax_vattention.scales import quantize
from jax_vattention.spec import KV_TAIL_TOKENS

LAYERS, HEADS = 3, 2


def make(device, page_bytes, strict, *, head_dim=64, dtype=jnp.float32, num_slots=3, max_seq_len=2000, pages=10_000):
    spec = KVCacheSpec(LAYERS, HEADS, head_dim, num_slots, max_seq_len, dtype, page_bytes)
    return KVCacheManager(spec, pool_bytes=pages * page_bytes, device=device, strict=strict)


def random_kv(spec, tokens, seed=0):
    k, v = np.random.default_rng(seed).standard_normal((2, tokens, spec.num_kv_heads, spec.head_dim), np.float32)
    return jnp.asarray(k, spec.dtype), jnp.asarray(v, spec.dtype)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


@jax.jit
def append(cache, k, v, layer, slots, positions, mask=None):
    return cache.append(k, v, layer=layer, slots=slots, positions=positions, mask=mask)


def read(cache, slot, position):
    """One token, `[layers, 2, heads, head_dim]`, read through the view; nothing else is touched."""
    return np.stack(read_token(cache, slot, position))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 5, 64, 80, 128])
def test_append_writes_one_layer_of_each_token(device, page_bytes, strict, dtype, head_dim):
    with make(device, page_bytes, strict, head_dim=head_dim, dtype=dtype) as manager:
        slots = [manager.allocate() for _ in range(3)]
        lengths = dict(zip(slots, (1000, 7, 2000), strict=True))
        cache = manager.step(lengths)
        k, v = random_kv(manager.spec, 5)
        where = [(0, 0), (2, 1999), (1, 6), (0, 999), (2, 0)]
        done = append(cache, k, v, 1, ints(*(s for s, _ in where)), ints(*(p for _, p in where)))
        manager.finish(done)
        for token, (slot, position) in enumerate(where):
            expected = np.zeros((LAYERS, 2, HEADS, head_dim), np.float32)
            expected[1, 0], expected[1, 1] = np.asarray(k[token], np.float32), np.asarray(v[token], np.float32)
            np.testing.assert_array_equal(read(cache, slot, position), expected)
        del cache, done


def test_k_and_v_may_come_as_one_array(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        k, v = random_kv(manager.spec, 4)
        joined = jnp.stack([k, v], axis=1)
        done = append(cache, joined, None, 2, jnp.zeros(4, jnp.int32), ints(0, 1, 2, 3))
        manager.finish(done)
        for position in range(4):
            np.testing.assert_array_equal(read(cache, 0, position)[2], np.asarray(joined[position]))
        del cache, done


def test_large_batches_are_written_by_several_threads(device, page_bytes, strict):
    with make(device, page_bytes, strict, head_dim=128) as manager:
        cache = manager.step({manager.allocate(): 2000})
        k, v = random_kv(manager.spec, 2000)
        positions = jnp.asarray(np.random.default_rng(1).permutation(2000), jnp.int32)
        done = append(cache, k, v, 0, jnp.zeros(2000, jnp.int32), positions)
        manager.finish(done)
        for token in range(0, 2000, 97):
            np.testing.assert_array_equal(read(cache, 0, int(positions[token]))[0, 0], np.asarray(k[token]))
            np.testing.assert_array_equal(read(cache, 0, int(positions[token]))[0, 1], np.asarray(v[token]))
        del cache, done


def test_masked_tokens_are_not_written(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        k, v = random_kv(manager.spec, 3)
        # A masked token may name any place, even one that does not exist.
        done = append(cache, k, v, 0, ints(0, 0, 99), ints(0, 1, 5), jnp.array([True, False, False]))
        manager.finish(done)
        assert read(cache, 0, 0).any()
        assert not read(cache, 0, 1).any()
        del cache, done


GROUPS = (LayerGroup((0, 2), window=30), LayerGroup((1,), num_kv_heads=3, head_dim=8))


@pytest.mark.parametrize("layout", ["token_major", "layer_major"])
@pytest.mark.parametrize("joined", [False, True])
def test_append_in_every_layout_and_group(device, page_bytes, strict, layout, joined):
    spec = KVCacheSpec(LAYERS, HEADS, 64, 3, 2000, jnp.float32, page_bytes, layout=layout, groups=GROUPS)
    where = [(0, 0), (2, 1999), (1, 6), (0, 999), (2, 0)]
    slots, positions = ints(*(s for s, _ in where)), ints(*(p for _, p in where))

    @jax.jit
    def program(cache, kv):
        for layer, (k, v) in enumerate(kv):
            both = (jnp.stack([k, v], 1), None) if joined else (k, v)
            cache = cache.append(*both, layer=layer, slots=slots, positions=positions)
        return cache

    rng = np.random.default_rng(0)
    kv = [jnp.asarray(rng.standard_normal((2, 5, h, d)), jnp.float32) for h, d in ((2, 64), (3, 8), (2, 64))]
    with KVCacheManager(spec, pool_bytes=10_000 * page_bytes, device=device, strict=strict) as manager:
        cache = manager.step({manager.allocate(): length for length in (1000, 7, 2000)})
        done = program(cache, kv)
        manager.finish(done)
        for token, (slot, position) in enumerate(where):
            for found, written in zip(read_token(cache, slot, position), kv, strict=True):
                np.testing.assert_array_equal(found, written[:, token])
        assert not any(layer.any() for layer in read_token(cache, 0, 998))
        assert repr(cache) == f"KVCache(views={2 if layout == 'token_major' else 6}, dtype=float32)"
        with pytest.raises(ValueError, match="this cache has several arrays"):
            _ = cache.view
        del cache, done


def test_a_traced_layer_cannot_choose_one_of_several_arrays(device, page_bytes, strict):
    spec = KVCacheSpec(LAYERS, HEADS, 64, 3, 2000, jnp.float32, page_bytes, layout="layer_major")
    with KVCacheManager(spec, pool_bytes=100 * page_bytes, device=device, strict=strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        k, v = random_kv(spec, 1)
        with pytest.raises(TypeError, match="expected a Python int, for this cache has several arrays"):
            append(cache, k, v, 1, ints(0), ints(0))
        del cache


def test_writes_behind_a_window_are_dropped_and_reported(device, page_bytes, strict):
    spec = KVCacheSpec(LAYERS, HEADS, 64, 3, 2000, jnp.float32, page_bytes, groups=GROUPS)
    page = page_bytes // spec.kv_groups[0].token_bytes
    with KVCacheManager(spec, pool_bytes=1000 * page_bytes, device=device, strict=strict) as manager:
        slot = manager.allocate()
        unit = max(page, KV_TAIL_TOKENS)
        length = min(4 * unit + 30, 2000)
        manager.finish(manager.step({slot: length}))
        manager.sync()  # pages behind a window stay while others are mapped ahead
        cache = manager.step({slot: length}, seq_lens={slot: length - 1})
        first = int(cache.mapped[0][0, slot])
        assert first % page == 0
        assert length - 1 - 30 - unit < first <= length - 30
        assert int(cache.mapped[1][0, slot]) == 0
        k, v = random_kv(spec, 1)
        write = jax.jit(lambda cache, position: cache.append(k, v, layer=2, slots=ints(slot), positions=position))
        manager.finish(write(cache, ints(first)))
        cache = manager.step({})
        with pytest.raises(errors.DroppedWriteError, match=rf"slot {slot}, position {first - 1}"):
            manager.finish(write(cache, ints(first - 1)))
        del cache


@pytest.mark.parametrize(("slot", "position"), [(0, 10**6), (0, -1), (1, 0), (-1, 0), (3, 0), (2**31 - 1, 2**31 - 1)])
def test_writes_without_memory_are_dropped_and_reported(device, page_bytes, strict, slot, position):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        mapped = int(cache.mapped_lens[0]) if slot == 0 else 0
        k, v = random_kv(manager.spec, 2)
        done = append(cache, k, v, 0, ints(0, slot), ints(3, position))
        message = rf"slot {slot}, position {position}, where {mapped} "
        with pytest.raises(errors.DroppedWriteError, match=message) as caught:
            manager.finish(done)
        error = caught.value
        assert (error.count, error.slot, error.position, error.mapped_len) == (1, slot, position, mapped)
        # The other token was written, and the manager goes on.
        np.testing.assert_array_equal(read(cache, 0, 3)[0, 0], np.asarray(k[0]))
        cache = manager.step({0: 8})
        done = append(cache, k, v, 0, ints(0, 0), ints(4, 5))
        manager.finish(done)
        del cache, done


def test_the_mapped_length_is_the_limit(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 5})
        limit = int(cache.mapped_lens[0])
        tokens = manager.spec.pages_for(5) * page_bytes // manager.spec.token_bytes
        assert limit == min(tokens - tokens % KV_TAIL_TOKENS, 2000) >= 5  # kernels read whole runs
        k, v = random_kv(manager.spec, 1)
        done = append(cache, k, v, 0, ints(0), ints(limit - 1))
        manager.finish(done)
        if limit < 2000:
            done = append(manager.step({}), k, v, 0, ints(0), ints(limit))
            with pytest.raises(errors.DroppedWriteError, match=rf"position {limit}, where {limit} tokens"):
                manager.finish(done)
        del cache, done


def test_the_first_of_many_dropped_writes_is_named(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 1})
        k, v = random_kv(manager.spec, 4)

        @jax.jit
        def twice(cache):
            cache = cache.append(k, v, layer=0, slots=ints(1, 1, 1, 1), positions=ints(7, 7, 7, 7))
            return cache.append(k, v, layer=1, slots=ints(2, 2, 2, 2), positions=ints(8, 8, 8, 8))

        message = r"^8 write\(s\) were dropped; the first to slot 1, position 7"
        with pytest.raises(errors.DroppedWriteError, match=message):
            manager.finish(twice(cache))
        del cache


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_does_not_exist(device, page_bytes, strict, layer):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        k, v = random_kv(manager.spec, 1)
        with pytest.raises(ValueError, match=f"layer: expected 0 to 2, got {layer}"):
            cache.append(k, v, layer=layer, slots=ints(0), positions=ints(0))
        # As an operand it is known on the device alone.
        with pytest.raises(errors.DroppedWriteError):
            manager.finish(append(cache, k, v, layer, ints(0), ints(0)))
        del cache


def test_shapes_and_dtypes_are_checked(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 4})
        k, v = random_kv(manager.spec, 2)
        good = {"layer": 0, "slots": ints(0, 0), "positions": ints(0, 1)}
        bad = [
            (ValueError, r"k: expected shape \(2, 2, 64\), got \(2, 2, 32\)", (k[..., :32], v), {}),
            (ValueError, r"v: expected shape \(2, 2, 64\), got \(1, 2, 64\)", (k, v[:1]), {}),
            (ValueError, r"k \(with K and V, as v is None\): expected shape \(2, 2, 2, 64\)", (k,), {}),
            (ValueError, r"k: expected shape \(0, 2, 64\), got \(\)", (jnp.float32(1), v), {}),
            (TypeError, r"k: expected dtype float32, got float16; convert it", (k.astype(jnp.float16), v), {}),
            (ValueError, r"slots: expected shape \(2,\), got \(3,\)", (k, v), {"slots": ints(0, 0, 0)}),
            (TypeError, r"positions: expected dtype int32", (k, v), {"positions": jnp.zeros(2)}),
            (TypeError, r"mask: expected dtype bool", (k, v), {"mask": ints(1, 1)}),
        ]
        for error, message, arguments, changed in bad:
            with pytest.raises(error, match=message):
                cache.append(*arguments, **{**good, **changed})
        del cache


def one(cache, i):
    k = jnp.full((1, HEADS, 64), i + 1, jnp.float32)
    return cache.append(k, -k, layer=0, slots=jnp.zeros(1, jnp.int32), positions=jnp.reshape(i, 1).astype(jnp.int32))


def straight(cache):
    return one(one(cache, 0), 1)


def scan(cache):
    return jax.lax.scan(lambda cache, i: (one(cache, i), None), cache, jnp.arange(2))[0]


def while_loop(cache):
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, one(c[1], c[0])), (0, cache))[1]


def cond(cache):
    cache = jax.lax.cond(cache.mapped_lens[0] > 0, lambda c: one(c, 0), lambda c: c, cache)
    return jax.lax.cond(cache.mapped_lens[0] < 0, lambda c: c, lambda c: one(c, 1), cache)


def nested_jit(cache):
    return jax.jit(straight)(cache)


@pytest.mark.parametrize("program", [straight, scan, while_loop, cond, nested_jit])
def test_a_cache_goes_through_every_kind_of_program(device, page_bytes, strict, program):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 2})
        done = jax.jit(program)(cache)
        manager.finish(done)
        for position in range(2):
            assert (read(cache, 0, position)[0, 0] == position + 1).all()
            assert (read(cache, 0, position)[0, 1] == -position - 1).all()
        del cache, done


def _memory_of(program, max_seq_len):
    spec = KVCacheSpec(LAYERS, HEADS, 64, 4, max_seq_len, jnp.float32, 4096)
    manager = KVCacheManager(spec, pool_bytes=1 << 20, device=jax.devices("cpu")[0])
    return jax.jit(program).lower(manager.step({})).compile(), spec


@pytest.mark.parametrize("program", [straight, scan, while_loop, cond, nested_jit])
def test_no_program_copies_the_view(program):
    small, _ = _memory_of(program, 1000)
    large, spec = _memory_of(program, 100_000)
    for name in ("temp_size_in_bytes", "output_size_in_bytes"):
        assert getattr(small.memory_analysis(), name) == getattr(large.memory_analysis(), name) < 10_000
    shape = ",".join(map(str, spec.view_shape))
    for line in large.as_text().splitlines():
        if f"f32[{shape}]" not in line.split("=", 1)[-1].split("(")[0]:
            continue
        assert any(f" {op}(" in line for op in ("parameter", "get-tuple-element", "tuple", "while", "conditional")), (
            line
        )


def test_the_view_does_not_leave_a_program(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 2})
        done = jax.jit(straight)(cache)
        with pytest.raises(ValueError, match="came out of a program"):
            _ = done.view
        with pytest.raises(ValueError, match="came out of a program"):
            jax.jit(straight)(done)
        # Outside of jit a loop would have to return the view: it is refused before anything runs.
        with pytest.raises(TypeError, match="same pytree structure"):
            scan(cache)
        manager.finish(done)
        del cache, done


def test_tracing_leaks_nothing(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({manager.allocate(): 2})
        with jax.checking_leaks():
            manager.finish(jax.jit(while_loop)(cache))
        del cache


def test_printing_a_cache_does_not_touch_its_memory(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        cache = manager.step({})
        assert repr(cache) == f"KVCache(view_shape={manager.spec.view_shape}, dtype=float32)"
        leaves, structure = jax.tree.flatten(cache)
        assert isinstance(jax.tree.unflatten(structure, leaves), KVCache)
        del cache, leaves


def test_more_than_2_to_the_31_elements_and_the_far_end(device, page_bytes, strict):
    spec = KVCacheSpec(32, 8, 128, 64, 131_072, jnp.bfloat16, page_bytes)
    assert np.prod(spec.view_shape, dtype=np.int64) > 2**31
    with KVCacheManager(spec, pool_bytes=spec.slot_bytes, device=device, strict=strict) as manager:
        for _ in range(64):
            last = manager.allocate()
        tokens = 40
        # Only the tail of the last slot is mapped, through the buffer itself: a whole slot is 16 GiB.
        pages = spec.pages_for(tokens)
        manager._buffers[0].map([(64 * spec.slot_pages - pages, pages, 1)])
        cache = manager.step({})
        everything = jax.device_put(np.stack([np.zeros(64, np.int32), np.full(64, 131_072, np.int32)]), device)
        cache = KVCache(cache.views, (everything,), cache.order, spec)
        k, v = random_kv(spec, 2)
        positions = ints(spec.kv_groups[0].slot_tokens - 1, spec.kv_groups[0].slot_tokens - tokens)
        done = append(cache, k, v, 31, ints(last, last), positions)
        manager.finish(done)
        for token in range(2):
            expected = np.asarray(k[token], np.float32)
            np.testing.assert_array_equal(read(cache, last, int(positions[token]))[31, 0], expected)
        del cache, done


class TestFloat8:
    """Values are divided by a scale of their head and stored as the nearest float8_e4m3fn."""

    groups = (LayerGroup((0, 2)), LayerGroup((1,), num_kv_heads=3, head_dim=5))  # parts of 128 bytes, and of 15

    def spec(self, page_bytes, **options):
        return KVCacheSpec(LAYERS, HEADS, 64, 3, 2000, jnp.float8_e4m3fn, page_bytes, **options)

    def manager(self, device, page_bytes, strict, kv_scales=None, **options):
        spec = self.spec(page_bytes, **options)
        return KVCacheManager(spec, pool_bytes=1000 * page_bytes, device=device, strict=strict, kv_scales=kv_scales)

    @pytest.mark.parametrize("layout", ["token_major", "layer_major"])
    @pytest.mark.parametrize("joined", [False, True])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
    def test_append_in_every_layout(self, device, page_bytes, strict, layout, joined, dtype):
        rng = np.random.default_rng(0)
        shapes = [(h, d) for h, d in ((2, 64), (3, 5), (2, 64))]
        # Powers of two, so that a division rounds nothing and the result is known to the bit.
        scales = [np.exp2(rng.integers(-8, 2, (2, h))).astype(np.float32) for h, _ in shapes]
        kv = [jnp.asarray(rng.standard_normal((2, 5, *shape)) * 3).astype(dtype) for shape in shapes]
        where = [(0, 0), (2, 1999), (1, 6), (0, 999), (2, 0)]
        slots, positions = ints(*(s for s, _ in where)), ints(*(p for _, p in where))

        @jax.jit
        def program(cache, kv):
            for layer, (k, v) in enumerate(kv):
                both = (jnp.stack([k, v], 1), None) if joined else (k, v)
                cache = cache.append(*both, layer=layer, slots=slots, positions=positions)
            return cache

        with self.manager(device, page_bytes, strict, scales, layout=layout, groups=self.groups) as manager:
            cache = manager.step({manager.allocate(): length for length in (1000, 7, 2000)})
            done = program(cache, kv)
            manager.finish(done)
            for token, (slot, position) in enumerate(where):
                found = read_token(cache, slot, position)
                for layer in range(LAYERS):
                    written = np.asarray(kv[layer][:, token], np.float32)
                    if dtype != jnp.float8_e4m3fn:  # that is stored as it is
                        written = np.clip(written / scales[layer][..., None], -448, 448)
                    np.testing.assert_array_equal(found[layer], written.astype(ml_dtypes.float8_e4m3fn))
            assert not any(layer.any() for layer in read_token(cache, 0, 998))
            del cache, done

    def test_what_is_out_of_range_becomes_the_largest_number(self, device, page_bytes, strict):
        values = [448, 464, 465, 1e30, np.inf, -448, -465, -np.inf, np.nan, 2**-10, 2**-9, -0.0]
        stored = [448, 448, 448, 448, 448, -448, -448, -448, np.nan, 0, 2**-9, -0.0]
        for dtype in (jnp.float32, jnp.bfloat16):
            k = jnp.zeros((1, HEADS, 64), dtype).at[0, 0, : len(values)].set(jnp.asarray(values, dtype))
            with self.manager(device, page_bytes, strict) as manager:
                cache = manager.step({manager.allocate(): 1})
                manager.finish(append(cache, k, k, 2, ints(0), ints(0)))
                found = read_token(cache, 0, 0)[2][:, 0, : len(values)]
                np.testing.assert_array_equal(found, [stored, stored])
                assert np.signbit(found[0, -1])
                del cache

    def test_a_scale_that_makes_numbers_infinite(self, device, page_bytes, strict):
        tiny = np.full((LAYERS, 2, HEADS), np.finfo(np.float32).tiny)
        with self.manager(device, page_bytes, strict, tiny) as manager:
            cache = manager.step({manager.allocate(): 1})
            k = jnp.full((1, HEADS, 64), 1e10)
            manager.finish(append(cache, k, -k, 0, ints(0), ints(0)))
            k, v = read_token(cache, 0, 0)[0]
            assert (k == 448).all()
            assert (v == -448).all()
            del cache

    @given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.floats(2**-10, 1024, width=32))
    @settings(max_examples=300, deadline=None)
    def test_conversion_is_that_of_ml_dtypes(self, values, scale):
        values, scale = np.resize(np.asarray(values, np.float32), 40), np.float32(scale)
        found = np.asarray(jax.jit(quantize)(values, scale)).astype(np.float32)
        exact = np.clip(values.astype(np.float64) / scale, -448, 448)
        # A division may be off by its last bits: where that changes what is nearest, either will do.
        with np.errstate(invalid="ignore"):
            bounds = [(exact * (1 + error)).astype(ml_dtypes.float8_e4m3fn) for error in (0, -1e-6, 1e-6)]
        nearest, *around = (np.clip(bound.astype(np.float32), -448, 448) for bound in bounds)
        same = (found == nearest) | (np.isnan(found) & np.isnan(values))
        assert (same | (found == around[0]) | (found == around[1])).all()

    def test_scales_are_data_of_the_program(self, device, page_bytes, strict):
        """Programs are compiled once for all scales, and a cache of another dtype has none."""
        traces = []

        @jax.jit
        def program(cache, k):
            traces.append(None)
            return cache.append(k, k, layer=1, slots=ints(0), positions=ints(0))

        for scale in (1.0, 0.5):
            scales = np.full((LAYERS, 2, HEADS), scale, np.float32)
            with self.manager(device, page_bytes, strict, scales) as manager:
                cache = manager.step({manager.allocate(): 1})
                np.testing.assert_array_equal(cache.layer_view(1).scales, scales[1])
                manager.finish(program(cache, jnp.full((1, HEADS, 64), 3.0)))
                assert (read_token(cache, 0, 0)[1] == 3 / scale).all()
                del cache
        assert len(traces) == 1
        with make(device, page_bytes, strict) as manager:
            cache = manager.step({})
            assert cache.scales is None
            assert cache.layer_view(0).scales is None
            del cache

    @pytest.mark.parametrize("program", ["straight", "scan", "while_loop", "cond", "nested_jit"])
    def test_no_program_copies_the_view(self, program):
        spec = KVCacheSpec(LAYERS, HEADS, 64, 4, 100_000, jnp.float8_e4m3fn, 4096)
        manager = KVCacheManager(spec, pool_bytes=1 << 20, device=jax.devices("cpu")[0])
        compiled = jax.jit(globals()[program]).lower(manager.step({})).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 10_000
        assert compiled.memory_analysis().output_size_in_bytes < 10_000

    def test_wide_numbers_are_taken_and_others_refused(self, device, page_bytes, strict):
        with self.manager(device, page_bytes, strict) as manager:
            cache = manager.step({manager.allocate(): 4})
            k = jnp.ones((1, HEADS, 64))
            for wrong in (jnp.int8, jnp.float8_e5m2):
                message = r"v: expected one of float32, .*, float8_e4m3fn, got .*; convert it with .astype\('float32'\)"
                with pytest.raises(TypeError, match=message):
                    cache.append(k, k.astype(wrong), layer=0, slots=ints(0), positions=ints(0))
            with pytest.raises(ValueError, match=r"k: expected shape \(1, 2, 64\), got \(1, 2, 32\)"):
                cache.append(k[..., :32], k, layer=0, slots=ints(0), positions=ints(0))
            bare = KVCache(cache.views, cache.mapped, cache.order, cache.spec)
            with pytest.raises(ValueError, match=r"expected scales for float8_e4m3fn, got none; pass scales="):
                bare.layer_view(0)
            del cache, bare

    @pytest.mark.parametrize(
        ("error", "scales", "message"),
        [
            (ValueError, np.ones((LAYERS - 1, 2, HEADS)), "expected scales of 3 layers, got those of 2"),
            (ValueError, np.ones((LAYERS, 2, 1)), r"expected shape \(2, 2\) for layer 0, K and V of each .*\(2, 1\)"),
            (ValueError, [np.ones((2, HEADS))] * 2 + [np.ones(2)], r"for layer 2.* got \(2,\)"),
            (ValueError, np.zeros((LAYERS, 2, HEADS)), "positive and finite float32 numbers, got 0.0 for layer 0"),
            (ValueError, np.full((LAYERS, 2, HEADS), 1e-60), "positive and finite float32 numbers, got 0.0"),
            (ValueError, -np.ones((LAYERS, 2, HEADS)), "got -1.0 for layer 0; .* pass m / 448, or 1 where m is 0"),
            (ValueError, np.full((LAYERS, 2, HEADS), np.nan), "got nan"),
            (ValueError, np.full((LAYERS, 2, HEADS), np.inf), "got inf"),
            (TypeError, np.ones((LAYERS, 2, HEADS), int), r"expected float32 for layer 0, got int.*; convert it"),
            (TypeError, 1.0, "expected an array or a sequence of arrays, got float"),
        ],
    )
    def test_scales_that_do_not_fit(self, error, scales, message):
        with pytest.raises(error, match=f"kv_scales: .*{message}"):
            KVCacheManager(self.spec(4096), pool_bytes=1 << 20, device=jax.devices("cpu")[0], kv_scales=scales)

    def test_scales_are_for_float8_only(self):
        spec = KVCacheSpec(LAYERS, HEADS, 64, 3, 2000, jnp.bfloat16, 4096)
        message = r"kv_scales: expected None for a cache of bfloat16.*pass KVCacheSpec\(dtype='float8_e4m3fn'\)"
        with pytest.raises(ValueError, match=message):
            KVCacheManager(spec, pool_bytes=1 << 20, kv_scales=np.ones((LAYERS, 2, HEADS), np.float32))
