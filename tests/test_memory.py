"""The native core: the same suite over every memory backend."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_vattention import errors
from jax_vattention.memory import Mapper, PagedBuffer, PagePool, open_memory, pool_pages

PAGES = 16


@pytest.fixture
def memory(device, strict):
    return open_memory(device, strict=strict)


@pytest.fixture
def buffer(memory, page_bytes):
    return PagedBuffer(PagePool(memory, [page_bytes], PAGES // 2 * page_bytes), PAGES * page_bytes)


def floats(buffer: PagedBuffer, page_bytes: int) -> jax.Array:
    return buffer.view((PAGES, page_bytes // 4), jnp.float32)


def page_sum(view: jax.Array, page: int) -> float:
    """Reads one page and nothing else."""
    return float(jax.jit(lambda x: jax.lax.dynamic_slice_in_dim(x, page, 1).sum())(view))


def test_a_view_has_the_reserved_address_and_is_never_copied(buffer, page_bytes, device):
    view = floats(buffer, page_bytes)
    assert view.unsafe_buffer_pointer() == buffer.address
    assert view.devices() == {device}
    assert buffer.views == 1
    assert buffer.mapped_pages == 0
    assert buffer.pool.created_pages == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_views_of_every_dtype(buffer, page_bytes, dtype):
    view = buffer.view((PAGES, page_bytes // jnp.dtype(dtype).itemsize), dtype)
    assert view.dtype == dtype


def test_a_view_must_lie_within_the_buffer(buffer):
    with pytest.raises(ValueError, match=r"expected a shape and an offset within \d+ bytes"):
        buffer.view((PAGES << 40,), jnp.float32)
    with pytest.raises(ValueError, match=r"got a shape of 4 bytes at offset -4"):
        buffer.view((1,), jnp.float32, -4)


def test_mapped_pages_are_zero_and_apart(buffer, page_bytes):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 1, 1), (5, 2, 1), (PAGES - 1, 1, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages, buffer.pool.created_pages) == (4, 4, 4)
    for page in (0, 5, 6, PAGES - 1):
        assert page_sum(view, page) == 0


def test_unmapped_pages_return_to_the_pool(buffer):
    buffer.map([(0, 8, 1)])
    buffer.unmap([(2, 3, 1), (0, 1, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages, buffer.pool.created_pages) == (4, 4, 8)
    buffer.map([(8, 4, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages, buffer.pool.created_pages) == (8, 0, 8)


@pytest.mark.parametrize(
    "ranges",
    [
        [(-1, 1, 1)],
        [(0, 0, 1)],
        [(PAGES, 1, 1)],
        [(PAGES - 1, 2, 1)],
        [(2**62, 2**62, 1)],
        [(0, 2, 1), (1, 1, 1)],
        [(0, 1, 0)],
        [(PAGES - 3, 1, 4)],
        [(0, 2**32, 2**32)],
        [(0, 1, 4), (3, 1, 1)],
    ],
)
def test_bad_ranges_change_nothing(buffer, ranges):
    with pytest.raises(ValueError, match=r"outside a buffer|named twice"):
        buffer.map(ranges)
    with pytest.raises(ValueError, match=r"outside a buffer|named twice"):
        buffer.unmap(ranges)
    assert (buffer.mapped_pages, buffer.pool.free_pages) == (0, 8)


def test_a_view_of_a_part_starts_at_its_offset(buffer, page_bytes):
    buffer.map([(3, 1, 1)])
    view = buffer.view((page_bytes // 4,), jnp.float32, 3 * page_bytes)
    assert view.unsafe_buffer_pointer() == buffer.address + 3 * page_bytes
    assert float(view.sum()) == 0


@pytest.fixture
def mixed(memory, page_bytes):
    """Pages of 1, 2 and 8 smallest pages out of a budget of 8."""
    return PagedBuffer(PagePool(memory, [page_bytes, 2 * page_bytes, 8 * page_bytes], 8 * page_bytes), 16 * page_bytes)


def test_pages_of_several_sizes_share_one_budget(mixed, page_bytes):
    view = floats(mixed, page_bytes)
    mixed.map([(0, 2, 2), (4, 1, 1)])
    assert (mixed.mapped_pages, mixed.pool.free_pages, mixed.pool.created_pages) == (5, 3, 5)
    assert [page_sum(view, page) for page in range(5)] == [0] * 5
    with pytest.raises(errors.OutOfPagesError, match=r"needed 4 pages of .*, 3 of 8 are free"):
        mixed.map([(8, 2, 2)])
    with pytest.raises(ValueError, match="page 1 is not mapped, or in another size"):
        mixed.unmap([(1, 1, 1)])
    with pytest.raises(ValueError, match="page 3 is mapped already"):
        mixed.map([(3, 1, 1)])
    mixed.unmap([(0, 2, 2), (4, 1, 1)])
    assert mixed.pool.counts() == {page_bytes: (1, 1), 2 * page_bytes: (2, 2), 8 * page_bytes: (0, 0)}


def test_the_split_of_the_budget_follows_the_load(mixed, page_bytes):
    mixed.map([(0, 8, 1)])
    mixed.unmap([(0, 8, 1)])
    mixed.map([(0, 1, 8)])  # out of the bytes of eight small pages
    assert mixed.pool.counts() == {page_bytes: (0, 0), 2 * page_bytes: (0, 0), 8 * page_bytes: (1, 0)}
    mixed.unmap([(0, 1, 8)])
    mixed.map([(0, 1, 1), (1, 3, 2)])
    assert mixed.pool.counts() == {page_bytes: (1, 0), 2 * page_bytes: (3, 0), 8 * page_bytes: (0, 0)}
    assert (mixed.pool.free_pages, mixed.pool.created_pages) == (1, 7)


@pytest.mark.parametrize("sizes", [[], [4, 4], [8, 4], [4, 6]])
def test_sizes_must_ascend_in_multiples(memory, page_bytes, sizes):
    with pytest.raises(ValueError, match=r"page_bytes: expected"):
        PagePool(memory, [size * page_bytes // 4 * 4 for size in sizes], 1 << 24)


def test_zeroing(buffer, page_bytes, device):
    view = floats(buffer, page_bytes)
    buffer.map([(2, 2, 1)])
    with pytest.raises(ValueError, match="page 2 or one behind it is not mapped"):
        buffer.zero([(2, 3, 1)])
    buffer.zero([(2, 1, 1), (3, 1, 1)])
    assert page_sum(view, 2) == page_sum(view, 3) == 0


def test_the_mapper_works_in_order_and_keeps_errors(buffer, memory, page_bytes):
    mapper = Mapper()
    tickets = [
        mapper.map([(buffer, [(0, 4, 1)])], zero=True),
        mapper.map([(buffer, [(2, 1, 1)])], zero=True),  # fails: mapped already
        mapper.unmap([(buffer, [(0, 2, 1)])]),
        mapper.zero([(buffer, [(2, 2, 1)])]),
    ]
    assert tickets == [1, 2, 3, 4]
    mapper.wait(4)
    assert mapper.completed == 4
    for ticket in (1, 3, 4):
        mapper.raise_if_failed(ticket)
    with pytest.raises(ValueError, match="page 2 is mapped already"):
        mapper.raise_if_failed(2)
    mapper.raise_if_failed(2)  # once
    assert buffer.mapped_pages == 2
    assert mapper.busy_seconds > 0


def test_work_on_several_buffers_is_done_whole_or_not_at_all(memory, page_bytes):
    pool = PagePool(memory, [page_bytes], 8 * page_bytes)
    first, second = PagedBuffer(pool, PAGES * page_bytes), PagedBuffer(pool, PAGES * page_bytes)
    mapper = Mapper()
    for failures in range(100):
        memory.inject_failure(failures, False)
        ticket = mapper.map([(first, [(0, 2, 1)]), (second, [(1, 2, 1)])], zero=True)
        mapper.wait(ticket)
        memory.inject_failure(2**40, False)
        try:
            mapper.raise_if_failed(ticket)
        except errors.DriverError:
            assert (first.mapped_pages, second.mapped_pages, pool.free_pages) == (0, 0, 8)
        else:
            break
    assert failures >= 6
    for failures in range(4):
        memory.inject_failure(failures, False)
        ticket = mapper.unmap([(first, [(0, 2, 1)]), (second, [(1, 2, 1)])])
        mapper.wait(ticket)
        memory.inject_failure(2**40, False)
        with pytest.raises(errors.DriverError, match="unmapping"):
            mapper.raise_if_failed(ticket)
        assert (first.mapped_pages, second.mapped_pages, pool.free_pages) == (2, 2, 4)


def test_the_mapper_does_not_hold_the_interpreter(buffer, memory):
    memory.set_delay(20_000)
    mapper = Mapper()
    start = time.perf_counter()
    ticket = mapper.map([(buffer, [(0, 4, 1)])], zero=True)
    assert mapper.completed < ticket
    assert time.perf_counter() - start < 0.02 * 4
    del mapper  # does what is queued, then ends
    memory.set_delay(0)
    assert buffer.mapped_pages == 4


def test_mapping_twice_and_unmapping_what_is_not_mapped(buffer):
    buffer.map([(3, 2, 1)])
    with pytest.raises(ValueError, match="page 4 is mapped already"):
        buffer.map([(0, 1, 1), (4, 1, 1)])
    with pytest.raises(ValueError, match="page 5 is not mapped"):
        buffer.unmap([(3, 3, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages) == (2, 6)


def test_a_full_pool_changes_nothing(buffer):
    buffer.map([(0, 5, 1)])
    with pytest.raises(errors.OutOfPagesError, match=r"needed 4 pages of .* 3 of 8 are free"):
        buffer.map([(6, 4, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages) == (5, 3)
    buffer.map([(6, 3, 1)])


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_a_failure_at_any_call_of_map_changes_nothing(buffer, memory, page_bytes, out_of_memory):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 2, 1)])
    failures = 0
    while True:
        memory.inject_failure(failures, out_of_memory)
        try:
            buffer.map([(4, 2, 1), (9, 1, 1)])
        except errors.DriverError as error:
            failures += 1
            assert "injected failure" in str(error)
            assert error.call in str(error)
            assert error.out_of_memory is out_of_memory
            assert (buffer.mapped_pages, buffer.pool.free_pages) == (2, 6)
            assert page_sum(view, 0) == 0
        else:
            break
    # Three pages to make and to map, two ranges to zero; CUDA has a call more for each mapping.
    assert failures >= 3 + 2
    assert (buffer.mapped_pages, buffer.pool.free_pages) == (5, 3)
    memory.inject_failure(2**40, True)


def test_a_failure_at_any_call_of_unmap_changes_nothing(buffer, memory, page_bytes):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 4, 1)])
    for failures in range(4):
        memory.inject_failure(failures, False)
        with pytest.raises(errors.DriverError, match=r"unmapping .* bytes at 0x"):
            buffer.unmap([(0, 4, 1)])
        assert (buffer.mapped_pages, buffer.pool.free_pages) == (4, 4)
        assert [page_sum(view, page) for page in range(4)] == [0] * 4
    buffer.unmap([(0, 4, 1)])
    assert (buffer.mapped_pages, buffer.pool.free_pages) == (0, 8)


def test_a_view_outlives_the_buffer(buffer, page_bytes, device):
    view = floats(buffer, page_bytes)
    buffer.map([(1, 1, 1)])
    native = buffer.native
    del buffer
    gc.collect()
    assert native.views == 1
    assert page_sum(view, 1) == 0
    del view
    gc.collect()
    assert native.views == 0


@pytest.mark.parametrize("page", [0, 100, 4095, 4097, 6000])
def test_pages_must_fit_the_granularity(memory, page):
    with pytest.raises(ValueError, match=r"expected a multiple of the (host|cuda) backend's granularity"):
        PagePool(memory, [page], 1 << 21)


def test_calls_are_counted_by_name(buffer, memory):
    def calls(action):
        before = memory.calls()
        action()
        return {
            name: count - before.get(name, 0) for name, count in memory.calls().items() if count != before.get(name)
        }

    cuda = memory.platform == "cuda"
    created, mapped, unmapped = ("cuMemCreate", "cuMemMap", "cuMemUnmap") if cuda else ("fallocate", "mmap", "mmap")
    access = {"cuMemSetAccess": 3} if cuda else {}
    # The two pages of the second range are zeroed by one call.
    zeroed = {"cuMemsetD8Async": 2, "cuStreamSynchronize": 1} if cuda else {"memset": 2}
    assert calls(lambda: buffer.map([(0, 1, 1), (4, 2, 1)])) == {created: 3, mapped: 3} | access | zeroed
    assert calls(lambda: buffer.unmap([(4, 2, 1)])) == {unmapped: 2}
    # Pages that the pool kept are not made again.
    assert calls(lambda: buffer.native.map([(4, 2, 1)], False)) == {mapped: 2} | dict.fromkeys(access, 2)
    memory.inject_failure(0, True)
    with pytest.raises(errors.DriverError):
        buffer.map([(9, 1, 1)])
    assert memory.calls()[created] == 4  # the one that failed too


def test_memory_info(memory):
    free_bytes, total_bytes = memory.info()
    assert 0 < free_bytes <= total_bytes


def test_address_space_is_not_memory(memory, page_bytes):
    tebibyte = 1 << 40
    buffer = PagedBuffer(PagePool(memory, [page_bytes], 4 * page_bytes), tebibyte)
    view = buffer.view((tebibyte // 4,), jnp.float32)
    last = tebibyte // page_bytes - 1
    buffer.map([(last, 1, 1)])
    with jax.enable_x64(True):
        at = jax.device_put(np.int64(tebibyte // 4 - 8), view.device)
        read = jax.jit(lambda x, i: jax.lax.dynamic_slice(x, (i,), (8,)).sum())(view, at)
    assert float(read) == 0


@pytest.mark.parametrize(
    ("pool_bytes", "pool_share", "message"),
    [
        (None, None, "got neither"),
        (4096, 0.5, "got both"),
        (4095, None, "too small for one page: expected at least 4096 bytes, got 4095"),
        (None, 0.0, "a share above 0"),
        (None, 1.5, "a share above 0"),
        (None, float("nan"), "a share above 0"),
        (-1, None, "too small for one page"),
    ],
)
def test_bad_pools(pool_bytes, pool_share, message):
    memory = open_memory(jax.devices("cpu")[0])
    with pytest.raises(ValueError, match=message):
        pool_pages(memory, 4096, pool_bytes, pool_share, 100)


def test_a_pool_is_no_larger_than_what_can_be_mapped():
    memory = open_memory(jax.devices("cpu")[0])
    assert pool_pages(memory, 4096, 1 << 30, None, 100) == 100
    assert pool_pages(memory, 4096, 10 * 4096 + 5, None, 100) == 10
    assert pool_pages(memory, 4096, None, 0.001, 100) == 100


def host_run(code: str) -> subprocess.CompletedProcess:
    script = "import jax, jax.numpy as jnp\nfrom jax_vattention.memory import *\n" + textwrap.dedent(code)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)


READ_UNMAPPED = """
    buffer = PagedBuffer(PagePool(open_memory(jax.devices("cpu")[0], strict={strict}), [4096], 8 * 4096), 1 << 20)
    view = buffer.view((1 << 18,), jnp.float32)
    print("read", float(jax.jit(lambda x: jax.lax.dynamic_slice(x, (5000,), (8,)).sum())(view)))
"""


def test_unmapped_host_memory_reads_as_zero_by_default():
    result = host_run(READ_UNMAPPED.format(strict=False))
    assert result.stdout == "read 0.0\n", result.stderr


def test_unmapped_host_memory_faults_in_strict_mode():
    result = host_run(READ_UNMAPPED.format(strict=True))
    assert result.returncode == -11
    assert "read" not in result.stdout


@pytest.mark.parametrize("order", ["view, buffer", "buffer, view", "memory, buffer, view", ""])
def test_shutdown_in_any_order_is_silent(order):
    result = host_run(f"""
        memory = open_memory(jax.devices("cpu")[0], strict=True)
        buffer = PagedBuffer(PagePool(memory, [4096], 8 * 4096), 1 << 20)
        view = buffer.view((1 << 18,), jnp.float32)
        buffer.map([(0, 3, 1)])
        for name in "{order}".split(", "):
            if name: del globals()[name]
        print("end")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_nothing_leaks_on_the_host():
    result = host_run("""
        import os, gc
        def used():
            gc.collect()
            maps = sum("jax_vattention" in line for line in open("/proc/self/maps"))
            return len(os.listdir("/proc/self/fd")), maps
        def once(fail_at):
            memory = open_memory(jax.devices("cpu")[0])
            buffer = PagedBuffer(PagePool(memory, [4096], 64 * 4096), 1 << 22)
            view = buffer.view((1 << 20,), jnp.float32)
            memory.inject_failure(fail_at, True)
            for ranges in ([(0, 4), (9, 3)], [(20, 8)]):
                try: buffer.map(ranges)
                except Exception: pass
            memory.inject_failure(1, True)
            try: buffer.unmap([(20, 2, 1)])
            except Exception: pass
        once(0); before = used()
        for i in range(40): once(i)
        assert used() == before, (used(), before)
        print("same")
    """)
    assert result.stdout == "same\n", result.stderr


def test_cuda_without_a_driver_says_so():
    from jax_vattention import _native

    try:
        jax.devices("gpu")
    except RuntimeError:
        with pytest.raises(errors.DriverUnavailableError, match="CUDA driver cannot be loaded"):
            _native.Memory.cuda(0)
    else:
        with pytest.raises(errors.DriverError, match=r"cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
            _native.Memory.cuda(1000)


def test_strict_mode_is_for_the_host():
    with pytest.raises(ValueError, match="strict=True is for the host"):
        open_memory(_FakeGpu(), strict=True)


class _FakeGpu:
    """Only what open_memory asks a device before it touches the driver."""

    platform = "gpu"

    class client:  # noqa: N801
        platform_version = "PJRT C API\ncuda 13000"
