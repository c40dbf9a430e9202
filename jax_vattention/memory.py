"""The typed face of the native memory core: pools of physical pages, and buffers that they are mapped into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_vattention import _native
from jax_vattention.errors import DriverUnavailableError

PageRanges = Sequence[tuple[int, int]]
"""Ranges of pages `(first, count)`, counted from the start of a buffer."""


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


class PagedBuffer:
    """A range of virtual addresses on one device, with physical pages of a pool behind parts of it.

    Args:
      memory: of the device.
      num_bytes: virtual size, a multiple of `page_bytes`.
      page_bytes: size of a page, a multiple of the backend's granularity.
      total_pages: most pages that can be mapped at once.
    """

    def __init__(self, memory: _native.Memory, num_bytes: int, page_bytes: int, total_pages: int):
        self.memory = memory
        self._pool = _native.PagePool(memory, page_bytes, total_pages)
        self._buffer = _native.PagedBuffer(self._pool, num_bytes)

    @property
    def address(self) -> int:
        """First address; it stays the same for the life of the buffer."""
        return self._buffer.address

    @property
    def total_pages(self) -> int:
        """Pages of the pool, in whatever state."""
        return self._pool.total_pages

    @property
    def free_pages(self) -> int:
        """Pages that can be mapped now. Those that were not made yet count."""
        return self._pool.free_pages

    @property
    def created_pages(self) -> int:
        """Pages that take up device memory, mapped or kept for reuse."""
        return self._pool.created_pages

    @property
    def mapped_pages(self) -> int:
        """Pages that are mapped."""
        return self._buffer.mapped_pages

    @property
    def views(self) -> int:
        """Arrays over this buffer that are alive, here or inside a running program."""
        return self._buffer.views

    def map(self, ranges: PageRanges) -> None:
        """Maps zeroed pages to all ranges, or to none.

        Raises:
          OutOfPagesError: fewer pages are free than asked for.
          DriverError: the device is out of memory, or a call failed.
        """
        self._buffer.map(ranges, True)

    def unmap(self, ranges: PageRanges) -> None:
        """Unmaps all ranges, or none. No program may use them any more.

        Raises:
          DriverError: a call failed.
        """
        self._buffer.unmap(ranges)

    def view(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """The whole buffer as an array. It is never copied, and it keeps the memory alive.

        Never donate it to a program, print it or convert it with numpy: all of them touch what is not mapped.
        """
        return jax.dlpack.from_dlpack(_Export(self._buffer, tuple(shape), jnp.dtype(dtype)))


class _Export:
    """What `jax.dlpack.from_dlpack` takes: it refuses a bare capsule."""

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: Any):
        self._buffer, self._shape, self._dtype = buffer, shape, dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._buffer.dlpack_device

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> object:
        del stream, options  # nothing is in flight on a new view, and no copy is ever made
        return self._buffer.dlpack(self._shape, self._dtype == jnp.bfloat16, self._dtype.itemsize * 8)


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
