"""Which request has which slot, and which pages are mapped for it. Policy only: the native core does the mapping."""

from __future__ import annotations

import dataclasses
import heapq
import operator
import time
from collections.abc import Mapping
from typing import Any

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
from jax_vattention.memory import PagedBuffer, open_memory, pool_pages
from jax_vattention.spec import KVCacheSpec

_CLOSE_SECONDS = 5.0  # how long close() waits for programs that still hold the view


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment. `free + mapped + retired == total` pages, always."""

    page_bytes: int
    virtual_bytes: int
    """Address space of the view."""
    mapped_bytes: int
    """Physical memory behind live slots."""
    mapped_bytes_peak: int
    pages_total: int
    pages_free: int
    """Can be mapped now; pages that were not made yet count."""
    pages_mapped: int
    """Behind live slots."""
    pages_retired: int
    """Of freed slots, kept until the program that may use them has finished."""
    pages_peak: int
    """Most pages that live slots ever held at once."""
    pages_created: int
    """Pages that take up device memory."""
    slots_live: int
    slots_total: int
    tokens_live: int
    """Tokens that the last `step` of each live slot asked for."""


class KVCacheManager:
    """Owns the memory of one KV cache and maps pages to slots between two jitted steps.

    A slot is a row of the cache. `allocate` gives one out with nothing mapped; `step` maps what the coming program
    will touch and returns the cache for it; `finish` takes the program's order token back; `free` ends the request.
    Every method either does all it says or raises and changes nothing. Not safe for use from several threads at once.

    Args:
      spec: dimensions of the cache.
      pool_bytes: physical memory to use at most, in bytes.
      pool_share: the same as a share of the memory that is free now, above 0 and up to 1.
      device: where the cache lives; the default device if None.
      strict: host only: touching what is not mapped is a segmentation fault (for tests).

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
    ):
        self.spec = spec
        self.device = device if device is not None else jax.local_devices()[0]
        memory = open_memory(self.device, strict=strict)
        total = pool_pages(memory, spec.page_bytes, pool_bytes, pool_share, spec.num_slots * spec.slot_pages)
        if memory.platform == "cuda":
            ffi.load_kernels(self.device.local_hardware_id)
        self._buffer = PagedBuffer(memory, spec.view_bytes, spec.page_bytes, total)
        self._view: jax.Array | None = self._buffer.view(spec.view_shape, spec.dtype)
        self._order = jax.device_put(ffi.no_order(), self.device)
        self._pages = [0] * spec.num_slots  # mapped to each slot
        self._lens: dict[int, int] = {}  # live slots, and the tokens that they asked for
        self._retired: dict[int, int] = {}  # freed slots whose pages a program may still use
        self._idle = list(range(spec.num_slots))  # a heap: low slots first
        self._in_flight = False  # a cache was given out, and no finish() since
        self._pages_live = 0
        self._pages_peak = 0
        self._mapped_lens = np.zeros(spec.num_slots, np.int32)
        self._mapped_lens_on_device: jax.Array | None = None

    def allocate(self) -> int:
        """Takes an idle slot. Nothing is mapped for it yet.

        Raises:
          OutOfSlotsError: all slots are taken.
        """
        self._require_open()
        if not self._idle:
            waiting = f"; {len(self._retired)} more wait for finish()" if self._retired else ""
            raise OutOfSlotsError(f"all {self.spec.num_slots} slots are taken{waiting}: free one first")
        slot = heapq.heappop(self._idle)
        self._lens[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Ends a request. Its pages go back to the pool as soon as no program can be using them.

        Raises:
          UnknownSlotError: the slot is not allocated.
          DriverError: unmapping failed; the slot is freed and its pages are tried again at the next `finish`.
        """
        self._require_open()
        slot = self._live_slot(slot)
        del self._lens[slot]
        self._retired[slot] = self._pages[slot]
        self._pages_live -= self._pages[slot]
        self._pages[slot] = 0
        self._set_mapped_len(slot)
        if not self._in_flight:
            self._reclaim()

    def step(self, lengths: Mapping[int, int]) -> KVCache:
        """Backs the tokens that the coming program touches, and returns the cache for it.

        Args:
          lengths: for each slot that grows, the tokens that it has once the program is done. A slot that is left
            out, or that asks for fewer than before, keeps what it has.

        Raises:
          UnknownSlotError: a slot is not allocated.
          SequenceTooLongError: a length is negative or above `max_seq_len`.
          OutOfPagesError: the pool or the device is out of memory.
          DriverError: a driver call failed.
        """
        self._require_open()
        wanted = {self._live_slot(slot): self._length(slot, length) for slot, length in lengths.items()}
        self._grow(wanted)
        for slot, length in wanted.items():
            self._lens[slot] = max(self._lens[slot], length)
        self._in_flight = True
        if self._mapped_lens_on_device is None:
            # A copy: on a CPU the array would share memory with what the next step changes.
            self._mapped_lens_on_device = jax.device_put(self._mapped_lens.copy(), self.device)
        return KVCache(self._require_view(), self._mapped_lens_on_device, self._order, self.spec)

    def finish(self, result: KVCache | jax.Array) -> None:
        """Waits for a program and takes its order token, which orders the next one behind it.

        Args:
          result: the cache that the program returned, or its `order`.

        Raises:
          DroppedWriteError: a token was appended where nothing is mapped.
        """
        self._require_open()
        order = result.order if isinstance(result, KVCache) else result
        status = np.asarray(order)  # waits
        if status.shape != (4,) or status.dtype != np.int32:
            raise TypeError(f"finish: expected a KVCache or its order token (int32 [4]), got {order!r}")
        self._in_flight = False
        self._order = order
        dropped = int(status[0])
        if dropped:
            self._order = jax.device_put(ffi.no_order(), self.device)
        self._reclaim()
        if dropped:
            raise DroppedWriteError(dropped, *(int(value) for value in status[1:]))

    def stats(self) -> CacheStats:
        """Counts of pages, slots and bytes."""
        self._require_open()
        retired = sum(self._retired.values())
        return CacheStats(
            page_bytes=self.spec.page_bytes,
            virtual_bytes=self.spec.view_bytes,
            mapped_bytes=self._pages_live * self.spec.page_bytes,
            mapped_bytes_peak=self._pages_peak * self.spec.page_bytes,
            pages_total=self._buffer.total_pages,
            pages_free=self._buffer.free_pages,
            pages_mapped=self._pages_live,
            pages_retired=retired,
            pages_peak=self._pages_peak,
            pages_created=self._buffer.created_pages,
            slots_live=len(self._lens),
            slots_total=self.spec.num_slots,
            tokens_live=sum(self._lens.values()),
        )

    def close(self) -> None:
        """Unmaps everything and gives the memory back. Closing twice is no error.

        Raises:
          ClosedError: a `KVCache`, or another array over the memory, is still alive. The manager stays open.
        """
        if self._view is None:
            return
        self._view = None
        # A program that just finished may hold the view for a moment longer.
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._buffer.views and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._buffer.views:
            self._view = self._buffer.view(self.spec.view_shape, self.spec.dtype)
            raise ClosedError(
                f"{self._buffer.views - 1} view(s) of the cache are alive: drop every KVCache (del cache) before "
                "closing"
            )
        del self._buffer

    def __enter__(self) -> KVCacheManager:
        return self

    def __exit__(self, exception_type: Any, *_: Any) -> None:
        # An error on its way out keeps its frames, and with them its caches, alive. The memory goes when they do.
        if exception_type is None:
            self.close()

    def _grow(self, wanted: Mapping[int, int]) -> None:
        """Maps what slots lack for their wanted tokens: for all of them, or for none."""
        spec = self.spec
        targets = {slot: spec.pages_for(length) for slot, length in wanted.items()}
        grown = {slot: pages for slot, pages in targets.items() if pages > self._pages[slot]}
        if not grown:
            return
        ranges = [
            (slot * spec.slot_pages + self._pages[slot], pages - self._pages[slot]) for slot, pages in grown.items()
        ]
        try:
            self._buffer.map(ranges)
        except OutOfPagesError as error:
            retired = sum(self._retired.values())
            raise OutOfPagesError(
                f"{error}; {self._pages_live} are behind {len(self._lens)} live slots and {retired} wait for finish(): "
                "free a slot, or enlarge the pool"
            ) from None
        except DriverError as error:
            if not error.out_of_memory:
                raise
            raise OutOfPagesError(f"the device is out of memory before the pool is: {error}") from error
        for slot, pages in grown.items():
            self._pages_live += pages - self._pages[slot]
            self._pages[slot] = pages
            self._set_mapped_len(slot)
        self._pages_peak = max(self._pages_peak, self._pages_live)

    def _reclaim(self) -> None:
        """Gives the pages of freed slots back to the pool. No program may be in flight."""
        while self._retired:
            slot, pages = next(iter(self._retired.items()))
            if pages:
                self._buffer.unmap([(slot * self.spec.slot_pages, pages)])
            del self._retired[slot]
            heapq.heappush(self._idle, slot)

    def _set_mapped_len(self, slot: int) -> None:
        self._mapped_lens[slot] = self.spec.tokens_in(self._pages[slot])
        self._mapped_lens_on_device = None

    def _live_slot(self, slot: int) -> int:
        try:
            number = operator.index(slot)
        except TypeError:
            raise UnknownSlotError(f"slot: expected an integer that allocate() returned, got {slot!r}") from None
        if number not in self._lens:
            raise UnknownSlotError(f"slot {number} is not allocated: take one with allocate(), and free it once")
        return number

    def _length(self, slot: int, length: int) -> int:
        try:
            tokens = operator.index(length)
        except TypeError:
            raise TypeError(f"length of slot {slot}: expected an integer, got {length!r}") from None
        if not 0 <= tokens <= self.spec.max_seq_len:
            raise SequenceTooLongError(
                f"length of slot {slot}: expected 0 to max_seq_len={self.spec.max_seq_len} tokens, got {tokens}"
            )
        return tokens

    def _require_open(self) -> None:
        self._require_view()

    def _require_view(self) -> jax.Array:
        if self._view is None:
            raise ClosedError("the cache manager is closed: make a new one")
        return self._view
