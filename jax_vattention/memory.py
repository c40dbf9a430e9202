"""The typed face of the native memory core: pools of physical pages, and buffers that they are mapped into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_vattention import _native
from jax_vattention.errors import DriverUnavailableError

PageRanges = Sequence[tuple[int, int, int]]
"""Pages side by side, `(page, count, span)`: `page` counts the smallest pages from the start of a buffer, and each of
the `count` pages is as large as `span` of those."""


def open_memory(device: jax.Device, *, strict: bool = False) -> _native.Memory:
    """Opens the memory backend of a device: CUDA for GPUs, mmap for CPUs.

    Args:
      device: where the memory is used.
      strict: host only: touching an address that is not mapped is a segmentation fault, not a zero.

    Raises:
      DriverUnavailableError: no NVIDIA driver, or the device is neither a CPU nor an NVIDIA GPU.
    """
    if device.platform == "cpu":
        return _native.Memory.host(strict)
    if device.platform == "gpu" and "cuda" in device.client.platform_version.lower():
        if strict:
            raise ValueError("strict=True is for the host backend: CUDA faults on every address that is not mapped")
        return _native.Memory.cuda(device.local_hardware_id)
    raise DriverUnavailableError(
        f"expected a CPU or an NVIDIA GPU, got {device} ({device.client.platform_version}); choose another device"
    )


class PagePool:
    """Physical pages of one or several sizes out of one budget. Pages are made when first needed and then kept.

    How the budget is split between sizes follows the load: idle pages of one size are released where their bytes are
    needed for another.

    Args:
      memory: of the device.
      page_bytes: sizes of pages, ascending, each a multiple of the one before it; the first of the granularity.
      total_bytes: most bytes of pages that exist at once.

    Raises:
      ValueError: a size does not fit, or not one page does.
    """

    def __init__(self, memory: _native.Memory, page_bytes: Sequence[int], total_bytes: int):
        self.memory = memory
        self.native = _native.PagePool(memory, page_bytes, total_bytes)

    @property
    def total_pages(self) -> int:
        """The budget in smallest pages."""
        return self.native.total_bytes // self.native.page_bytes

    @property
    def free_pages(self) -> int:
        """What can be mapped now, in smallest pages. Pages that were not made yet count."""
        return self.native.free_bytes // self.native.page_bytes

    @property
    def created_pages(self) -> int:
        """What takes up device memory, mapped or kept for reuse, in smallest pages."""
        return self.native.created_bytes // self.native.page_bytes

    def counts(self) -> dict[int, tuple[int, int]]:
        """For each size of pages in bytes: how many exist, and how many of those are idle."""
        return {size: (created, idle) for size, created, idle in self.native.counts()}


class PagedBuffer:
    """A range of virtual addresses on one device, with physical pages of a pool behind parts of it.

    Args:
      pool: where the pages come from; several buffers may share it.
      num_bytes: virtual size, a multiple of the pool's smallest page.
    """

    def __init__(self, pool: PagePool, num_bytes: int):
        self.pool = pool
        self.native = _native.PagedBuffer(pool.native, num_bytes)

    @property
    def address(self) -> int:
        """First address; it stays the same for the life of the buffer."""
        return self.native.address

    @property
    def mapped_pages(self) -> int:
        """What is mapped, in smallest pages."""
        return self.native.mapped_pages

    @property
    def views(self) -> int:
        """Arrays over this buffer that are alive, here or inside a running program."""
        return self.native.views

    def map(self, ranges: PageRanges) -> None:
        """Maps zeroed pages to all ranges, or to none.

        Raises:
          OutOfPagesError: fewer pages are free than asked for.
          DriverError: the device is out of memory, or a call failed.
        """
        self.native.map(ranges, True)

    def unmap(self, ranges: PageRanges) -> None:
        """Unmaps all ranges, named as they were mapped, or none. No program may use them any more.

        Raises:
          DriverError: a call failed.
        """
        self.native.unmap(ranges)

    def zero(self, ranges: PageRanges) -> None:
        """Writes zeros to ranges that are mapped, in pages of whatever size.

        Raises:
          DriverError: a call failed.
        """
        self.native.zero(ranges)

    def view(self, shape: Sequence[int], dtype: Any, offset: int = 0) -> jax.Array:
        """The buffer, or a part of it from `offset` bytes on, as an array. Never copied; it keeps the memory alive.

        Never donate it to a program, print it or convert it with numpy: all of them touch what is not mapped.
        """
        return jax.dlpack.from_dlpack(_Export(self.native, tuple(shape), jnp.dtype(dtype), offset))


class Mapper:
    """The background thread: it maps, unmaps and zeroes pages in the order in which it is told to.

    It holds no interpreter lock. Work is handed over in parts, `(buffer, ranges)`, that are done all or not at all. A
    ticket stands for it: they count up from 1.
    """

    def __init__(self) -> None:
        self._native = _native.Mapper()

    def map(self, parts: Sequence[tuple[PagedBuffer, PageRanges]], *, zero: bool) -> int:
        """Queues mapping pages, zeroed if `zero`. Returns a ticket."""
        return self._native.map([(buffer.native, ranges) for buffer, ranges in parts], zero)

    def unmap(self, parts: Sequence[tuple[PagedBuffer, PageRanges]]) -> int:
        """Queues unmapping pages. Returns a ticket."""
        return self._native.unmap([(buffer.native, ranges) for buffer, ranges in parts])

    def zero(self, parts: Sequence[tuple[PagedBuffer, PageRanges]]) -> int:
        """Queues writing zeros. Returns a ticket."""
        return self._native.zero([(buffer.native, ranges) for buffer, ranges in parts])

    @property
    def completed(self) -> int:
        """The last ticket whose work is over, done or failed. It waits for nothing."""
        return self._native.completed

    def wait(self, ticket: int) -> None:
        """Waits until the work of a ticket is over, without the interpreter lock."""
        self._native.wait(ticket)

    def raise_if_failed(self, ticket: int) -> None:
        """Raises what the work of a ticket that is over failed with, once: OutOfPagesError or DriverError."""
        self._native.raise_if_failed(ticket)

    @property
    def busy_seconds(self) -> float:
        """How long the thread has been at work."""
        return self._native.busy_seconds


class _Export:
    """What `jax.dlpack.from_dlpack` takes: it refuses a bare capsule."""

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: Any, offset: int):
        self._buffer, self._shape, self._dtype, self._offset = buffer, shape, dtype, offset

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._buffer.dlpack_device

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> object:
        del stream, options  # nothing is in flight on a new view, and no copy is ever made
        return self._buffer.dlpack(self._shape, self._dtype.name, self._offset)


def pool_pages(
    memory: _native.Memory, page_bytes: int, pool_bytes: int | None, pool_share: float | None, most_pages: int
) -> int:
    """Pages of a pool given in bytes or as a share of free memory; never more than `most_pages`, which all slots hold.

    Raises:
      ValueError: both or neither were given, or one is out of range.
    """
    if (pool_bytes is None) == (pool_share is None):
        raise ValueError("expected one of pool_bytes and pool_share, got " + ("both" if pool_bytes else "neither"))
    if pool_share is not None:
        if not (isinstance(pool_share, (int, float)) and math.isfinite(pool_share) and 0 < pool_share <= 1):
            raise ValueError(f"pool_share: expected a share above 0 and up to 1, got {pool_share!r}")
        free_bytes, _ = memory.info()
        pool_bytes = int(free_bytes * pool_share)
    if pool_bytes is None or pool_bytes < page_bytes:
        raise ValueError(
            f"the pool is too small for one page: expected at least {page_bytes} bytes, got {pool_bytes}; "
            "give it more, or choose smaller pages"
        )
    return min(pool_bytes // page_bytes, most_pages)
