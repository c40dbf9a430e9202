"""Which request has which slot, and which pages are mapped when. Policy only: the native core does the mapping."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import operator
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jax_vattention import ffi
from jax_vattention.cache import KVCache
from jax_vattention.errors import (
    ClosedError,
    DriverError,
    DroppedWriteError,
    OutOfPagesError,
    OutOfSlotsError,
    SequenceTooLongError,
    UnknownSlotError,
)
from jax_vattention.memory import Mapper, PagedBuffer, PagePool, open_memory, pool_pages
from jax_vattention.slots import Pieces, SlotState, SlotTable
from jax_vattention.snapshot import Snapshot, take_snapshot
from jax_vattention.spec import KV_TAIL_TOKENS, KVCacheSpec
from jax_vattention.stats import CacheStats

Lengths = Mapping[int, int] | np.ndarray
"""Tokens of slots: a mapping from slots, or an integer array `[num_slots]` with 0 for slots that are not live."""

_CLOSE_SECONDS = 5.0  # how long close() waits for programs that still hold the view
_log = logging.getLogger(__name__)

_Cause = Literal["needed", "ahead", "eager"]


@dataclasses.dataclass(eq=False)
class _Job:
    """Work that the mapper has."""

    ticket: int
    kind: Literal["map", "unmap", "zero"]
    pieces: Pieces
    pages: int
    cause: _Cause | None = None
    spare: bool = False
    """Of an unmap: the pages were spare ones at the end of a slot, and can be put back if it fails."""
    dirty: int = 0
    """Of a zero: the tokens that were written."""
    error: Exception | None = None


class KVCacheManager:
    """Owns the memory of one KV cache and maps pages to slots, ahead of the programs that need them.

    A slot is a row of the cache. `allocate` gives one out; `step` makes sure of the pages that the coming program
    touches, queues what later ones are expected to touch, and returns the cache; `finish` takes the program's order
    token back; `free` ends the request. A background thread does the mapping. A freed slot keeps its pages, and the
    next request takes it over with them, so that a stable load maps and unmaps nothing (vAttention,
    arXiv 2405.04437, section 6). `docs/manager.md` has the contract whole.

    Every method either does all it says or raises and changes nothing. All may be called from any thread: a lock lets
    one in at a time.

    Args:
      spec: dimensions of the cache.
      pool_bytes: physical memory to use at most, in bytes.
      pool_share: the same as a share of the memory that is free now, above 0 and up to 1.
      device: where the cache lives; the default device if None.
      strict: host only: touching what is not mapped is a segmentation fault (for tests).
      background: False: nothing is mapped ahead, kept or reclaimed. Pages are mapped when `step` needs them and
        unmapped when their slot is freed. For comparison.
      lookahead_steps: for how many programs after the coming one pages are mapped ahead.
      reclaim_below: share of the pool. With fewer pages free, spare and parked ones are taken back.
      eager_slots: how many slots without a request are kept ready,
      eager_tokens: each with pages for this many tokens.
      large_page_share: with several sizes of pages: how far a page may reach beyond what a slot needs, as a share of
        what it needs.
      zero_pages: False: pages that change owner keep what the last request wrote. No program reads it where it masks
        by length, but nothing else keeps requests apart.

    Raises:
      ValueError: the pool is too small for one page, or a size does not fit the device's granularity.
      DriverUnavailableError: a GPU without an NVIDIA driver or without cuda-python.
      DriverError: a driver call failed.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        *,
        pool_bytes: int | None = None,
        pool_share: float | None = None,
        device: jax.Device | None = None,
        strict: bool = False,
        background: bool = True,
        lookahead_steps: int = 2,
        reclaim_below: float = 0.1,
        eager_slots: int = 0,
        eager_tokens: int = 0,
        large_page_share: float = 0.02,
        zero_pages: bool = True,
    ):
        for name, share in (("reclaim_below", reclaim_below), ("large_page_share", large_page_share)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}: expected a share from 0 to below 1, got {share!r}")
        for name, count, most in (
            ("lookahead_steps", lookahead_steps, None),
            ("eager_slots", eager_slots, spec.num_slots),
            ("eager_tokens", eager_tokens, spec.max_seq_len),
        ):
            if operator.index(count) < 0 or (most is not None and count > most):
                raise ValueError(f"{name}: expected 0 to {'any' if most is None else most}, got {count!r}")
        self.spec = spec
        self.device = device if device is not None else jax.local_devices()[0]
        self._lock = threading.RLock()
        self._background = background
        self._lookahead = lookahead_steps if background else 0
        self._eager = (eager_slots, eager_tokens) if background else (0, 0)
        self._zero_pages = zero_pages
        memory = open_memory(self.device, strict=strict)
        most = spec.num_slots * spec.slot_pages
        total = pool_pages(memory, spec.page_bytes, pool_bytes, pool_share, most)
        if memory.platform == "cuda":
            ffi.load_kernels(self.device.local_hardware_id)
        self._memory = memory
        self._pool = PagePool(memory, (spec.page_bytes, *spec.large_page_bytes), total * spec.page_bytes)
        self._buffers = [PagedBuffer(self._pool, group.view_bytes) for group in spec.kv_groups]
        self._views: tuple[tuple[jax.Array, ...], ...] | None = self._make_views()
        self._mapper = Mapper()
        self._order = jax.device_put(ffi.no_order(), self.device)
        self._slots = SlotTable(spec, large_page_share)
        self._mapped_on_device: list[jax.Array] = [None] * len(self._buffers)  # type: ignore[list-item]
        self._page_tokens = max(1, int(spec.tokens_per_page))
        self._jobs: collections.deque[_Job] = collections.deque()  # that the mapper has, in order
        self._booked = 0  # the last ticket of which the books show what became of it
        self._errors: dict[int, Exception] = {}  # of background work, by the slot that depends on it
        self._epoch = 0  # caches handed out
        self._done_epoch = 0  # programs up to this one are over
        self._fences: collections.deque[tuple[int, Any]] = collections.deque()  # (epoch, order token)
        self._retired: list[tuple[int, Pieces, int]] = []  # (epoch, pages of live slots behind a window, count)
        self._failure: Exception | None = None  # of a program, for the next step or finish to raise
        self._reported = 0  # dropped writes of the present chain of order tokens that were raised
        self._pages_total = total
        self._pages_free = total  # neither attached nor leaving
        self._pages_leaving = 0  # being unmapped
        self._pages_behind = 0  # in _retired
        self._pages_live = 0
        self._pages_peak = 0
        self._parkings = 0
        self._reclaim_at = int(reclaim_below * total) if background else 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._wait_seconds = 0.0

    def allocate(self, expected_tokens: int | None = None) -> int:
        """Takes a slot: the parked one whose pages fit best, else an idle one. Nothing is granted to it yet.

        Args:
          expected_tokens: how long the request will probably get, its prompt included. The smallest parked slot with
            pages for so many is taken, or the largest of those that have fewer. None: the one parked last.

        Raises:
          OutOfSlotsError: all slots are taken.
          SequenceTooLongError: `expected_tokens` is negative or above `max_seq_len`.
        """
        with self._lock:
            self._poll()
            slots = self._slots
            expected = None if expected_tokens is None else self._length("expected_tokens", expected_tokens)
            slot = self._unused(expected)
            if slot is None and self._settle_retired():
                slot = self._unused(expected)
            if slot is None:
                retired = slots.where(SlotState.RETIRED).size
                waiting = f"; {retired} more wait for finish()" if retired else ""
                raise OutOfSlotsError(f"all {self.spec.num_slots} slots are taken{waiting}: free one first")
            self._counts["adoptions"] += int(slots.state[slot] == SlotState.PARKED)
            slots.state[slot] = SlotState.LIVE
            slots.lens[slot] = slots.growth[slot] = slots.goal[slot] = 0
            slots.expected[slot] = self.spec.max_seq_len if expected is None else expected
            return slot

    def free(self, slot: int) -> None:
        """Ends a request. Its pages stay with the slot, for the next request, once no program can be using them.

        Raises:
          UnknownSlotError: the slot is not allocated.
        """
        with self._lock:
            self._require_open()
            slot = self._live_slot(slot)
            slots = self._slots
            self._pages_live -= int(slots.pages_granted[slot])
            slots.dirty[slot] = max(slots.dirty[slot], slots.granted[slot])
            slots.lens[slot] = slots.goal[slot] = 0
            slots.grant(slot, 0)
            slots.pages_granted[slot] = 0
            slots.state[slot] = SlotState.RETIRED
            slots.epoch[slot] = self._epoch
            self._errors.pop(slot, None)
            self._poll()

    def step(
        self, lengths: Lengths, *, seq_lens: Lengths | None = None, next_lengths: Lengths | None = None
    ) -> KVCache:
        """Backs the tokens that the coming program touches, and returns the cache for it.

        It returns as soon as those are certain. What later programs will need is queued for the background thread:
        a slot is expected to grow by as many tokens as in the smaller of its last two steps, up to what `allocate`
        was told to expect and then by a page at most.

        Args:
          lengths: for each slot that grows, the tokens that it has once the program is done. A slot that is left
            out, or that asks for fewer than before, keeps what it has.
          seq_lens: for slots of a cache with windows: tokens that the cache holds now. Pages that are behind the
            window of every later query are given back. What is left out keeps its pages.
          next_lengths: the tokens that the program after this one will need, where the caller knows better.

        Raises:
          UnknownSlotError: a slot is not allocated.
          SequenceTooLongError: a length is negative or above `max_seq_len`.
          OutOfPagesError: the pool or the device is out of memory.
          DriverError: a driver call failed, now or in the background for one of these slots.
          DroppedWriteError: a program of an earlier step wrote where nothing is mapped.
        """
        with self._lock:
            self._poll()
            self._raise_failure()
            slots = self._slots
            wanted = np.maximum(self._lengths(lengths), slots.lens)
            seen = None if seq_lens is None else self._lengths(seq_lens)
            hint = None if next_lengths is None else self._lengths(next_lengths)
            short = np.flatnonzero(wanted > slots.granted)
            if short.size:
                self._grant(short, wanted)
            if seen is not None:
                self._give_back_behind_windows(seen)
            changed = np.flatnonzero(wanted > slots.lens)
            if changed.size:
                self._predict(changed, wanted)
                slots.lens = wanted
            if hint is not None:
                slots.goal = np.maximum(slots.goal, hint)
                changed = np.flatnonzero(slots.goal > slots.attached)
            if changed.size and self._lookahead:
                self._map_ahead(changed)
            if self._background:
                self._keep_pages_free()
            self._epoch += 1
            return KVCache(self._require_open(), self._mapped(), self._order, self.spec)

    def finish(self, result: KVCache | jax.Array, *, wait: bool = True) -> None:
        """Takes the order token of a program, which orders the next one behind it and tells when this one is over.

        Args:
          result: the cache that the program returned, or its `order`. Of several programs on the cache of one step,
            the last one's.
          wait: False: return at once; a dropped write is raised by a later `step` or `finish`.

        Raises:
          DroppedWriteError: a token was appended where nothing is mapped.
        """
        with self._lock:
            self._require_open()
            order = result.order if isinstance(result, KVCache) else result
            if not isinstance(order, jax.Array) or order.shape != (4,) or order.dtype != np.int32:
                raise TypeError(f"finish: expected a KVCache or its order token (int32 [4]), got {order!r}")
            self._order = order
            self._fences.append((self._epoch, order))
            order.copy_to_host_async()
        if wait:
            with contextlib.suppress(Exception):  # of the program: kept by _poll
                order.block_until_ready()  # without the lock: other threads may go on
        with self._lock:
            self._poll()
            self._raise_failure()

    def sync(self) -> None:
        """Waits until the mapper has done all that is queued. Not needed for correctness: for tests and pictures.

        Fences stay what they are: a program that is not over keeps its pages.
        """
        with self._lock:
            self._poll()
            failures = self._counts["background_failures"]
            while self._jobs:
                self._mapper.wait(self._jobs[-1].ticket)
                if self._counts["background_failures"] == failures:
                    self._poll()
                else:
                    self._collect()  # what failed is tried again later, or this would not end

    def stats(self) -> CacheStats:
        """Counts of pages, slots and bytes now, and of what was done so far."""
        with self._lock:
            self._poll()
            slots, spec = self._slots, self.spec
            live = slots.state == SlotState.LIVE
            attached, granted = int(slots.pages.sum()), int(slots.pages_granted.sum())
            retired = int(slots.pages[slots.state == SlotState.RETIRED].sum())
            spare = int(slots.pages[live].sum()) - granted
            leaving = self._pages_leaving + self._pages_behind
            # Below zero: pages are promised to slots before they have left others. They count once, where they go.
            promised = max(0, -self._pages_free)
            return CacheStats(
                page_bytes=spec.page_bytes,
                virtual_bytes=spec.view_bytes,
                mapped_bytes=granted * spec.page_bytes,
                mapped_bytes_peak=self._pages_peak * spec.page_bytes,
                needed_bytes=self._needed_bytes(live),
                pages_total=self._pages_total,
                pages_free=max(0, self._pages_free),
                pages_mapped=granted,
                pages_retained=attached - granted - retired,
                pages_retained_live=spare,
                pages_retired=retired + leaving - promised,
                pages_peak=self._pages_peak,
                pages_created=self._pool.created_pages,
                pages_by_size=self._pool.counts(),
                slots_live=int(live.sum()),
                slots_parked=int((slots.state == SlotState.PARKED).sum()),
                slots_retired=int((slots.state == SlotState.RETIRED).sum()),
                slots_total=spec.num_slots,
                tokens_live=int(slots.lens.sum()),
                waits=self._counts["waits"],
                wait_seconds=self._wait_seconds,
                mapper_seconds=self._mapper.busy_seconds,
                **{
                    name: self._counts[name]
                    for name in ("maps_needed", "maps_ahead", "maps_eager", "unmaps", "reclaims", "zeroed_pages")
                },
                adoptions=self._counts["adoptions"],
                background_failures=self._counts["background_failures"],
            )

    def snapshot(self) -> Snapshot:
        """All slots with their pages, and the counts, at one moment."""
        with self._lock:
            return take_snapshot(self.stats(), self._slots)

    def close(self) -> None:
        """Ends the background thread, unmaps everything and gives the memory back. Closing twice is no error.

        Raises:
          ClosedError: a `KVCache`, or another array over the memory, is still alive. The manager stays open.
        """
        with self._lock:
            if self._views is None:
                return
            self._views = None
            # A program that just finished may hold the view for a moment longer.
            deadline = time.monotonic() + _CLOSE_SECONDS
            while self._alive() and time.monotonic() < deadline:
                time.sleep(0.001)
            if alive := self._alive():
                self._views = self._make_views()
                raise ClosedError(
                    f"{alive} view(s) of the cache are alive: drop every KVCache (del cache) before closing"
                )
            self._jobs.clear()
            del self._mapper, self._buffers, self._pool

    def __enter__(self) -> KVCacheManager:
        return self

    def __exit__(self, exception_type: Any, *_: Any) -> None:
        # An error on its way out keeps its frames, and with them its caches, alive. The memory goes when they do.
        if exception_type is None:
            self.close()

    # What a step needs

    def _grant(self, short: np.ndarray, wanted: np.ndarray) -> None:
        """Makes sure of the pages of slots that need more: of all of them, or of none."""
        slots = self._slots
        self._settle(short, wanted)
        # Surfaces here, where it matters.
        _raise_first([self._errors.pop(slot) for slot in short.tolist() if slot in self._errors])
        # Those that could not be zeroed in the background.
        self._wait([self._zero(slot, int(slots.dirty[slot])) for slot in short[slots.dirty[short] > 0].tolist()])
        lacking = short[wanted[short] > slots.attached[short]].tolist()
        if lacking:
            self._map_now(lacking, wanted)
        for slot in short.tolist():
            before = int(slots.pages_granted[slot])
            slots.grant(slot, int(wanted[slot]))
            self._pages_live += int(slots.pages_granted[slot]) - before
        self._pages_peak = max(self._pages_peak, self._pages_live)

    def _settle(self, short: np.ndarray, wanted: np.ndarray) -> None:
        """Waits for what is under way for slots that cannot do without it."""
        slots = self._slots
        unsure = wanted[short] > slots.sure[short]
        ticket = int(np.where(unsure, slots.ticket[short], slots.zeroed[short]).max())
        if ticket > self._mapper.completed:
            self._wait_for(ticket)
        if ticket > self._booked:
            self._collect()

    def _map_now(self, lacking: list[int], wanted: np.ndarray) -> None:
        """Maps what slots lack for their tokens, and waits. All or none; nothing is under way for these slots.

        Raises:
          OutOfPagesError, DriverError: nothing has changed, except that pages nobody used may have been reclaimed.
        """
        slots = self._slots
        # Large pages reach beyond the need, and the device may have no room for one and yet for many small ones.
        for smallest in (False, True) if self.spec.large_page_bytes else (True,):
            pieces = [piece for slot in lacking for piece in slots.plan(slot, int(wanted[slot]), smallest=smallest)]
            try:
                self._make_room(slots.count(pieces), np.maximum(slots.granted, wanted))
                return self._map_and_wait(pieces)
            except OutOfPagesError:
                if smallest:
                    raise

    def _map_and_wait(self, pieces: Pieces) -> None:
        try:
            self._wait([self._map(pieces, "needed")])
        except DriverError as error:
            if not error.out_of_memory:
                raise
            raise OutOfPagesError(f"the device is out of memory before the pool is: {error}") from error

    def _make_room(self, pages: int, keep_tokens: np.ndarray) -> None:
        """Takes spare and parked pages away until so many can be mapped."""
        missing = pages - self._pages_free - self._pages_leaving
        if missing <= 0:
            return
        self._drain()
        self._settle_retired()
        missing = pages - self._pages_free
        slots = self._slots
        spares = {slot: slots.spare(slot, tokens) for slot, tokens in self._takeable(keep_tokens)}
        spare = sum(spares.values())
        if missing > spare:
            waiting = slots.where(SlotState.RETIRED).tolist()
            retired = sum(int(slots.pages[slot]) - spares.get(slot, 0) for slot in waiting) + self._pages_behind
            raise OutOfPagesError(
                f"needed {pages} pages of {self.spec.page_bytes} bytes, {self._pages_free + spare} of "
                f"{self._pages_total} are free or spare; {self._pages_live} are behind "
                f"{int((slots.state == SlotState.LIVE).sum())} live slots and {retired} wait for finish(): "
                "free a slot, or enlarge the pool"
            )
        if missing > 0:
            self._wait(self._reclaim(missing, keep_tokens, "a step needs them"))

    # What is done ahead of need

    def _predict(self, changed: np.ndarray, wanted: np.ndarray) -> None:
        """Sets what slots that just grew are expected to need."""
        slots = self._slots
        now = wanted[changed]
        grown = now - slots.lens[changed]
        step = np.minimum(grown, np.maximum(slots.growth[changed], 1))
        # Past what the request was expected to reach, by no more than a page.
        most = np.maximum(slots.expected[changed], now + np.minimum(step, self._page_tokens))
        slots.goal[changed] = np.minimum(now + step * self._lookahead, np.minimum(most, self.spec.max_seq_len))
        slots.growth[changed] = grown

    def _map_ahead(self, changed: np.ndarray) -> None:
        """Queues pages for what slots are expected to need."""
        slots = self._slots
        ahead = changed[slots.goal[changed] > slots.attached[changed]]
        if not ahead.size:
            return
        pieces: Pieces = []
        pages = 0
        for slot in ahead.tolist():
            if slots.ticket[slot] > self._booked or slot in self._errors:
                continue  # one piece of work at a time for a slot, so that each can be undone; and errors first
            found = slots.plan(slot, int(slots.goal[slot]))
            count = slots.count(found)
            missing = pages + count - self._pages_free - self._pages_leaving
            if missing > 0 and not self._reclaim(missing, slots.goal, "a live slot will need them"):
                continue
            if pages + count > self._pages_free + self._pages_leaving:
                continue
            pieces += found
            pages += count
        if pieces:
            self._map(pieces, "ahead")

    def _keep_pages_free(self) -> None:
        """Keeps part of the pool free, and some slots ready."""
        free = self._pages_free + self._pages_leaving
        if free < self._reclaim_at:
            self._reclaim(self._reclaim_at - free, self._slots.goal, "few pages are free")
        wanted, tokens = self._eager
        if wanted:
            self._ready_slots(wanted, tokens)

    def _ready_slots(self, wanted: int, tokens: int) -> None:
        """Gives slots without a request pages for this many tokens, until so many have them."""
        slots = self._slots
        parked = slots.where(SlotState.PARKED)
        ready = int((slots.attached[parked] >= tokens).sum())
        if ready >= wanted:
            return
        for slot in (*parked[slots.attached[parked] < tokens].tolist(), *slots.where(SlotState.IDLE).tolist()):
            if ready >= wanted:
                return
            if slots.ticket[slot] > self._booked:
                continue
            pieces = slots.plan(slot, tokens)
            if slots.count(pieces) > self._pages_free - self._reclaim_at:
                return  # not at the cost of what was kept
            self._map(pieces, "eager")
            self._park(slot)
            ready += 1

    def _takeable(self, keep_tokens: np.ndarray) -> list[tuple[int, int]]:
        """Slots with spare pages that may be taken away now, and the tokens that must stay backed."""
        slots = self._slots
        live, retired = slots.state == SlotState.LIVE, slots.state == SlotState.RETIRED
        keep = np.where(live, np.maximum(keep_tokens, slots.granted), 0)
        # Of a retired slot, what was never granted is in no program's reach; once those are over, nothing is.
        keep = np.where(retired & (slots.epoch > self._done_epoch), slots.dirty, keep)
        found = (slots.state == SlotState.PARKED) | ((live | retired) & (slots.reach > keep))
        found &= slots.ticket <= self._booked  # what is under way could not be undone apart
        return [(slot, int(keep[slot])) for slot in np.flatnonzero(found).tolist()]

    def _reclaim(self, pages: int, keep_tokens: np.ndarray, why: str) -> list[_Job]:
        """Queues taking away about so many spare pages: large ones first, for they cost least each byte; then those of
        parked slots, the one parked longest first; then spare ones of live slots behind `keep_tokens`."""
        slots = self._slots
        candidates = self._takeable(keep_tokens)
        numbers = np.array([slot for slot, _ in candidates], np.int64)
        spans = np.zeros(len(numbers), np.int64)
        if self.spec.large_page_bytes:
            spans[:] = [max(extent.last_span for extent in slots.extents[slot]) for slot, _ in candidates]
        live = slots.state[numbers] != SlotState.PARKED
        pieces: Pieces = []
        taken = 0
        for candidate in np.lexsort((slots.parked_at[numbers], live, -spans)).tolist():
            if taken >= pages:
                break
            slot, tokens = candidates[candidate]
            parked = slots.state[slot] == SlotState.PARKED
            found = slots.cut_tail(slot, tokens, pages - taken)
            if not found:
                continue  # its last page is needed in part
            count = slots.count(found)
            pieces += found
            taken += count
            if _log.isEnabledFor(logging.DEBUG):
                state = SlotState(int(slots.state[slot])).name.lower()
                _log.debug("reclaiming %d pages of slot %d, %s: %s", count, slot, state, why)
            if parked and not slots.pages[slot]:
                slots.state[slot] = SlotState.IDLE
        if not pieces:
            return []
        self._counts["reclaims"] += 1
        return [self._unmap(pieces, spare=True)]

    # Slots between two requests

    def _unused(self, expected: int | None) -> int | None:
        """The parked slot that fits best, or an idle one."""
        slots = self._slots
        parked = slots.where(SlotState.PARKED)
        if not parked.size:
            idle = slots.where(SlotState.IDLE)
            return int(idle[0]) if idle.size else None
        if expected is None:
            return int(parked[np.argmax(slots.parked_at[parked])])
        tokens = slots.attached[parked]
        fitting = tokens >= expected
        if fitting.any():
            return int(parked[fitting][np.argmin(tokens[fitting])])
        return int(parked[np.argmax(tokens)])

    def _park_retired(self) -> None:
        """Parks freed slots that no program can be using any more, and has their pages zeroed."""
        slots = self._slots
        for slot in slots.where(SlotState.RETIRED).tolist():
            if slots.epoch[slot] > self._done_epoch:
                continue
            # Parking does not wait for pages that are still being mapped ahead; giving some back does.
            gives_back = not self._background or any(extent.first for extent in slots.extents[slot])
            if gives_back and slots.ticket[slot] > self._booked:
                continue
            lost = slots.without_start(slot)
            if not self._background:
                lost += slots.cut_tail(slot, 0)
            if lost:
                slots.leave(lost)
                self._unmap(lost, spare=False)
            if slots.leaving[slot]:
                continue  # its places are taken until then
            if not slots.pages[slot]:
                slots.state[slot] = SlotState.IDLE
                slots.dirty[slot] = 0
                continue
            self._park(slot)
            if slots.dirty[slot] and self._zero_pages:
                self._zero(slot, int(slots.dirty[slot]))
            slots.dirty[slot] = 0

    def _settle_retired(self) -> bool:
        """Waits for the mapper where freed slots wait for nothing else. True if it did."""
        slots = self._slots
        if not (slots.epoch[slots.where(SlotState.RETIRED)] <= self._done_epoch).any():
            return False
        for _ in range(2):  # what is given back has to be unmapped first
            self._drain()
            self._poll()
        self._drain()  # for the zeroing of what was parked
        return True

    def _park(self, slot: int) -> None:
        self._parkings += 1
        self._slots.parked_at[slot] = self._parkings
        self._slots.state[slot] = SlotState.PARKED

    def _give_back_behind_windows(self, seen: np.ndarray) -> None:
        """Retires pages that no later query of a window can see. Programs in flight may still read them."""
        slots = self._slots
        for g, group in enumerate(slots.groups):
            if group.window is None:
                continue
            # Kernels read boxes of tokens.
            first = np.maximum(seen - group.window + 1, 0) // KV_TAIL_TOKENS * KV_TAIL_TOKENS
            behind = np.flatnonzero((first - slots.mapped[g][0]) * group.token_bytes >= group.page_bytes)
            for slot in behind.tolist():
                if slots.ticket[slot] > self._booked:
                    continue
                before = int(slots.pages_granted[slot])
                pieces = slots.cut_head(slot, g, int(first[slot]))
                count = slots.count(pieces)
                if count:
                    slots.leave(pieces)
                    slots.pages_granted[slot] -= count
                    self._pages_live += int(slots.pages_granted[slot]) - before
                    self._pages_behind += count
                    self._retired.append((self._epoch, pieces, count))

    # The mapper

    def _map(self, pieces: Pieces, cause: _Cause) -> _Job:
        slots = self._slots
        pages = slots.count(pieces)
        ticket = self._mapper.map(self._parts(pieces), zero=self._zero_pages)
        slots.attach(pieces)
        self._pages_free -= pages
        return self._queued(_Job(ticket, "map", pieces, pages, cause))

    def _unmap(self, pieces: Pieces, *, spare: bool) -> _Job:
        pages = self._slots.count(pieces)
        self._pages_leaving += pages
        return self._queued(_Job(self._mapper.unmap(self._parts(pieces)), "unmap", pieces, pages, spare=spare))

    def _zero(self, slot: int, tokens: int) -> _Job:
        pieces = self._slots.written(slot, tokens)
        job = _Job(self._mapper.zero(self._parts(pieces)), "zero", pieces, self._slots.count(pieces), dirty=tokens)
        self._slots.dirty[slot] = 0
        return self._queued(job)

    def _queued(self, job: _Job) -> _Job:
        slots = self._slots
        for _, slot, _ in job.pieces:
            slots.ticket[slot] = job.ticket
            if job.kind == "zero":
                slots.zeroed[slot] = job.ticket
        self._jobs.append(job)
        return job

    def _parts(self, pieces: Pieces) -> list[tuple[PagedBuffer, list[tuple[int, int, int]]]]:
        return [(self._buffers[g], ranges) for g, ranges in self._slots.places(pieces)]

    def _wait(self, jobs: list[_Job]) -> None:
        """Waits for work that a step cannot do without.

        Raises:
          OutOfPagesError, DriverError: it failed.
        """
        if not jobs:
            return
        for job in jobs:
            job.cause = "needed"
        self._wait_for(jobs[-1].ticket)
        self._collect()
        errors = []
        for job in jobs:
            for _, slot, _ in job.pieces:
                self._errors.pop(slot, None)  # raised here
            if job.error is not None:
                errors.append(job.error)
                job.error = None
        _raise_first(errors)

    def _wait_for(self, ticket: int) -> None:
        start = time.perf_counter()
        self._mapper.wait(ticket)
        self._wait_seconds += time.perf_counter() - start
        self._counts["waits"] += 1

    def _drain(self) -> None:
        """Waits for all that is queued. On the way to an error, or instead of one."""
        if self._jobs:
            self._wait_for(self._jobs[-1].ticket)
            self._collect()

    def _collect(self) -> None:
        """Books what the mapper has done."""
        self._booked = self._mapper.completed
        while self._jobs and self._jobs[0].ticket <= self._booked:
            job = self._jobs.popleft()
            try:
                self._mapper.raise_if_failed(job.ticket)
            except Exception as error:
                # Without its frames: they would keep caches, and so the views, alive.
                job.error = error.with_traceback(None)
                self._undo(job, job.error)
            else:
                self._book(job)

    def _book(self, job: _Job) -> None:
        if job.kind == "map":
            self._counts[f"maps_{job.cause}"] += job.pages
            for _, slot, _ in job.pieces:
                self._slots.sure[slot] = self._slots.attached[slot]
        elif job.kind == "zero":
            self._counts["zeroed_pages"] += job.pages
        else:
            self._counts["unmaps"] += job.pages
            self._pages_leaving -= job.pages
            self._pages_free += job.pages
            self._slots.left(job.pieces, spare=job.spare)

    def _undo(self, job: _Job, error: Exception) -> None:
        """Makes the books say what is so after work that failed, and keeps the error for who depends on it."""
        slots = self._slots
        if job.cause != "needed":
            self._counts["background_failures"] += 1
            # As text: a handler that keeps the error would keep the frames that it is raised through later.
            what = f"{job.kind} of {job.pages} pages: {error}"
            _log.warning("background work failed and is undone: %s", what)
        if job.kind == "map":
            slots.detach(job.pieces)
            self._pages_free += job.pages
        elif job.kind == "unmap":
            self._pages_leaving -= job.pages
            if job.spare:
                slots.put_back(job.pieces)
                for _, slot, _ in job.pieces:
                    slots.sure[slot] = slots.attached[slot]
            else:
                # Tried again with the next fence.
                self._pages_behind += job.pages
                self._retired.append((self._done_epoch, job.pieces, job.pages))
        for _, slot, _ in job.pieces:
            if job.kind == "zero":
                slots.dirty[slot] = job.dirty
            if slots.state[slot] == SlotState.IDLE and slots.pages[slot]:
                self._park(slot)
            elif slots.state[slot] == SlotState.PARKED and not slots.pages[slot]:
                slots.state[slot] = SlotState.IDLE
            # A lack of memory may pass: who needs the pages tries again.
            if slots.state[slot] == SlotState.LIVE and job.kind != "unmap" and not _is_memory(error):
                self._errors[slot] = error

    # Fences

    def _poll(self) -> None:
        """Looks at what is over by now: work of the mapper, and programs. It waits for nothing."""
        self._require_open()
        if self._jobs:
            self._collect()
        while self._fences and self._fences[0][1].is_ready():
            epoch, order = self._fences.popleft()
            self._done_epoch = max(self._done_epoch, epoch)
            self._keep_failure(order)
        over = [entry for entry in self._retired if entry[0] <= self._done_epoch]
        if over:
            self._retired = [entry for entry in self._retired if entry[0] > self._done_epoch]
            for _, pieces, count in over:
                self._pages_behind -= count
                self._unmap(pieces, spare=False)
        if (self._slots.state == SlotState.RETIRED).any():
            self._park_retired()
            if not self._background and self._jobs:
                self._drain()
                self._park_retired()

    def _keep_failure(self, order: jax.Array) -> None:
        """Keeps what went wrong in a program that is over: whoever looks first may only have wanted the counts."""
        try:
            status = np.asarray(order)
        except Exception as error:
            self._failure = self._failure or error.with_traceback(None)
            return
        count = int(status[0])
        if count > self._reported and not isinstance(self._failure, jax.errors.JaxRuntimeError):
            # Of all programs since the last error; the rest of the status is of the first of them.
            self._failure = DroppedWriteError(count - self._reported, *(int(value) for value in status[1:]))

    def _raise_failure(self) -> None:
        error, self._failure = self._failure, None
        if error is None:
            return
        if isinstance(error, DroppedWriteError):
            self._reported += error.count
            if not self._fences:
                # Nothing is in flight: the next program starts a new chain of order tokens.
                self._order = jax.device_put(ffi.no_order(), self.device)
                self._reported = 0
        raise error

    # Arguments and views

    def _lengths(self, lengths: Lengths) -> np.ndarray:
        """int32 `[num_slots]`: 0 for slots that were left out."""
        slots, limit = self._slots, self.spec.max_seq_len
        if isinstance(lengths, np.ndarray):
            if lengths.shape != slots.lens.shape or lengths.dtype.kind not in "iu":
                raise TypeError(
                    f"lengths: expected an integer array [{self.spec.num_slots}] or a mapping, got "
                    f"{lengths.dtype}{list(lengths.shape)}"
                )
            bad = (lengths < 0) | (lengths > limit)
            if bad.any():
                slot = int(np.argmax(bad))
                self._length(f"length of slot {slot}", int(lengths[slot]))
            strangers = (lengths != 0) & (slots.state != SlotState.LIVE)
            if strangers.any():
                self._live_slot(int(np.argmax(strangers)))
            return lengths.astype(np.int32, copy=False)
        wanted = np.zeros(self.spec.num_slots, np.int32)
        keys, values = _integers(lengths.keys()), _integers(lengths.values())
        if keys is not None and values is not None:
            known = ((keys >= 0) & (keys < len(wanted))).all() and (slots.state[keys] == SlotState.LIVE).all()
            if known and ((values >= 0) & (values <= limit)).all():
                wanted[keys] = values
                return wanted
        # One by one: for what numpy cannot say at once, and to name what is wrong.
        for slot, length in lengths.items():
            wanted[self._live_slot(slot)] = self._length(f"length of slot {slot}", length)
        return wanted

    def _live_slot(self, slot: int) -> int:
        try:
            number = operator.index(slot)
        except TypeError:
            raise UnknownSlotError(f"slot: expected an integer that allocate() returned, got {slot!r}") from None
        if not 0 <= number < self.spec.num_slots or self._slots.state[number] != SlotState.LIVE:
            raise UnknownSlotError(f"slot {number} is not allocated: take one with allocate(), and free it once")
        return number

    def _length(self, name: str, length: int) -> int:
        try:
            tokens = operator.index(length)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {length!r}") from None
        if not 0 <= tokens <= self.spec.max_seq_len:
            raise SequenceTooLongError(
                f"{name}: expected 0 to max_seq_len={self.spec.max_seq_len} tokens, got {tokens}"
            )
        return tokens

    def _needed_bytes(self, live: np.ndarray) -> int:
        """Bytes that the tokens of live slots fill, without those behind a window that were given back."""
        slots = self._slots
        total = 0
        for g, group in enumerate(slots.groups):
            tokens = slots.lens[live].astype(np.int64) - slots.mapped[g][0][live]
            total += int(np.maximum(tokens, 0).sum()) * group.token_bytes * group.planes
        return total

    def _mapped(self) -> tuple[jax.Array, ...]:
        """What programs are told of every slot, on the device."""
        for g, changed in enumerate(self._slots.changed):
            if changed:
                # A copy: on a CPU the array would share memory with what the next step changes.
                self._mapped_on_device[g] = jax.device_put(self._slots.mapped[g].copy(), self.device)
                self._slots.changed[g] = False
        return tuple(self._mapped_on_device)

    def _make_views(self) -> tuple[tuple[jax.Array, ...], ...]:
        return tuple(
            tuple(
                buffer.view(group.plane_shape, self.spec.dtype, plane * group.plane_pages * group.page_bytes)
                for plane in range(group.planes)
            )
            for buffer, group in zip(self._buffers, self.spec.kv_groups, strict=True)
        )

    def _alive(self) -> int:
        return sum(buffer.views for buffer in self._buffers)

    def _require_open(self) -> tuple[tuple[jax.Array, ...], ...]:
        if self._views is None:
            raise ClosedError("the cache manager is closed: make a new one")
        return self._views


def _integers(values: Collection[Any]) -> np.ndarray | None:
    """As one array, or None where they are not all integers. A check of each one would take 30 times as long."""
    try:
        array = np.array(list(values))
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "iu" and array.ndim == 1 else None


def _raise_first(errors: list[Exception]) -> None:
    """Raises the first, if any. The list is emptied: an error that can be reached from the frames it was raised through
    keeps them, and the caches in them, until the garbage collector comes."""
    if not errors:
        return
    error = errors[0]
    errors.clear()
    try:
        raise error
    finally:
        del error


def _is_memory(error: Exception) -> bool:
    return isinstance(error, OutOfPagesError) or (isinstance(error, DriverError) and error.out_of_memory)
