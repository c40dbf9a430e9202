"""What mapping costs: a page mapped and unmapped, a long prompt, and `KVCacheManager.step` between two programs.

On a CPU the host backend is measured; with a GPU, CUDA's virtual memory management as well.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import numpy as np

from benchmarks import _machine
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing
from jax_vattention import KVCacheManager, KVCacheSpec
from jax_vattention.extent import Extent, Ranges
from jax_vattention.memory import Mapper, PagedBuffer, PagePool, open_memory

_KIB, _MIB = 2**10, 2**20
_PAGE_BYTES = (64 * _KIB, 2 * _MIB, 16 * _MIB, 64 * _MIB)
_POOL_BYTES = 1024 * _MIB  # of one row of the page table
_STEP_PAGE_BYTES = {"cpu": 64 * _KIB, "gpu": 2 * _MIB}
_STEP_PAGES = 4  # a slot of the step table at most

_TOKEN_BYTES = 128 * _KIB  # Llama-3-8B in bfloat16: K and V of 32 layers, 8 heads of 128
_PROMPT_TOKENS = {"host": 4096, "cuda": 131_072}  # 512 MiB and 16 GiB
_PROMPT_SIZES = ((2 * _MIB,), (2 * _MIB, 16 * _MIB), (2 * _MIB, 8 * _MIB, 64 * _MIB))
_LARGE_PAGE_SHARE = 0.02  # the manager's default
_CALLS = {
    "cuMemCreate": "create",
    "fallocate": "create",
    "cuMemMap": "map",
    "mmap": "map",
    "cuMemSetAccess": "access",
    "cuMemsetD8Async": "zero",
    "cuStreamSynchronize": "zero",
    "memset": "zero",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pages", type=int, default=256, metavar="N", help="in 1 GiB at most (default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 1024], metavar="N", help="live (default: 64 1024)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="per row (default: %(default)s)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help=f"of the long prompt (default: {_PROMPT_TOKENS['cuda']} on a GPU, {_PROMPT_TOKENS['host']} on the host)",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of a long prompt (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Report:
    devices = [jax.local_devices(backend="cpu")[0]]
    if jax.default_backend() == "gpu":
        devices.append(jax.local_devices()[0])
    others = _machine.OtherLoad()
    pages, prompts, steps = [], [], []
    for device in devices:
        memory = open_memory(device)
        for page_bytes in _PAGE_BYTES:
            if page_bytes % memory.granularity == 0:
                pages += _page_rows(memory, page_bytes, arguments.pages)
        tokens = arguments.prompt_tokens or _PROMPT_TOKENS[memory.platform]
        for sizes in _PROMPT_SIZES:
            prompts += _prompt_rows(memory, sizes, tokens, arguments.repeats)
        for slots in arguments.slots:
            steps += _step_rows(device, slots, arguments.steps)
    return Report(
        name="vmm",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(),
        settings={
            "pages": arguments.pages,
            "steps": arguments.steps,
            "repeats": arguments.repeats,
            "step_page_bytes": _STEP_PAGE_BYTES,
            "prompt_token_bytes": _TOKEN_BYTES,
            "large_page_share": _LARGE_PAGE_SHARE,
            "other_programs_cpu_share": round(others.share(), 3),
        },
        tables=(
            Table("One page, µs", _PAGE_COLUMNS, tuple(pages)),
            Table("A long prompt at the Llama-3-8B shape, 128 KiB a token", _PROMPT_COLUMNS, tuple(prompts)),
            Table("KVCacheManager.step, µs", _STEP_COLUMNS, tuple(steps)),
        ),
        notes=(
            "map, new: the page is made, mapped and zeroed. map, again: so is one that the pool kept.",
            "long prompt: the pages that the manager would choose, mapped by its thread. new: made for it; kept: the "
            f"pool had them. On the host it is a small one by default ({_PROMPT_TOKENS['host']:,} tokens; "
            f"{_PROMPT_TOKENS['cuda']:,} are 16 GiB), and zeroing is the work of a CPU. zero: calls that zero, and on "
            "CUDA the one that waits for them. waste: mapped and not used, as a share of what is used; at worst: of "
            "all lengths from half of the prompt to all of it.",
            "step: every live slot asks for a length, given as an array. one page: of those one needs a page more than "
            "before, which step waits for; ahead: which next_lengths had announced, and the mapper was done.",
        ),
    )


_TIMES = (
    Column("median_us", "median", ".1f"),
    Column("p99_us", "p99", ".1f"),
    Column("worst_us", "worst", ".1f"),
)
_PAGE_COLUMNS = (
    Column("backend", "backend"),
    Column("page_kib", "page, KiB"),
    Column("call", "call"),
    *_TIMES,
    Column("calls", "calls"),
)
_PROMPT_COLUMNS = (
    Column("backend", "backend"),
    Column("tokens", "tokens"),
    Column("sizes", "pages, MiB"),
    Column("pages", "how many"),
    Column("which", "which"),
    Column("zeroed", "zeroed"),
    Column("median_ms", "median, ms", ".2f"),
    Column("worst_ms", "worst", ".2f"),
    Column("create", "calls: create", "d"),
    Column("map", "map", "d"),
    Column("access", "access", "d"),
    Column("zero", "zero", "d"),
    Column("other", "other", "d"),
    Column("waste", "waste", ".2%"),
    Column("waste_worst", "at worst", ".2%"),
)
_STEP_COLUMNS = (
    Column("backend", "backend"),
    Column("page_kib", "page, KiB"),
    Column("slots", "live slots"),
    Column("grows", "grows by"),
    *_TIMES,
    Column("calls", "calls"),
)


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "median_us": timing.median * 1e6,
        "p99_us": timing.quantile(0.99) * 1e6,
        "worst_us": timing.worst * 1e6,
        "calls": len(timing.seconds),
    }


def _each(call: Callable[[int], Any], count: int) -> Timing:
    """Times `call(0)`, `call(1)`, ..."""
    seconds = []
    for index in range(count):
        start = perf_counter()
        call(index)
        seconds.append(perf_counter() - start)
    return Timing.of(seconds)


def _page_rows(memory: Any, page_bytes: int, most: int) -> list[dict[str, Any]]:
    """Each page by its own call."""
    count = max(1, min(most, _POOL_BYTES // page_bytes))
    buffer = PagedBuffer(PagePool(memory, [page_bytes], count * page_bytes), count * page_bytes)
    timings = {
        "map, new": _each(lambda page: buffer.map([(page, 1, 1)]), count),
        "unmap": _each(lambda page: buffer.unmap([(page, 1, 1)]), count),
        "map, again": _each(lambda page: buffer.map([(page, 1, 1)]), count),
    }
    row = {"backend": memory.platform, "page_kib": page_bytes // _KIB}
    return [row | {"call": call} | _times(timing) for call, timing in timings.items()]


def _prompt_rows(memory: Any, sizes: tuple[int, ...], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A prompt mapped at once, with pages that are made for it and with pages that the pool kept."""
    smallest = sizes[0]
    spans = tuple(size // smallest for size in sizes)
    per_page = smallest // _TOKEN_BYTES
    needed, half = -(-tokens // per_page), max(1, tokens // 2)
    limit = -(-needed // spans[-1]) * spans[-1]

    def plan(pages: int) -> Ranges:
        return Extent(spans, _LARGE_PAGE_SHARE).plan(pages, limit)

    def waste(pages: int, tokens: int) -> float:
        mapped = sum(count * span for _, count, span in plan(pages))
        return mapped * per_page / tokens - 1

    # At worst a page has just been begun.
    lengths = ((pages, max(half, (pages - 1) * per_page + 1)) for pages in range(-(-half // per_page), needed + 1))
    ranges = plan(needed)
    row = {
        "backend": memory.platform,
        "tokens": tokens,
        "sizes": " + ".join(str(size // _MIB) for size in sizes),
        "pages": sum(count for _, count, _ in ranges),
        "waste": waste(needed, tokens),
        "waste_worst": max(waste(*length) for length in lengths),
    }
    rows = []
    for zero in (True, False):
        found: dict[str, list[tuple[float, dict[str, int]]]] = {"new": [], "kept": []}
        for _ in range(repeats):
            buffer = PagedBuffer(PagePool(memory, sizes, limit * smallest), limit * smallest)
            found["new"].append(_map_whole(buffer, ranges, zero))
            buffer.unmap(ranges)
            found["kept"].append(_map_whole(buffer, ranges, zero))
        for which, results in found.items():
            timing = Timing.of(seconds for seconds, _ in results)
            times = {"median_ms": timing.median * 1e3, "worst_ms": timing.worst * 1e3, "repeats": repeats}
            rows.append(row | {"which": which, "zeroed": "yes" if zero else "no"} | times | results[-1][1])
    return rows


def _map_whole(buffer: PagedBuffer, ranges: Ranges, zero: bool) -> tuple[float, dict[str, int]]:
    """Seconds, and calls by what they do, of mapping all ranges as the manager does: by the mapper, as one piece."""
    mapper, memory = Mapper(), buffer.pool.memory
    before = memory.calls()
    start = perf_counter()
    ticket = mapper.map([(buffer, ranges)], zero=zero)
    mapper.wait(ticket)
    seconds = perf_counter() - start
    mapper.raise_if_failed(ticket)
    calls = dict.fromkeys((*_CALLS.values(), "other"), 0)
    for name, count in memory.calls().items():
        calls[_CALLS.get(name, "other")] += count - before.get(name, 0)
    return seconds, calls


def _step_rows(device: jax.Device, slots: int, steps: int) -> list[dict[str, Any]]:
    """`step` for all live slots: with nothing to map, with one page that it waits for, and with one mapped ahead."""
    page_bytes = _STEP_PAGE_BYTES[device.platform]
    # A layer of 8 heads of 64 in bfloat16: whole tokens fill a page.
    tokens_per_page = page_bytes // (2 * 8 * 64 * 2)
    spec = KVCacheSpec(
        num_layers=1,
        num_kv_heads=8,
        head_dim=64,
        num_slots=slots,
        max_seq_len=_STEP_PAGES * tokens_per_page,
        page_bytes=page_bytes,
    )
    row = {"backend": open_memory(device).platform, "page_kib": page_bytes // _KIB, "slots": slots}
    rows = []
    for grows in ("nothing", "one page", "one page, ahead"):
        ahead = grows == "one page, ahead"
        count = steps if grows == "nothing" else min(steps, slots * (_STEP_PAGES - 1))
        pool_bytes = slots * _STEP_PAGES * page_bytes
        with KVCacheManager(
            spec, pool_bytes=pool_bytes, device=device, reclaim_below=0, lookahead_steps=int(ahead)
        ) as manager:
            rows.append(row | {"grows": grows} | _times(_time_steps(manager, count, grows != "nothing", ahead)))
    return rows


def _time_steps(manager: KVCacheManager, count: int, growing: bool, ahead: bool) -> Timing:
    """`step` for all slots, of which one in turn gets a page more in each; known one step earlier if `ahead`."""
    slots, page = manager.spec.num_slots, int(manager.spec.tokens_per_page)
    lengths = np.zeros(slots, np.int32)
    lengths[[manager.allocate(1) for _ in range(slots)]] = 1
    manager.finish(manager.step(lengths))
    seconds = []
    for index in range(count):
        following = lengths.copy()
        if growing:
            following[index % slots] = (index // slots + 2) * page
        if ahead:
            manager.finish(manager.step(lengths, next_lengths=following))
        manager.sync()
        start = perf_counter()
        cache = manager.step(following)
        seconds.append(perf_counter() - start)
        manager.finish(cache)
        lengths = following
    return Timing.of(seconds)
