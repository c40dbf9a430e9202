"""Three KV caches in the same memory serve a request trace: static, paged as in vLLM, and `KVCacheManager`.

Steps have simulated times; `KVCacheManager` is the real one, on the host backend, with small pages in the place of
large ones. Another table times `KVCacheManager.step` itself.
"""

from __future__ import annotations

import argparse
import datetime
import math
from array import array
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import _machine
from benchmarks._replay import QUANTILE, Cache, CountedCache, Held, Replay, StepCost, Trace, pages_for, replay
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing
from jax_vattention import KVCacheManager, KVCacheSpec
from jax_vattention.stats import CacheStats

_SAMPLE = Path(__file__).parent / "traces" / "azure_llm_2023_conv_sample.csv"
_CACHES = ("static", "paged", "ours", "on demand")
_PAGE_TOKENS = 16  # 2 MiB of Llama-3-8B in bfloat16
_HOST_PAGE_BYTES = 4096  # stands for 2 MiB
_MIN_SEQ_LEN = 8192  # the context of Llama-3-8B
_WATERMARK_SHARE = 0.01  # of the pool: vLLM's; for our cache too, as admission is the server's business

# Of 2 MiB on an H100, from results/vmm.nvidia-h100-80gb.json: a page made, mapped and zeroed, and one unmapped.
_MAP_SECONDS = 73.2e-6
_UNMAP_SECONDS = 28.2e-6

_Form = Literal["array", "mapping", "mapping of what grows"]
_STEP_ROWS: tuple[tuple[int, int, _Form, int], ...] = (
    # live slots, layers, form of the lengths, slots that get a page
    *((slots, 4, "array", 0) for slots in (64, 256, 1024)),
    *((1024, layers, "array", 0) for layers in (32, 80)),
    *((slots, 4, "array", 1) for slots in (64, 256, 1024)),
    *((1024, layers, "array", 1) for layers in (32, 80)),
    *((1024, 4, "array", growing) for growing in (16, 64)),
    *((slots, 4, "mapping", 0) for slots in (64, 256, 1024)),
    *((1024, 4, "mapping of what grows", growing) for growing in (1, 16, 64)),
)
_STEP_WARMUP = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", default=str(_SAMPLE), metavar="FILE", help="CSV (default: the sample in traces/)")
    parser.add_argument("--requests", type=int, metavar="N", help="of the trace at most, from its start")
    parser.add_argument(
        "--rate",
        nargs="+",
        default=["1", "saturated"],
        metavar="R",
        help="how much faster than in the trace requests arrive, or 'saturated': all at once (default: 1 saturated)",
    )
    parser.add_argument("--caches", nargs="+", choices=_CACHES, default=list(_CACHES[:3]), help="default: the first 3")
    parser.add_argument("--pool-gib", type=float, default=40.0, metavar="GIB", help="of memory (default: %(default)s)")
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help=f"longer requests are left out (default: {_MIN_SEQ_LEN}, or what the longest request needs)",
    )
    parser.add_argument("--num-slots", type=int, default=1024, metavar="N", help="requests that run at once, at most")
    parser.add_argument("--prefill-tokens", type=int, default=2048, metavar="N", help="of a step (default: 2048)")
    parser.add_argument("--reclaim-below", type=float, default=0.1, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--eager-slots", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--eager-tokens", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="per row of the last table; 0: no table")


def run(arguments: argparse.Namespace) -> Report:
    rates = {text: float("inf") if text == "saturated" else float(text) for text in arguments.rate}
    trace = Trace.read(arguments.trace)
    if arguments.requests is not None:
        trace = trace.take(slice(arguments.requests))
    longest = int(trace.total_tokens.max())
    max_seq_len = arguments.max_seq_len or max(_MIN_SEQ_LEN, -(-longest // _PAGE_TOKENS) * _PAGE_TOKENS)
    fitting = trace.total_tokens <= max_seq_len
    left_out = int((~fitting).sum())
    trace = trace.take(fitting)
    cost = StepCost()
    others = _machine.OtherLoad()
    memory: list[dict[str, Any]] = []
    pages: list[dict[str, Any]] = []
    for load, rate in rates.items():
        for name in arguments.caches:
            cache = _make(name, arguments, max_seq_len, cost)
            start = perf_counter()
            found = replay(trace, cache, rate=rate, prefill_tokens=arguments.prefill_tokens, cost=cost)
            row = {"load": load, "cache": name, "wall_seconds": perf_counter() - start}
            memory.append(row | _memory_row(found, trace, cache, cost, arguments.pool_gib))
            if isinstance(cache, ManagedCache):
                cache.close()
                pages.append(row | _pages_row(found, trace, cache))
    steps = [_time_steps(arguments.steps, *row) for row in _STEP_ROWS] if arguments.steps else []
    return Report(
        name="manager",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(),
        settings={
            "trace": Path(arguments.trace).name,
            "requests": len(trace),
            "requests_left_out": left_out,
            "mean_tokens": round(float(trace.total_tokens.mean()), 1),
            "longest_tokens": longest,
            "longer_than_the_last": round(_longer_than_the_last(trace), 3),
            "max_seq_len": max_seq_len,
            "pool_gib": arguments.pool_gib,
            "num_slots": arguments.num_slots,
            "prefill_tokens": arguments.prefill_tokens,
            "watermark_share": _WATERMARK_SHARE,
            "reclaim_below": arguments.reclaim_below,
            "eager_slots": arguments.eager_slots,
            "eager_tokens": arguments.eager_tokens,
            "expected_quantile": QUANTILE,
            "step_base_seconds": cost.base_seconds,
            "step_prefill_tokens_per_second": cost.prefill_tokens_per_second,
            "step_kv_bytes_per_second": cost.kv_bytes_per_second,
            "token_bytes": cost.token_bytes,
            "map_seconds": _MAP_SECONDS,
            "unmap_seconds": _UNMAP_SECONDS,
            "other_programs_cpu_share": round(others.share(), 3),
        },
        tables=(
            Table("Three caches in the same memory", _MEMORY_COLUMNS, tuple(memory)),
            *((Table("Pages of KVCacheManager", _PAGES_COLUMNS, tuple(pages)),) if pages else ()),
            *((Table("KVCacheManager.step, µs", _STEP_COLUMNS, tuple(steps)),) if steps else ()),
        ),
        notes=_NOTES,
    )


def _longer_than_the_last(trace: Trace) -> float:
    """By how much a request is longer than the one before it, where it is: mean, as a share of the mean length."""
    tokens = trace.cached_tokens
    return float(np.maximum(np.diff(tokens), 0).sum() / tokens.sum())


_MEMORY_COLUMNS = (
    Column("load", "load"),
    Column("cache", "cache"),
    Column("batch_max", "batch, largest"),
    Column("batch_mean", "mean", ".1f"),
    Column("waste", "waste", ".2%"),
    Column("waste_with_spare", "with spare pages", ".2%"),
    Column("pool_filled", "pool filled", ".1%"),
    Column("preemptions", "preemptions"),
    Column("generated_per_second", "tokens/s", ".0f"),
    Column("first_token_mean", "first token, mean s", ".2f"),
    Column("first_token_p99", "p99 s", ".2f"),
)
_PAGES_COLUMNS = (
    Column("load", "load"),
    Column("cache", "cache"),
    Column("pages_total", "pages"),
    Column("pages_lost", "lost"),
    Column("background_failures", "driver failures"),
    Column("maps_needed", "mapped: waited for"),
    Column("maps_ahead", "ahead"),
    Column("unmaps", "unmapped"),
    Column("warm_maps_share", "mapped per request, share of its pages", ".1%"),
    Column("warm_unmaps_share", "unmapped", ".1%"),
    Column("adoptions", "adoptions"),
    Column("retained_share", "retained, of the pool", ".1%"),
    Column("stall_share", "time waited", ".2%"),
    Column("mapper_worst_share", "mapper's worst step", ".0%"),
    Column("median_us", "step, median µs", ".0f"),
    Column("p99_us", "p99 µs", ".0f"),
)
_STEP_COLUMNS = (
    Column("slots", "live slots"),
    Column("num_layers", "layers"),
    Column("form", "lengths"),
    Column("decoding", "slots that grow"),
    Column("growing", "get a page"),
    Column("median_us", "median", ".1f"),
    Column("p99_us", "p99", ".1f"),
    Column("worst_us", "worst", ".1f"),
)
_NOTES = (
    "All caches run the same serving loop in the same memory, with simulated step times (settings: step_*). static: a "
    "request takes max_seq_len tokens. paged: pages of 16 tokens that are counted, not touched. ours: KVCacheManager; "
    "on demand: the same with background=False.",
    "batch, waste, pool filled: means over time. waste: pages granted to live requests, less what their tokens fill, "
    "as a share of what those fill. with spare pages: also what is attached to their slots and granted to nobody, "
    "which any request can have.",
    "first token: from arrival; with 'saturated' all requests arrive at once. tokens/s: generated tokens until all are "
    "done, so with a given rate the trace limits it.",
    "ours maps 4 KiB of host memory in the place of 2 MiB of the GPU, 16 tokens each. The mapper is let finish between "
    "two steps; mapper's worst step: its work in one step at the times of an H100 (settings: map_seconds, "
    "unmap_seconds), as a share of that step. What a step waited for is added to its time, and so are as many unmapped "
    "pages of that step as it mapped.",
    "mapped and unmapped per request: after a tenth of the requests had finished. While the pool has room, requests "
    "inherit what they need. Where tokens fill it, a long request can only have what short ones leave, and a page "
    "moves between slots by being unmapped and mapped: here a request is longer than the one before by "
    "longer_than_the_last of the mean length, on average, and few slots wait to be chosen from.",
    "lost: most pages, in any step or after the last request, by which free + mapped + retained + retired differ from "
    "the pool, or what is attached from what the native pool has given out.",
    "step: host time of one call of KVCacheManager.step. In the last table each slot that grows gets a token a step, "
    "and so a page every 16 steps, which the mapper had mapped ahead before the call.",
)


class ManagedCache:
    """`KVCacheManager` on the host backend, behind the serving loop's interface.

    Host pages of 4 KiB stand for pages of 2 MiB, with as many tokens each: the policy sees pages and tokens only.
    """

    page_tokens = _PAGE_TOKENS

    def __init__(
        self,
        pool_tokens: int,
        max_seq_len: int,
        *,
        num_slots: int,
        watermark_share: float,
        background: bool = True,
        **options: Any,
    ):
        head_dim = _HOST_PAGE_BYTES // _PAGE_TOKENS // (2 * 4)  # K and V, float32
        spec = KVCacheSpec(
            num_layers=1,
            num_kv_heads=1,
            head_dim=head_dim,
            num_slots=num_slots,
            max_seq_len=max_seq_len,
            dtype="float32",
            page_bytes=_HOST_PAGE_BYTES,
        )
        self.num_slots = num_slots
        self.pages_total = pool_tokens // _PAGE_TOKENS
        self.watermark = math.ceil(watermark_share * self.pages_total)
        self.manager = KVCacheManager(
            spec,
            pool_bytes=self.pages_total * _HOST_PAGE_BYTES,
            device=jax.local_devices(backend="cpu")[0],
            background=background,
            **options,
        )
        # The manager takes no more than all slots could use.
        self.pages_total = self.manager.stats().pages_total
        self.pages_lost = 0
        """Most pages that were missing from the books, or from the native pool, in any step so far."""
        self.step_seconds = array("d")
        """Host time of each call of `KVCacheManager.step`."""
        self._counts = array("q")  # rows, in the order of _COUNTS

    def pages_available(self) -> int:
        """Free pages, and those that are attached but granted to nobody."""
        return self.manager.stats().pages_available

    def allocate(self, expected_tokens: int | None) -> int:
        """Takes a slot; expectations beyond the longest request are cut."""
        longest = self.manager.spec.max_seq_len
        return self.manager.allocate(None if expected_tokens is None else min(expected_tokens, longest))

    def step(self, lengths: np.ndarray, next_lengths: np.ndarray) -> Held:
        """See `Cache.step`. The mapper is done when it returns, as it would be after a program of some milliseconds."""
        manager = self.manager
        start = perf_counter()
        cache = manager.step(lengths, next_lengths=next_lengths)
        self.step_seconds.append(perf_counter() - start)
        manager.finish(cache)  # no program ran: its order token is the old one
        manager.sync()
        stats = manager.stats()
        self._count_lost(stats)
        before = self._counts[-len(_COUNTS) :] or array("q", [0] * len(_COUNTS))
        self._counts.extend(getattr(stats, name) for name in _COUNTS)
        waited_for = stats.maps_needed - before[_COUNTS.index("maps_needed")]
        # Which of the unmapped pages the step waited for is not counted: at most as many as it mapped.
        made_room = min(stats.unmaps - before[_COUNTS.index("unmaps")], waited_for)
        return Held(
            stats.pages_mapped,
            stats.pages_retained_live,
            stats.pages_retained - stats.pages_retained_live,
            waited_for * _MAP_SECONDS + made_room * _UNMAP_SECONDS,
        )

    def free(self, slot: int) -> None:
        """Ends the request of a slot."""
        self.manager.free(slot)

    def counts(self) -> dict[str, np.ndarray]:
        """What had been done by the end of each step. Arrays are `[steps]`."""
        table = np.frombuffer(self._counts, np.int64).reshape(-1, len(_COUNTS))
        return dict(zip(_COUNTS, table.T, strict=True))

    def close(self) -> None:
        """Looks for pages that are still mapped or retired, and gives the memory back. All slots are free."""
        self.manager.sync()
        stats = self.manager.stats()
        self._count_lost(stats)
        self.pages_lost = max(self.pages_lost, stats.pages_total - stats.pages_available)
        self.manager.close()

    def _count_lost(self, stats: CacheStats) -> None:
        attached = stats.pages_mapped + stats.pages_retained + stats.pages_retired
        sizes = stats.pages_by_size.items()
        taken = sum(size // stats.page_bytes * (created - idle) for size, (created, idle) in sizes)
        lost = max(abs(stats.pages_total - stats.pages_free - attached), abs(taken - attached))
        self.pages_lost = max(self.pages_lost, lost)


_COUNTS = ("maps_needed", "maps_ahead", "maps_eager", "unmaps", "reclaims", "adoptions", "waits", "background_failures")


def _make(name: str, arguments: argparse.Namespace, max_seq_len: int, cost: StepCost) -> Cache:
    pool_tokens = int(arguments.pool_gib * 2**30) // cost.token_bytes
    if name == "static":
        return CountedCache.static(pool_tokens, max_seq_len, num_slots=arguments.num_slots)
    if name == "paged":
        return CountedCache.paged(pool_tokens, num_slots=arguments.num_slots, watermark_share=_WATERMARK_SHARE)
    return ManagedCache(
        pool_tokens,
        max_seq_len,
        num_slots=arguments.num_slots,
        watermark_share=_WATERMARK_SHARE,
        background=name == "ours",
        reclaim_below=arguments.reclaim_below,
        eager_slots=arguments.eager_slots,
        eager_tokens=arguments.eager_tokens,
    )


def _memory_row(found: Replay, trace: Trace, cache: Cache, cost: StepCost, pool_gib: float) -> dict[str, Any]:
    steps = found.steps
    waiting = steps.waiting > 0
    mapped = steps.mapped_pages * cache.page_tokens  # in tokens
    attached = (steps.mapped_pages + steps.spare_pages) * cache.page_tokens
    filled = steps.tokens * cost.token_bytes / (pool_gib * 2**30)
    generated = int(trace.generated_tokens.sum())
    return {
        "steps": len(steps.seconds),
        "batch_max": int(steps.batch.max()),
        "batch_mean": found.mean(steps.batch),
        "batch_mean_waiting": found.mean(steps.batch, waiting),
        "waiting_max": int(steps.waiting.max()),
        "waste": found.mean((mapped - steps.tokens) / steps.tokens),
        "waste_with_spare": found.mean((attached - steps.tokens) / steps.tokens),
        "pool_filled": found.mean(filled),
        "pool_filled_waiting": found.mean(filled, waiting),
        "preemptions": found.preemptions,
        "recomputed_tokens": found.recomputed_tokens,
        "generated_per_second": generated / found.total_seconds,
        "total_seconds": found.total_seconds,
        "first_token_mean": float(found.first_token_seconds.mean()),
        "first_token_p99": float(np.quantile(found.first_token_seconds, 0.99)),
    }


def _pages_row(found: Replay, trace: Trace, cache: ManagedCache) -> dict[str, Any]:
    counts, steps = cache.counts(), found.steps
    maps = counts["maps_needed"] + counts["maps_ahead"] + counts["maps_eager"]
    work = np.diff(maps, prepend=0) * _MAP_SECONDS + np.diff(counts["unmaps"], prepend=0) * _UNMAP_SECONDS
    request_pages = float(pages_for(trace.cached_tokens, cache.page_tokens).mean())
    warm_pages = (len(trace) - found.warm_finished) * request_pages

    def warm_share(values: np.ndarray) -> float | None:
        return float(values[-1] - values[found.warm_step - 1]) / warm_pages if warm_pages else None

    timing = Timing.of(cache.step_seconds)
    return {
        **{name: int(values[-1]) for name, values in counts.items()},
        "pages_total": cache.pages_total,
        "pages_lost": cache.pages_lost,
        "request_pages_mean": request_pages,
        "warm_maps_share": warm_share(maps),
        "warm_maps_needed_share": warm_share(counts["maps_needed"]),
        "warm_unmaps_share": warm_share(counts["unmaps"]),
        "retained_share": found.mean((steps.spare_pages + steps.parked_pages) / cache.pages_total),
        "parked_share": found.mean(steps.parked_pages / cache.pages_total),
        "stall_share": float(steps.stall_seconds.sum() / steps.seconds.sum()),
        "mapper_mean_share": float(work.sum() / steps.seconds.sum()),
        "mapper_worst_share": float((work / steps.seconds).max()),
        **_times(timing),
    }


def _times(timing: Timing) -> dict[str, Any]:
    return {
        "median_us": timing.median * 1e6,
        "p99_us": timing.quantile(0.99) * 1e6,
        "worst_us": timing.worst * 1e6,
        "calls": len(timing.seconds),
    }


def _time_steps(steps: int, num_slots: int, num_layers: int, form: _Form, growing: int) -> dict[str, Any]:
    """`step` with all slots live, of which `growing` get a page in every step.

    A slot grows by a token a step, so that 16 times as many grow; the others keep their length.
    """
    decoding = growing * _PAGE_TOKENS
    reach = 2 * _PAGE_TOKENS + (steps + _STEP_WARMUP if growing else 0)
    spec = KVCacheSpec(
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=_HOST_PAGE_BYTES // _PAGE_TOKENS // (4 * 2 * 2),  # of 4 layers: K and V, bfloat16
        num_slots=num_slots,
        max_seq_len=reach + 2 * _PAGE_TOKENS,
        page_bytes=_HOST_PAGE_BYTES * num_layers // 4,
    )
    # Twice what is needed, so that nothing has to be reclaimed.
    pool_bytes = 2 * (decoding * spec.pages_for(reach) + num_slots) * spec.page_bytes
    device = jax.local_devices(backend="cpu")[0]
    with KVCacheManager(spec, pool_bytes=pool_bytes, device=device) as manager:
        slots = np.array([manager.allocate() for _ in range(num_slots)])
        lengths = np.zeros(num_slots, np.int32)
        # Evenly spread over the tokens of a page.
        lengths[slots] = 1 + np.arange(num_slots) % _PAGE_TOKENS
        manager.finish(manager.step(lengths))

        def step() -> float:
            named = slots if form == "mapping" else slots[:decoding]
            wanted = lengths if form == "array" else dict(zip(named.tolist(), lengths[named].tolist(), strict=True))
            start = perf_counter()
            cache = manager.step(wanted)
            seconds = perf_counter() - start
            manager.finish(cache)
            manager.sync()
            lengths[slots[:decoding]] += 1
            return seconds

        timing = Timing.of([step() for _ in range(_STEP_WARMUP + steps)][_STEP_WARMUP:])
    row = {"slots": num_slots, "num_layers": num_layers, "form": form, "decoding": decoding, "growing": growing}
    return row | _times(timing)
