"""KVCacheManager: slots, pages, and what happens when there are not enough of them."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jax_vattention import KVCache, KVCacheManager, KVCacheSpec, errors

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


def conserved(manager):
    stats = manager.stats()
    assert stats.pages_free + stats.pages_mapped + stats.pages_retired == stats.pages_total
    assert manager._buffer.mapped_pages == stats.pages_mapped + stats.pages_retired
    assert stats.mapped_bytes == stats.pages_mapped * stats.page_bytes
    assert stats.pages_peak >= stats.pages_mapped
    return stats


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
            needed = sum(lengths.values()) * spec.token_bytes
            assert needed <= stats.mapped_bytes <= needed + 64 * page_bytes
            assert stats.virtual_bytes >= 64 * 8192 * spec.token_bytes
            lengths = {slot: length + int(rng.integers(0, 40)) for slot, length in lengths.items()}


def test_a_freed_slot_gives_its_pages_back(manager):
    slot = manager.allocate()
    cache = manager.step({slot: 100})
    mapped = conserved(manager).pages_mapped
    manager.free(slot)
    # A program may still be running with this cache: nothing is unmapped under it.
    assert conserved(manager).pages_retired == mapped
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
        total = jax.jit(lambda cache: jax.lax.dynamic_slice(cache.view, [0] * 6, (1, 4, 1, 2, HEADS, DIM)).sum())
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
    message = r"needed 6 pages of \d+ bytes, 4 of 20 are free; 16 are behind 5 live slots and 0 wait"
    extra = manager.allocate()
    with pytest.raises(errors.OutOfPagesError, match=message):
        manager.step({slots[0]: 5 * page, extra: 5 * page})
    manager.free(extra)
    assert conserved(manager) == before
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
    assert conserved(manager) == before
    manager.free(slot)
    with pytest.raises(errors.UnknownSlotError, match=rf"slot {slot} is not allocated.* free it once"):
        manager.free(slot)
    del cache


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
    first = jax.jit(lambda cache: jax.lax.dynamic_slice(cache.view, [0] * 6, (1, 1, 1, 2, HEADS, DIM)).sum())
    assert float(first(cache)) == 0


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_a_failure_at_any_call_of_any_operation_changes_nothing(device, page_bytes, strict, out_of_memory):
    with make(device, page_bytes, strict) as manager:
        memory = manager._buffer.memory
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
                assert "injected failure" in str(error)
                assert conserved(manager).pages_mapped == before.pages_mapped
            else:
                break
        assert 5 < calls < 100
        assert conserved(manager).pages_mapped == 5
        # free() ends the request even if its pages cannot be unmapped yet; the next finish() tries again.
        memory.inject_failure(1, False)
        with pytest.raises(errors.DriverError, match="unmapping"):
            manager.free(first)
        assert conserved(manager).pages_retired == 3
        manager.finish(manager.step({}))
        assert conserved(manager).pages_retired == 0
        memory.inject_failure(2**40, False)


TOKENS = 4  # of one append


@jax.jit
def _append(cache, values, slots, positions, mask):
    k = jnp.broadcast_to(values[:, None, None], (TOKENS, HEADS, DIM))
    return cache.append(k, -k, layer=0, slots=slots, positions=positions, mask=mask)


@jax.jit
def _read(cache, slot, position):
    return jax.lax.dynamic_slice(cache.view, (slot, position, 0, 0, 0, 0), (1, 1, 1, 2, 1, 1)).ravel()


class ManagerAgainstModel(RuleBasedStateMachine):
    """Drives a manager beside the plainest model of it: a dictionary of the tokens of each live slot."""

    SLOTS, PAGES, PAGE_TOKENS = 3, 5, 32

    @initialize()
    def start(self):
        self.manager = make(
            jax.devices("cpu")[0], 4096, True, pages=self.PAGES, num_slots=self.SLOTS, max_seq_len=3 * self.PAGE_TOKENS
        )
        self.tokens: dict[int, list[float]] = {}  # what each live slot holds
        self.backed: dict[int, int] = {}  # tokens that step() was asked for
        self.cache = self.manager.step({})
        self.value = 0.0

    def pages(self, tokens):
        return -(-tokens // self.PAGE_TOKENS)

    @rule()
    def allocate(self):
        taken = len(self.tokens) + len(self.manager._retired)
        if taken == self.SLOTS:
            with pytest.raises(errors.OutOfSlotsError):
                self.manager.allocate()
            return
        slot = self.manager.allocate()
        assert slot not in self.tokens
        self.tokens[slot], self.backed[slot] = [], 0

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), growth=st.integers(0, 50), fail_at=st.none() | st.integers(0, 6))
    def step(self, data, growth, fail_at):
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        length = self.backed[slot] + growth
        memory = self.manager._buffer.memory
        if fail_at is not None:
            memory.inject_failure(fail_at, True)
        needed = self.pages(max(length, self.backed[slot])) - self.pages(self.backed[slot])
        free = self.manager.stats().pages_free
        try:
            self.cache = self.manager.step({slot: length})
        except errors.SequenceTooLongError:
            assert length > 3 * self.PAGE_TOKENS
        except errors.OutOfPagesError:
            assert needed > free or fail_at is not None
        else:
            assert length <= 3 * self.PAGE_TOKENS
            assert needed <= free
            self.backed[slot] = max(length, self.backed[slot])
        memory.inject_failure(2**40, True)

    @precondition(lambda self: any(len(t) < self.backed[s] for s, t in self.tokens.items()))
    @rule(data=st.data())
    def append(self, data):
        slot = data.draw(st.sampled_from(sorted(s for s, t in self.tokens.items() if len(t) < self.backed[s])))
        count = min(TOKENS, self.backed[slot] - len(self.tokens[slot]))
        values = np.arange(TOKENS, dtype=np.float32) + self.value + 1
        self.value += TOKENS
        positions = np.arange(TOKENS, dtype=np.int32) + len(self.tokens[slot])
        slots = np.full(TOKENS, slot, np.int32)
        self.cache = self.manager.step({})
        self.manager.finish(_append(self.cache, values, slots, positions, np.arange(TOKENS) < count))
        self.tokens[slot] += values[:count].tolist()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        slot = data.draw(st.sampled_from(sorted(self.tokens)))
        self.manager.free(slot)
        del self.tokens[slot], self.backed[slot]

    @rule()
    def finish(self):
        self.manager.finish(self.cache)
        assert not self.manager.stats().pages_retired

    @invariant()
    def holds(self):
        if not hasattr(self, "manager"):
            return
        stats = conserved(self.manager)
        assert stats.pages_mapped == sum(map(self.pages, self.backed.values()))
        assert stats.slots_live == len(self.tokens)
        assert stats.tokens_live == sum(self.backed.values())
        cache = self.manager.step({}) if self.tokens else self.cache
        for slot, values in self.tokens.items():
            for position in {0, len(values) // 2, len(values) - 1} if values else ():
                expected = values[position]
                np.testing.assert_array_equal(_read(cache, slot, position), [expected, -expected])

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        del self.cache
        self.manager.close()


ManagerAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestManagerAgainstModel = ManagerAgainstModel.TestCase
