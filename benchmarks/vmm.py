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

from benchmarks import _machine
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing
from jax_vattention import KVCacheManager, KVCacheSpec
from jax_vattention.memory import PagedBuffer, PagePool, open_memory

_KIB, _MIB = 2**10, 2**20
_PAGE_BYTES = (64 * _KIB, 2 * _MIB, 16 * _MIB, 64 * _MIB)
_POOL_BYTES = 1024 * _MIB  # of one row of the page table
_STEP_PAGE_BYTES = {"cpu": 64 * _KIB, "gpu": 2 * _MIB}
_STEP_PAGES = 4  # a slot of the step table at most
_PROMPT_TOKENS = 131_065  # not a whole number of pages
_PROMPTS = {
    # Layers and sizes of pages: Llama-3-8B whole on a GPU; a sixteenth of it, in pages of a sixteenth, on a host.
    "gpu": (32, (2 * _MIB,), (2 * _MIB, 16 * _MIB, 64 * _MIB)),
    "cpu": (2, (128 * _KIB,), (128 * _KIB, 1 * _MIB, 4 * _MIB)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pages", type=int, default=256, metavar="N", help="in 1 GiB at most (default: %(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 1024], metavar="N", help="live (default: 64 1024)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="per row (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=_PROMPT_TOKENS, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of a prompt (default: %(default)s)")


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
        prompts += _prompt_rows(device, arguments.prompt_tokens, arguments.repeats)
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
            "step_page_bytes": _STEP_PAGE_BYTES,
            "prompt_tokens": arguments.prompt_tokens,
            "repeats": arguments.repeats,
            "other_programs_cpu_share": round(others.share(), 3),
        },
        tables=(
            Table("One page, µs", _PAGE_COLUMNS, tuple(pages)),
            Table("A long prompt mapped by one step", _PROMPT_COLUMNS, tuple(prompts)),
            Table("KVCacheManager.step, µs", _STEP_COLUMNS, tuple(steps)),
        ),
        notes=(
            "map, new: the page is made, mapped and zeroed. map, again: so is one that the pool kept.",
            "A long prompt: KVCacheManager.step for one slot with background=False, so that all is mapped while it "
            "waits; on a GPU the shape of Llama-3-8B, on a host 2 of its layers. ms: median; calls: of the driver or "
            "the system, in one step; waste: pages granted and not filled, over those filled.",
            "step: every live slot asks for a length; in 'one page' one of them needs a page more than before.",
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
_STEP_COLUMNS = (
    Column("backend", "backend"),
    Column("page_kib", "page, KiB"),
    Column("slots", "live slots"),
    Column("grows", "grows by"),
    *_TIMES,
    Column("calls", "calls"),
)


_PROMPT_COLUMNS = (
    Column("backend", "backend"),
    Column("sizes", "pages, KiB"),
    Column("zeroed", "zeroed"),
    Column("pages_are", "pages are"),
    Column("ms", "ms", ".2f"),
    Column("worst_ms", "worst", ".2f"),
    Column("pages", "pages"),
    Column("calls", "calls"),
    Column("waste", "waste", ".3%"),
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
    """Each page by its own call, then all of them by one."""
    count = max(1, min(most, _POOL_BYTES // page_bytes))
    buffer = PagedBuffer(PagePool(memory, [page_bytes], count * page_bytes), count * page_bytes)
    timings = {
        "map, new": _each(lambda page: buffer.map([(page, 1, 1)]), count),
        "unmap": _each(lambda page: buffer.unmap([(page, 1, 1)]), count),
        "map, again": _each(lambda page: buffer.map([(page, 1, 1)]), count),
    }
    buffer.unmap([(0, count, 1)])
    row = {"backend": memory.platform, "page_kib": page_bytes // _KIB}
    return [row | {"call": call} | _times(timing) for call, timing in timings.items()]


def _prompt_rows(device: jax.Device, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One size of pages against several, zeroed and not."""
    layers, *choices = _PROMPTS[device.platform]
    return [
        row
        for sizes in choices
        for zeroed in (True, False)
        for row in _map_prompts(device, layers, sizes, zeroed, tokens, repeats)
    ]


def _map_prompts(
    device: jax.Device, layers: int, sizes: tuple[int, ...], zeroed: bool, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """A prompt mapped with pages that are made for it, and with pages that the pool kept."""
    spec = KVCacheSpec(layers, 8, 128, 1, tokens + 4096, page_bytes=sizes[0], large_page_bytes=sizes[1:])
    found: dict[str, list[tuple[float, int, int, float]]] = {"new": [], "kept": []}
    for _ in range(repeats):
        with KVCacheManager(
            spec, pool_bytes=spec.slot_bytes, device=device, background=False, zero_pages=zeroed
        ) as manager:
            for rows in found.values():
                rows.append(_map_prompt(manager, tokens))
    row = {"backend": open_memory(device).platform, "sizes": ", ".join(str(size // _KIB) for size in sizes)}
    result = []
    for pages_are, rows in found.items():
        timing = Timing.of(seconds for seconds, *_ in rows)
        _, pages, calls, waste = rows[0]
        figures = {"ms": timing.median * 1e3, "worst_ms": timing.worst * 1e3, "pages": pages, "calls": calls}
        result.append(row | {"zeroed": "yes" if zeroed else "no", "pages_are": pages_are, "waste": waste} | figures)
    return result


def _map_prompt(manager: KVCacheManager, tokens: int) -> tuple[float, int, int, float]:
    """Seconds, pages, calls and waste of a prompt that comes to an empty cache, and leaves it empty."""
    slot = manager.allocate(tokens)
    before = sum(manager._memory.calls().values())
    start = perf_counter()
    cache = manager.step({slot: tokens})
    seconds = perf_counter() - start
    calls = sum(manager._memory.calls().values()) - before
    stats, (snapshot,) = manager.stats(), manager.snapshot().slots
    manager.free(slot)
    manager.finish(cache)
    manager.sync()
    return seconds, sum(snapshot.page_sizes.values()), calls, stats.waste


def _step_rows(device: jax.Device, slots: int, steps: int) -> list[dict[str, Any]]:
    """`step` for all live slots, first with nothing to map, then with one page."""
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
    with KVCacheManager(spec, pool_bytes=slots * _STEP_PAGES * page_bytes, device=device) as manager:
        lengths = {manager.allocate(): 1 for _ in range(slots)}
        growths = ((slot, (page + 1) * tokens_per_page) for page in range(1, _STEP_PAGES) for slot in list(lengths))

        def step() -> float:
            start = perf_counter()
            cache = manager.step(lengths)
            seconds = perf_counter() - start
            manager.finish(cache)
            return seconds

        def grow_one() -> float:
            slot, length = next(growths)
            lengths[slot] = length
            return step()

        step()
        idle = Timing.of([step() for _ in range(steps)])
        count = min(steps, slots * (_STEP_PAGES - 1))
        growing = Timing.of([grow_one() for _ in range(count)])
    return [row | {"grows": "nothing"} | _times(idle), row | {"grows": "one page"} | _times(growing)]
