"""KVCacheManager: slots, pages, and what happens when there are not enough of them."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_vattention import KVCache, KVCacheManager, KVCacheSpec, LayerGroup, errors
from jax_vattention.spec import KV_TAIL_TOKENS

HEADS, DIM = 1, 16


def make(device, page_bytes, strict, *, pages=20, num_slots=4, max_seq_len=None, **options):
    # A token is 128 bytes, so that a page holds 32 of them on the host.
    max_seq_len = max_seq_len or 5 * page_bytes // 128
    spec = KVCacheSpec(1, HEADS, DIM, num_slots, max_seq_len, jnp.float32, page_bytes)
    return KVCacheManager(spec, pool_bytes=pages * page_bytes, device=device, strict=strict, **options)


@pytest.fixture
def manager(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        yield manager


def conserved(manager, *, sync=True):
    """The counts, which must add up; with `sync` also to what the native core says."""
    if sync:
        manager.sync()
    stats = manager.stats()
    assert stats.pages_free + stats.pages_mapped + stats.pages_retained + stats.pages_retired == stats.pages_total
    assert 0 <= stats.pages_retained_live <= stats.pages_retained
    assert stats.mapped_bytes == stats.pages_mapped * stats.page_bytes
    assert stats.pages_peak >= stats.pages_mapped
    if sync:
        attached = sum(buffer.mapped_pages for buffer in manager._buffers)
        assert attached == stats.pages_mapped + stats.pages_retained + stats.pages_retired
        assert manager._pool.free_pages == stats.pages_free
        assert stats.pages_created == sum(
            size // stats.page_bytes * created for size, (created, _) in stats.pages_by_size.items()
        )
    return stats


def pages(stats):
    """Where all pages are."""
    return stats.pages_free, stats.pages_mapped, stats.pages_retained, stats.pages_retired, stats.slots_live


def test_a_slot_maps_what_its_tokens_need(manager):
    per_page = int(manager.spec.tokens_per_page)
    slot = manager.allocate()
    assert conserved(manager).pages_mapped == 0
    for length, pages in ((1, 1), (per_page - 1, 1), (per_page, 1), (per_page + 1, 2), (5, 2), (5 * per_page, 5)):
        cache = manager.step({slot: length})
        assert conserved(manager).pages_mapped == pages
        assert int(cache.mapped_lens[slot]) == pages * per_page
        del cache


def test_the_waste_of_a_slot_is_under_a_page(device, page_bytes, strict):
    spec = KVCacheSpec(3, 2, 80, 64, 8192, jnp.float32, page_bytes)
    with KVCacheManager(spec, pool_bytes=20_000 * page_bytes, device=device, strict=strict) as manager:
        rng = np.random.default_rng(0)
        lengths = {manager.allocate(): int(n) for n in rng.integers(1, 50, 64)}
        for _ in range(5):
            manager.step(lengths)
            stats = conserved(manager)
            # A kernel may read up to so many tokens.
            reach = [-(-length // KV_TAIL_TOKENS) * KV_TAIL_TOKENS for length in lengths.values()]
            needed = sum(reach) * spec.token_bytes
            assert needed <= stats.mapped_bytes <= needed + 64 * page_bytes
            assert stats.virtual_bytes >= 64 * 8192 * spec.token_bytes
            lengths = {slot: length + int(rng.integers(0, 40)) for slot, length in lengths.items()}


def test_a_freed_slot_keeps_its_pages_for_the_next_request(manager):
    slot = manager.allocate()
    cache = manager.step({slot: 100})
    before = conserved(manager)
    held = before.pages_mapped + before.pages_retained
    manager.free(slot)
    # A program may still be running with this cache: its pages are left alone.
    assert conserved(manager).pages_retired == held
    manager.finish(cache)
    stats = conserved(manager)
    assert (stats.pages_retired, stats.pages_retained, stats.slots_parked) == (0, held, 1)
    assert manager.allocate() == slot
    cache = manager.step({slot: 100})
    assert conserved(manager).pages_free == before.pages_free
    assert (manager.stats().adoptions, manager.stats().maps_needed) == (1, before.maps_needed)
    del cache


def test_without_background_a_freed_slot_gives_its_pages_back(device, page_bytes, strict):
    with make(device, page_bytes, strict, background=False) as manager:
        slot = manager.allocate()
        cache = manager.step({slot: 100})
        stats = conserved(manager)
        assert (stats.pages_retained, stats.maps_ahead) == (0, 0)
        manager.free(slot)
        assert conserved(manager).pages_retired == stats.pages_mapped
        manager.finish(cache)
        stats = conserved(manager)
        assert (stats.pages_retired, stats.pages_free) == (0, stats.pages_total)
        del cache


def test_mapped_lens_of_an_earlier_cache_do_not_change(manager):
    slot = manager.allocate()
    first = manager.step({slot: 1})
    before = np.asarray(first.mapped_lens).copy()
    second = manager.step({slot: int(manager.spec.tokens_per_page) + 1})
    np.testing.assert_array_equal(first.mapped_lens, before)
    assert int(second.mapped_lens[slot]) > before[slot]
    del first, second


def test_a_slot_that_comes_back_holds_zeros(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=1) as manager:
        ones = jnp.ones((4, HEADS, DIM))
        slots, positions = jnp.zeros(4, jnp.int32), jnp.arange(4, dtype=jnp.int32)
        append = jax.jit(lambda cache: cache.append(ones, ones, layer=0, slots=slots, positions=positions))
        total = jax.jit(lambda cache: jax.lax.dynamic_slice(cache.view, [0] * 7, (1, 1, 1, 2, 4, HEADS, DIM)).sum())
        slot = manager.allocate()
        cache = manager.step({slot: 4})
        manager.finish(append(cache))
        assert float(total(cache)) == 4 * 2 * HEADS * DIM
        manager.free(slot)
        cache = manager.step({manager.allocate(): 4})
        assert float(total(cache)) == 0
        manager.finish(cache)
        del cache


def test_out_of_pages_leaves_everything_as_it_was(device, page_bytes, strict):
    manager = make(device, page_bytes, strict, num_slots=5)
    page = int(manager.spec.tokens_per_page)
    slots = [manager.allocate() for _ in range(4)]
    cache = manager.step(dict.fromkeys(slots, 4 * page))
    manager.finish(cache)
    before = conserved(manager)
    assert pages(before) == (0, 16, 4, 0, 4)  # one more has been mapped ahead for each
    message = r"needed 5 pages of \d+ bytes, 3 of 20 are free or spare; 16 are behind 5 live slots and 0 wait"
    extra = manager.allocate()
    with pytest.raises(errors.OutOfPagesError, match=message):
        manager.step({slots[0]: 5 * page, extra: 5 * page})
    manager.free(extra)
    assert pages(conserved(manager)) == pages(before)
    cache = manager.step({slots[0]: 5 * page})
    assert pages(conserved(manager)) == (0, 17, 3, 0, 4)
    # What was mapped ahead for others is taken back where it is needed.
    manager.finish(manager.step({manager.allocate(): 3 * page}))
    assert pages(conserved(manager)) == (0, 20, 0, 0, 5)
    del cache


def test_the_error_counts_pages_that_wait(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=5) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate()
        cache = manager.step({slot: 4 * page})
        manager.free(slot)
        other = manager.allocate()
        with pytest.raises(errors.OutOfPagesError, match=r"4 wait for finish\(\)"):
            manager.step({other: 3 * page})
        manager.finish(cache)
        cache = manager.step({other: 3 * page})
        assert conserved(manager).pages_mapped == 3
        del cache


def test_unknown_slots(manager):
    slot = manager.allocate()
    cache = manager.step({slot: 3})
    before = conserved(manager)
    for bad in (slot + 1, -1, 10**9, "0", None, 0.5):
        with pytest.raises(errors.UnknownSlotError, match=r"is not allocated|expected an integer"):
            manager.step({slot: 100, bad: 1})
        with pytest.raises(errors.UnknownSlotError, match=r"is not allocated|expected an integer"):
            manager.free(bad)
    assert pages(conserved(manager)) == pages(before)
    manager.free(slot)
    with pytest.raises(errors.UnknownSlotError, match=rf"slot {slot} is not allocated.* free it once"):
        manager.free(slot)
    del cache


def test_lengths_of_any_kind_of_integer(manager):
    slots = [manager.allocate() for _ in range(4)]
    kinds = [int, np.int32, np.uint64, jnp.int32, np.array]
    for length, kind in enumerate(kinds, start=1):
        manager.finish(manager.step({slot: kind(length) for slot in slots}))
        assert manager.stats().tokens_live == 4 * length
    manager.finish(manager.step(dict(zip(slots, (7, np.int8(8), np.uint64(9), True), strict=True))))
    assert manager.stats().tokens_live == 7 + 8 + 9 + len(kinds)
    manager.finish(manager.step({}))
    for bad in ([7], 7.0, "7"):
        with pytest.raises(TypeError, match="length of slot 1: expected an integer"):
            manager.step({0: 9, 1: bad})
    with pytest.raises(errors.UnknownSlotError, match="slot 4 is not allocated"):
        manager.step({0: 9, 4: 1})
    assert manager.stats().tokens_live == 7 + 8 + 9 + len(kinds)


def test_lengths_out_of_range(manager):
    slot = manager.allocate()
    limit = manager.spec.max_seq_len
    for length in (limit + 1, -1, 2**70):
        message = rf"expected 0 to max_seq_len={limit} tokens, got {length}"
        with pytest.raises(errors.SequenceTooLongError, match=message):
            manager.step({slot: length})
    for length in (1.5, "3", None):
        with pytest.raises(TypeError, match=f"length of slot {slot}: expected an integer"):
            manager.step({slot: length})
    assert conserved(manager).pages_mapped == 0
    manager.step({slot: limit})
    assert conserved(manager).pages_mapped == 5


def test_all_slots_taken(manager):
    slots = [manager.allocate() for _ in range(4)]
    assert slots == [0, 1, 2, 3]
    with pytest.raises(errors.OutOfSlotsError, match="all 4 slots are taken: free one first"):
        manager.allocate()
    manager.free(2)
    assert manager.allocate() == 2


@pytest.mark.parametrize("pages", [0, 0.5, -1])
def test_a_pool_too_small_for_a_page(device, page_bytes, strict, pages):
    with pytest.raises(ValueError, match=f"too small for one page: expected at least {page_bytes} bytes"):
        make(device, page_bytes, strict, pages=pages)


def test_pages_must_fit_the_backend(device, page_bytes, strict):
    spec = KVCacheSpec(1, HEADS, DIM, 2, 100, jnp.float32, page_bytes + 64)
    with pytest.raises(ValueError, match="granularity"):
        KVCacheManager(spec, pool_bytes=1 << 30, device=device, strict=strict)


def test_finish_takes_a_cache_or_its_order(manager):
    cache = manager.step({})
    manager.finish(cache)
    manager.finish(cache.order)
    for bad in (jnp.zeros(3, jnp.int32), jnp.zeros(4), 7):
        with pytest.raises(TypeError, match="expected a KVCache or its order token"):
            manager.finish(bad)
    del cache


def test_closing_while_views_live_raises_and_the_manager_stays_usable(device, page_bytes, strict, monkeypatch):
    monkeypatch.setattr("jax_vattention.manager._CLOSE_SECONDS", 0.05)
    manager = make(device, page_bytes, strict)
    slot = manager.allocate()
    cache = manager.step({slot: 3})
    with pytest.raises(errors.ClosedError, match=r"1 view\(s\) of the cache are alive: drop every KVCache"):
        manager.close()
    assert conserved(manager).pages_mapped == 1
    assert isinstance(manager.step({slot: 4}), KVCache)
    del cache
    gc.collect()
    manager.close()
    manager.close()
    for use in (manager.allocate, lambda: manager.free(slot), lambda: manager.step({}), manager.stats):
        with pytest.raises(errors.ClosedError, match="the cache manager is closed: make a new one"):
            use()
    with pytest.raises(errors.ClosedError):
        manager.finish(jnp.zeros(4, jnp.int32))


def test_an_error_in_a_with_block_is_not_hidden(device, page_bytes, strict):
    with pytest.raises(KeyError, match="mine"):  # noqa: PT012
        with make(device, page_bytes, strict) as manager:
            cache = manager.step({manager.allocate(): 3})
            assert cache.spec is manager.spec
            raise KeyError("mine")


def test_a_cache_outlives_a_manager_that_was_dropped(device, page_bytes, strict):
    manager = make(device, page_bytes, strict)
    cache = manager.step({manager.allocate(): 3})
    del manager
    gc.collect()
    first = jax.jit(lambda cache: jax.lax.dynamic_slice(cache.view, [0] * 7, (1, 1, 1, 2, 1, HEADS, DIM)).sum())
    assert float(first(cache)) == 0


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_a_failure_at_any_call_of_any_operation_changes_nothing(device, page_bytes, strict, out_of_memory):
    with make(device, page_bytes, strict) as manager:
        memory = manager._memory
        page = int(manager.spec.tokens_per_page)
        first, second = manager.allocate(), manager.allocate()
        manager.finish(manager.step({first: page}))
        expected = errors.OutOfPagesError if out_of_memory else errors.DriverError
        for calls in range(100):
            before = conserved(manager)
            memory.inject_failure(calls, out_of_memory)
            try:
                manager.finish(manager.step({first: 3 * page, second: 2 * page}))
            except expected as error:
                memory.inject_failure(2**40, False)
                assert "injected failure" in str(error)
                assert conserved(manager).pages_mapped == before.pages_mapped
            else:
                break
        assert 4 < calls < 100
        assert conserved(manager).pages_mapped == 5
        memory.inject_failure(2**40, False)


def waits(manager):
    return manager.stats().waits


def test_a_step_does_not_wait_for_what_was_mapped_ahead(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate()
        manager.finish(manager.step({slot: 1}))
        before = waits(manager)
        assert before == 1  # nobody could know
        for length in range(2, 3 * page):
            manager.sync()  # as if each program took long enough
            manager.finish(manager.step({slot: length}))
            assert manager.stats().pages_mapped == -(-length // page)
        stats = conserved(manager)
        assert (waits(manager), stats.maps_needed, stats.maps_ahead) == (before, 1, 3 - 1 + stats.pages_retained)


def test_a_step_waits_for_its_own_pages_only(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=12, max_seq_len=20 * page_bytes // 128) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate()
        manager.finish(manager.step({slot: page}))
        manager.sync()
        manager._memory.set_delay(50_000)
        start = time.perf_counter()
        manager.step({slot: page}, next_lengths={slot: 10 * page})
        assert time.perf_counter() - start < 0.05
        assert manager.stats().pages_retained >= 9
        start = time.perf_counter()
        manager.finish(manager.step({slot: 9 * page}))
        waited = time.perf_counter() - start
        manager._memory.set_delay(0)
        stats = conserved(manager)
        assert stats.wait_seconds > 0.05
        assert waited >= 0.05
        assert stats.maps_ahead >= 9


def test_prefill_is_mapped_ahead_by_the_chunk(device, page_bytes, strict):
    with make(device, page_bytes, strict) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate(expected_tokens=4 * page + 1)
        for chunk, ahead in ((1, 1), (2, 2), (3, 2), (4, 1)):
            manager.finish(manager.step({slot: chunk * page}))
            assert conserved(manager).pages_retained == ahead
        other = manager.allocate()
        manager.finish(manager.step({other: page}, next_lengths={other: 3 * page}))
        assert conserved(manager).pages_retained_live == 1 + 2


def test_the_slot_that_fits_best_is_taken_over(manager):
    page = int(manager.spec.tokens_per_page)
    slots = [manager.allocate() for _ in range(4)]
    manager.finish(manager.step({slot: (1 + n) * page for n, slot in enumerate(slots)}))
    for slot in slots:
        manager.free(slot)
    manager.sync()
    held = [int(n) for n in manager._slots.attached]
    assert manager.allocate(2 * page + 1) == min(slots, key=lambda s: (held[s] < 2 * page + 1, held[s]))
    assert manager.allocate(5 * page) == slots[3]  # none is so large: the largest
    assert manager.allocate() == max(set(range(4)) - {1, 3}, key=lambda s: manager._slots.parked_at[s])
    with pytest.raises(errors.SequenceTooLongError, match="expected_tokens: expected 0 to"):
        manager.allocate(10**9)


def test_a_freed_slot_does_not_wait_for_what_is_being_mapped_ahead(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=6, num_slots=2, lookahead_steps=1) as manager:
        page = int(manager.spec.tokens_per_page)
        slots = [manager.allocate(3 * page) for _ in range(2)]
        manager.finish(manager.step(dict.fromkeys(slots, page)))
        manager._memory.set_delay(20_000)
        manager.finish(manager.step({}, next_lengths=dict.fromkeys(slots, 3 * page)))
        for slot in slots:
            manager.free(slot)
        slots = [manager.allocate(page) for _ in range(2)]
        # One of them needs pages that are on their way to the other.
        manager.finish(manager.step({slots[0]: 5 * page, slots[1]: page}))
        manager._memory.set_delay(0)
        assert conserved(manager).pages_mapped == 6


def test_mapping_ahead_that_fails_for_a_freed_slot_is_undone(device, page_bytes, strict):
    with make(device, page_bytes, strict, num_slots=1, lookahead_steps=1) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate(5 * page)
        manager.finish(manager.step({slot: page}))
        manager.sync()
        manager._memory.inject_failure(0, True)
        manager._memory.set_delay(20_000)
        manager.finish(manager.step({}, next_lengths={slot: 5 * page}))
        manager.free(slot)
        assert manager.stats().slots_parked == 1
        manager._memory.set_delay(0)
        stats = conserved(manager)
        assert (stats.background_failures, stats.slots_parked, stats.pages_retained) == (1, 1, 2)
        assert manager.allocate() == slot
        manager.finish(manager.step({slot: 5 * page}))
        assert conserved(manager).pages_mapped == 5


def test_a_stable_load_maps_nothing(manager):
    page = int(manager.spec.tokens_per_page)

    def serve():
        slots = [manager.allocate(2 * page) for _ in range(4)]
        for length in range(page, 2 * page, page // 8):
            manager.finish(manager.step(dict.fromkeys(slots, length)))
        for slot in slots:
            manager.free(slot)

    serve()
    before = conserved(manager)
    for _ in range(5):
        serve()
    after = conserved(manager)
    mapped = before.maps_needed + before.maps_ahead, before.unmaps
    assert (after.maps_needed + after.maps_ahead, after.unmaps) == mapped
    assert after.adoptions == before.adoptions + 5 * 4


def test_few_free_pages_are_made_more_in_the_background(device, page_bytes, strict, caplog):
    caplog.set_level(logging.DEBUG, "jax_vattention.manager")
    with make(device, page_bytes, strict, reclaim_below=0.4) as manager:
        page = int(manager.spec.tokens_per_page)
        slots = [manager.allocate() for _ in range(3)]
        manager.finish(manager.step(dict.fromkeys(slots, 4 * page)))
        for slot in slots:
            manager.free(slot)
        manager.sync()
        slot = manager.allocate(4 * page)
        manager.finish(manager.step({slot: page}))
        stats = conserved(manager)
        assert stats.pages_free == 8
        assert stats.unmaps > 0
        assert "few pages are free" in caplog.text
        assert "parked" in caplog.text


def test_slots_without_a_request_are_made_ready(device, page_bytes, strict):
    with make(device, page_bytes, strict, eager_slots=2, eager_tokens=40) as manager:
        manager.finish(manager.step({}))
        stats = conserved(manager)
        need = 2 * manager.spec.pages_for(40)
        assert (stats.maps_eager, stats.pages_retained, stats.slots_parked) == (need, need, 2)
        slot = manager.allocate(40)
        manager.finish(manager.step({slot: 40}))
        stats = conserved(manager)
        assert (stats.maps_needed, stats.waits, stats.slots_parked) == (0, 0, 2)


def test_spare_pages_are_taken_back_before_a_step_fails(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=5) as manager:
        page = int(manager.spec.tokens_per_page)
        first = manager.allocate()
        # The mapper is at work for the slot when it is freed: it is parked later, and its pages count all the same.
        manager._memory.set_delay(50_000)
        manager.finish(manager.step({first: 4 * page}))
        manager.free(first)
        second = manager.allocate(page)
        third = manager.allocate(page)
        manager.finish(manager.step({second: page, third: 4 * page}))
        assert conserved(manager).pages_mapped == 5


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_mapping_ahead_that_fails_surfaces_where_it_matters(manager, out_of_memory):
    page = int(manager.spec.tokens_per_page)
    slot, other = manager.allocate(), manager.allocate()
    manager.finish(manager.step({slot: page, other: page}))
    before = conserved(manager)
    manager._memory.inject_failure(0, out_of_memory)
    manager.finish(manager.step({}, next_lengths={slot: 3 * page}))
    stats = conserved(manager)
    assert pages(stats) == pages(before)
    assert stats.background_failures == 1
    manager.finish(manager.step({other: page}))  # has nothing to do with it
    if not out_of_memory:
        with pytest.raises(errors.DriverError, match="injected failure"):
            manager.step({slot: 3 * page})
        assert pages(conserved(manager)) == pages(before)
    manager.finish(manager.step({slot: 3 * page}))
    assert conserved(manager).pages_mapped == before.pages_mapped + 2


def test_zeroing_that_fails_is_done_again_before_the_slot_is_used(manager):
    page = int(manager.spec.tokens_per_page)
    slot = manager.allocate()
    manager.finish(manager.step({slot: page}))
    manager.sync()
    manager._memory.inject_failure(0, False)
    manager.free(slot)
    assert conserved(manager).background_failures == 1
    assert manager.allocate() == slot
    zeroed = manager.stats().zeroed_pages
    manager._memory.inject_failure(0, False)
    with pytest.raises(errors.DriverError, match="zeroing"):
        manager.step({slot: 1})
    manager.finish(manager.step({slot: 1}))
    assert conserved(manager).zeroed_pages == zeroed + 1


def test_unmapping_that_fails_leaves_the_pages_where_they_are(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=5, reclaim_below=0.5) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate()
        manager.finish(manager.step({slot: 4 * page}))
        manager.free(slot)
        manager.sync()
        before = conserved(manager)
        manager._memory.inject_failure(0, False)
        manager.finish(manager.step({}))
        stats = conserved(manager)
        assert pages(stats) == pages(before)
        assert stats.background_failures == 1
        manager.finish(manager.step({}))
        assert conserved(manager).pages_free == 2


def test_finish_without_waiting_reports_dropped_writes_later(manager):
    ones = jnp.ones((1, HEADS, DIM))
    append = jax.jit(lambda cache, at: cache.append(ones, ones, layer=0, slots=at * 0, positions=at))
    slot = manager.allocate()
    cache = manager.step({slot: 1})
    result = append(cache, jnp.array([10**6], jnp.int32))
    jax.block_until_ready(result.order)
    with pytest.raises(errors.DroppedWriteError, match="position 1000000"):
        manager.finish(result, wait=False)
    manager.finish(append(manager.step({}), jnp.array([0], jnp.int32)))
    del cache, result


def test_dropped_writes_of_several_programs_add_up(manager):
    ones = jnp.ones((1, HEADS, DIM))
    append = jax.jit(lambda cache, at: cache.append(ones, ones, layer=0, slots=at * 0, positions=at))
    cache = manager.step({manager.allocate(): 1})
    for position in (10**6, 10**5):
        cache = cache.with_order(append(cache, jnp.array([position], jnp.int32)).order)
        jax.block_until_ready(cache.order)
        manager._fences.append((manager._epoch, cache.order))  # both are over before anybody looks
    with pytest.raises(errors.DroppedWriteError, match=r"2 write\(s\) were dropped; the first to .* position 1000000"):
        manager.step({})
    manager.finish(append(manager.step({}), jnp.array([0], jnp.int32)))
    del cache


def of_sizes(page_bytes, **options):
    """Tokens of 128 bytes in each of its layers."""
    return KVCacheSpec(
        options.pop("num_layers", 1), HEADS, DIM, 2, 8 * page_bytes // 128, jnp.float32, page_bytes, **options
    )


def test_what_a_large_page_reaches_beyond_the_need_is_not_insisted_on(device, page_bytes, strict):
    spec = of_sizes(page_bytes, large_page_bytes=(2 * page_bytes, 4 * page_bytes))
    options = {"pool_bytes": 5 * page_bytes, "device": device, "strict": strict}
    with KVCacheManager(spec, large_page_share=0.5, reclaim_below=0.0, **options) as manager:
        page = int(spec.tokens_per_page)
        manager.finish(manager.step({manager.allocate(): 5 * page}))
        assert conserved(manager).pages_mapped == 5


WINDOW = (LayerGroup((0,), window=1), LayerGroup((1,)))


def test_spare_pages_of_one_group_only_are_taken_back(device, page_bytes, strict):
    spec = of_sizes(page_bytes, num_layers=2, groups=WINDOW, large_page_bytes=(4 * page_bytes,))
    options = {"pool_bytes": 8 * page_bytes, "device": device, "strict": strict}
    with KVCacheManager(spec, large_page_share=0.9, lookahead_steps=0, reclaim_below=0.0, **options) as manager:
        page = int(spec.tokens_per_page)
        slots = [manager.allocate(), manager.allocate()]
        manager.finish(manager.step({slots[0]: 1}))
        extent = manager._slots.extents[slots[0]][1]
        # As it is where groups have tokens of different sizes: one reaches further, in pages of its own.
        manager._wait([manager._map([(1, slots[0], [(extent.end, 4, 1)])], "eager")])
        assert manager._slots.attached[slots[0]] == page
        manager.finish(manager.step({slots[1]: 3 * page}))
        assert conserved(manager).pages_mapped == 2 + 2 * 3


def test_a_slot_is_not_given_out_before_the_pages_that_it_lost_are_unmapped(device, page_bytes, strict):
    spec = of_sizes(page_bytes, num_layers=2, groups=WINDOW)
    with KVCacheManager(spec, pool_bytes=32 * page_bytes, device=device, strict=strict) as manager:
        page = int(spec.tokens_per_page)
        slot = manager.allocate()
        manager.finish(manager.step({slot: 4 * page}))
        manager.sync()
        manager.finish(manager.step({}, seq_lens={slot: 4 * page}))
        manager.sync()
        manager._memory.inject_failure(0, False)
        manager.free(slot)
        manager._drain()
        assert (manager._counts["background_failures"], manager._slots.leaving[slot]) == (1, 1)
        assert manager.stats().slots_retired == 1
        # The next request gets it when that has been done again.
        slots = [manager.allocate(), manager.allocate()]
        assert slot in slots
        manager.finish(manager.step({slot: 4 * page}))
        assert conserved(manager).pages_mapped == 8


def test_a_freed_slot_that_waits_for_the_mapper_only_is_there_for_the_next_request(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=5, num_slots=2) as manager:
        page = int(manager.spec.tokens_per_page)
        for _ in range(3):
            slots = [manager.allocate(page), manager.allocate(page)]
            manager._memory.set_delay(20_000)
            manager.finish(manager.step({slots[0]: 1}, next_lengths={slots[0]: 4 * page}))
            for slot in slots:
                manager.free(slot)  # one of them is being mapped ahead
            slots = [manager.allocate(page), manager.allocate(page)]
            manager._memory.set_delay(0)
            manager.finish(manager.step(dict(zip(slots, (page, 4 * page), strict=True))))
            assert conserved(manager).pages_mapped == 5
            for slot in slots:
                manager.free(slot)


def test_looking_at_a_manager_does_not_wait_for_pages_being_made(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=60, max_seq_len=60 * page_bytes // 128) as manager:
        page = int(manager.spec.tokens_per_page)
        slot = manager.allocate()
        manager._memory.set_delay(20_000)
        manager.finish(manager.step({slot: 1}, next_lengths={slot: 50 * page}))
        start = time.perf_counter()
        conserved(manager, sync=False)
        assert time.perf_counter() - start < 0.5  # making all pages takes 1 s
        assert manager._jobs
        manager._memory.set_delay(0)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_other_threads_run_on_while_a_manager_ends(device, page_bytes, strict, how):
    manager = make(device, page_bytes, strict, pages=60, max_seq_len=60 * page_bytes // 128)
    slot = manager.allocate()
    manager._memory.set_delay(10_000)
    manager.finish(manager.step({slot: 1}, next_lengths={slot: 50 * int(manager.spec.tokens_per_page)}))
    standing, ended = [0.0], threading.Event()

    def watch():
        last = time.perf_counter()
        while not ended.wait(0.001):
            now = time.perf_counter()
            standing[0], last = max(standing[0], now - last), now

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    if how == "close":
        manager.close()
    del manager
    gc.collect()
    took = time.perf_counter() - start
    ended.set()
    thread.join()
    assert took > 0.5  # pages are made, mapped and unmapped first
    assert standing[0] < took / 2


def test_a_program_that_fails_is_raised_by_finish_or_step_once():
    def fail(order):
        if failing:
            raise RuntimeError("the program's own")
        return order

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)

    @jax.jit
    def program(order, x):  # an input that is not there yet makes the dispatch asynchronous
        return jax.pure_callback(fail, order, order) + (x.sum() * 0).astype(jnp.int32)

    failing = True
    x = jnp.ones((500, 500))
    device = jax.devices("cpu")[0]
    for wait in (True, False):
        with make(device, 4096, True) as manager:
            slots = [manager.allocate(), manager.allocate()]
            order = manager.step(dict.fromkeys(slots, 5)).order
            if wait:
                with pytest.raises(jax.errors.JaxRuntimeError, match="the program's own"):
                    manager.finish(program(order, slow(x)))
            else:
                manager.finish(program(order, slow(x)), wait=False)
                while manager.stats() and manager._fences:
                    time.sleep(0.001)
                manager.free(slots.pop())  # is done, and so it does not raise
                assert conserved(manager).slots_live == 1
                with pytest.raises(jax.errors.JaxRuntimeError, match="the program's own"):
                    manager.step({})
            manager.step({})
            manager.free(slots.pop())
            conserved(manager)
    failing = False
    program(jnp.zeros(4, jnp.int32), x)  # or jax reports the last one at exit


def test_arrays_of_lengths(manager):
    slot = manager.allocate()
    lengths = np.zeros(4, np.int64)
    lengths[slot] = 7
    manager.finish(manager.step(lengths))
    assert manager.stats().tokens_live == 7
    with pytest.raises(errors.UnknownSlotError):
        manager.step(lengths + 1)
    with pytest.raises(errors.SequenceTooLongError):
        manager.step(lengths * 10**6)
    for bad in (lengths[:3], lengths.astype(np.float32)):
        with pytest.raises(TypeError, match="expected an integer array"):
            manager.step(bad)


@pytest.mark.parametrize(
    "option", [{"reclaim_below": 1}, {"large_page_share": -0.1}, {"lookahead_steps": -1}, {"eager_slots": 9}]
)
def test_bad_policies(device, page_bytes, strict, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected"):
        make(device, page_bytes, strict, **option)


def test_threads_take_turns(device, page_bytes, strict):
    with make(device, page_bytes, strict, pages=40, num_slots=8) as manager:
        failed = []

        def serve(seed):
            rng = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    slot = manager.allocate(int(rng.integers(1, 100)))
                    for length in range(1, int(rng.integers(2, 100)), 9):
                        manager.finish(manager.step({slot: length}), wait=bool(rng.integers(2)))
                        conserved(manager, sync=False)
                    manager.free(slot)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        stats = conserved(manager)
        assert (stats.pages_mapped, stats.pages_retired) == (0, 0)


@pytest.mark.parametrize("ending", ["pass", "del manager", "sys.exit(3)", "raise KeyError('mine')"])
def test_the_process_ends_cleanly_with_work_queued(ending):
    code = f"""
        import sys, jax
        from jax_vattention import KVCacheManager, KVCacheSpec
        spec = KVCacheSpec(1, 1, 16, 64, 3200, page_bytes=4096)
        manager = KVCacheManager(spec, pool_bytes=1 << 24, device=jax.devices("cpu")[0], strict=True)
        slots = [manager.allocate() for _ in range(64)]
        cache = manager.step(dict.fromkeys(slots, 100))
        manager._memory.set_delay(100)
        cache = manager.step({{}}, next_lengths=dict.fromkeys(slots, 1000))
        print("ready", flush=True)
        {ending}
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "ready\n"
    assert done.returncode == {"sys.exit(3)": 3, "raise KeyError('mine')": 1}.get(ending, 0), done.stderr
    assert "jax_vattention:" not in done.stderr
