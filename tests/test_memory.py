"""The native core: the same suite over every memory backend."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_vattention import errors
from jax_vattention.memory import PagedBuffer, open_memory, pool_pages

PAGES = 16


@pytest.fixture
def memory(device, strict):
    return open_memory(device, strict=strict)


@pytest.fixture
def buffer(memory, page_bytes):
    return PagedBuffer(memory, PAGES * page_bytes, page_bytes, total_pages=PAGES // 2)


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
    assert buffer.created_pages == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_views_of_every_dtype(buffer, page_bytes, dtype):
    view = buffer.view((PAGES, page_bytes // jnp.dtype(dtype).itemsize), dtype)
    assert view.dtype == dtype


def test_a_view_must_cover_the_buffer(buffer):
    with pytest.raises(ValueError, match=r"expected a shape of \d+ bytes, got one of 12"):
        buffer.view((3,), jnp.float32)


def test_mapped_pages_are_zero_and_apart(buffer, page_bytes):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 1), (5, 2), (PAGES - 1, 1)])
    assert (buffer.mapped_pages, buffer.free_pages, buffer.created_pages) == (4, 4, 4)
    for page in (0, 5, 6, PAGES - 1):
        assert page_sum(view, page) == 0


def test_unmapped_pages_return_to_the_pool(buffer):
    buffer.map([(0, 8)])
    buffer.unmap([(2, 3), (0, 1)])
    assert (buffer.mapped_pages, buffer.free_pages, buffer.created_pages) == (4, 4, 8)
    buffer.map([(8, 4)])
    assert (buffer.mapped_pages, buffer.free_pages, buffer.created_pages) == (8, 0, 8)


@pytest.mark.parametrize(
    "ranges", [[(-1, 1)], [(0, 0)], [(PAGES, 1)], [(PAGES - 1, 2)], [(2**62, 2**62)], [(0, 2), (1, 1)]]
)
def test_bad_ranges_change_nothing(buffer, ranges):
    with pytest.raises(ValueError, match=r"outside a buffer|named twice"):
        buffer.map(ranges)
    with pytest.raises(ValueError, match=r"outside a buffer|named twice"):
        buffer.unmap(ranges)
    assert (buffer.mapped_pages, buffer.free_pages) == (0, 8)


def test_mapping_twice_and_unmapping_what_is_not_mapped(buffer):
    buffer.map([(3, 2)])
    with pytest.raises(ValueError, match="page 4 is mapped already"):
        buffer.map([(0, 1), (4, 1)])
    with pytest.raises(ValueError, match="page 5 is not mapped"):
        buffer.unmap([(3, 3)])
    assert (buffer.mapped_pages, buffer.free_pages) == (2, 6)


def test_a_full_pool_changes_nothing(buffer):
    buffer.map([(0, 5)])
    with pytest.raises(errors.OutOfPagesError, match=r"needed 4 pages of .* 3 of 8 are free"):
        buffer.map([(6, 4)])
    assert (buffer.mapped_pages, buffer.free_pages) == (5, 3)
    buffer.map([(6, 3)])


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_a_failure_at_any_call_of_map_changes_nothing(buffer, memory, page_bytes, out_of_memory):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 2)])
    failures = 0
    while True:
        memory.inject_failure(failures, out_of_memory)
        try:
            buffer.map([(4, 2), (9, 1)])
        except errors.DriverError as error:
            failures += 1
            assert "injected failure" in str(error)
            assert error.call in str(error)
            assert error.out_of_memory is out_of_memory
            assert (buffer.mapped_pages, buffer.free_pages) == (2, 6)
            assert page_sum(view, 0) == 0
        else:
            break
    # Three pages to make and to map, two ranges to zero; CUDA has a call more for each mapping.
    assert failures >= 3 + 2
    assert (buffer.mapped_pages, buffer.free_pages) == (5, 3)
    memory.inject_failure(2**40, True)


def test_a_failure_at_any_call_of_unmap_changes_nothing(buffer, memory, page_bytes):
    view = floats(buffer, page_bytes)
    buffer.map([(0, 4)])
    for failures in range(4):
        memory.inject_failure(failures, False)
        with pytest.raises(errors.DriverError, match=r"unmapping .* bytes at 0x"):
            buffer.unmap([(0, 4)])
        assert (buffer.mapped_pages, buffer.free_pages) == (4, 4)
        assert [page_sum(view, page) for page in range(4)] == [0] * 4
    buffer.unmap([(0, 4)])
    assert (buffer.mapped_pages, buffer.free_pages) == (0, 8)


def test_a_view_outlives_the_buffer(buffer, page_bytes, device):
    view = floats(buffer, page_bytes)
    buffer.map([(1, 1)])
    native = buffer._buffer
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
        PagedBuffer(memory, 1 << 21, page, 1)


def test_memory_info(memory):
    free_bytes, total_bytes = memory.info()
    assert 0 < free_bytes <= total_bytes


def test_address_space_is_not_memory(memory, page_bytes):
    tebibyte = 1 << 40
    buffer = PagedBuffer(memory, tebibyte, page_bytes, 4)
    view = buffer.view((tebibyte // 4,), jnp.float32)
    last = tebibyte // page_bytes - 1
    buffer.map([(last, 1)])
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
    buffer = PagedBuffer(open_memory(jax.devices("cpu")[0], strict={strict}), 1 << 20, 4096, 8)
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
        buffer = PagedBuffer(memory, 1 << 20, 4096, 8)
        view = buffer.view((1 << 18,), jnp.float32)
        buffer.map([(0, 3)])
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
            buffer = PagedBuffer(memory, 1 << 22, 4096, 64)
            view = buffer.view((1 << 20,), jnp.float32)
            memory.inject_failure(fail_at, True)
            for ranges in ([(0, 4), (9, 3)], [(20, 8)]):
                try: buffer.map(ranges)
                except Exception: pass
            memory.inject_failure(1, True)
            try: buffer.unmap([(20, 2)])
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
