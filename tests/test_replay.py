"""The replay of `python -m benchmarks manager`: its serving loop, its simulated caches and what it counts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import manager as benchmark
from benchmarks._replay import CountedCache, StepCost, Trace, replay
from jax_vattention.errors import OutOfPagesError

# Times that are easy to add up: a second a step, 0.1 a prompt token, 0.01 a token that is read.
COST = StepCost(base_seconds=1.0, prefill_tokens_per_second=10.0, token_bytes=1, kv_bytes_per_second=100.0)


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    """From (arrival, prompt tokens, generated tokens)."""
    arrivals, prompts, generated = zip(*requests, strict=True)
    return Trace(np.array(arrivals, float), np.array(prompts), np.array(generated))


def paged(pages: int, *, watermark_share: float = 0.0, num_slots: int = 8) -> CountedCache:
    return CountedCache.paged(16 * pages, num_slots=num_slots, watermark_share=watermark_share)


def managed(pages: int, *, num_slots: int = 8, **options) -> benchmark.ManagedCache:
    return benchmark.ManagedCache(16 * pages, 1024, num_slots=num_slots, watermark_share=0.0, **options)


def test_one_request_step_by_step():
    found = replay(trace_of((5.0, 20, 3)), paged(4), prefill_tokens=16, cost=COST)
    steps = found.steps
    # Two chunks of the prompt; the second gives the first token. The last token is never written.
    assert steps.tokens.tolist() == [16, 20, 21, 22]
    assert steps.prefill_tokens.tolist() == [16, 4, 0, 0]
    assert steps.mapped_pages.tolist() == [1, 2, 2, 2]
    assert steps.seconds == pytest.approx([1 + 1.6 + 0.16, 1 + 0.4 + 0.2, 1.21, 1.22])
    assert steps.started == pytest.approx([0, 2.76, 4.36, 5.57])  # all are there from the start
    assert found.first_token_seconds == pytest.approx([4.36])
    assert found.total_seconds == pytest.approx(6.79)
    assert found.preemptions == 0


def test_requests_arrive_in_their_time():
    trace = trace_of((0.0, 4, 1), (100.0, 4, 1))
    found = replay(trace, paged(4), rate=2.0, cost=COST)
    assert found.steps.started == pytest.approx([0, 50])
    assert found.steps.batch.tolist() == [1, 1]
    assert found.first_token_seconds == pytest.approx([1.44, 1.44])
    assert replay(trace, paged(4), cost=COST).steps.batch.tolist() == [2]


def test_a_static_cache_serves_as_many_as_fit_whole():
    trace = trace_of(*[(0.0, 8, 3)] * 5)
    found = replay(trace, CountedCache.static(200, 64, num_slots=8), cost=COST)
    assert found.steps.batch.tolist() == [3, 3, 3, 2, 2, 2]
    assert found.steps.waiting.tolist() == [2, 2, 2, 0, 0, 0]
    assert found.steps.tokens.tolist() == [24, 27, 30, 16, 18, 20]
    assert (found.steps.mapped_pages * 64).tolist() == [192] * 3 + [128] * 3


def test_waiting_requests_are_admitted_in_order_and_leave_the_watermark():
    # The second needs all 3 pages that are left, and one has to stay free: it waits, and so does the one behind it.
    trace = trace_of((0.0, 16, 2), (0.0, 48, 1), (0.0, 1, 1))
    found = replay(trace, paged(4, watermark_share=0.25), cost=COST)
    assert found.steps.batch.tolist() == [1, 1, 1, 1]
    assert found.steps.tokens.tolist() == [16, 17, 48, 1]
    assert found.steps.waiting.tolist() == [2, 2, 1, 0]
    assert replay(trace, paged(4), cost=COST).steps.tokens.tolist() == [64, 18]


def test_a_cache_that_runs_out_preempts_the_last_request():
    # Each grows into a second page, and there are 3.
    found = replay(trace_of((0.0, 16, 4), (0.0, 15, 4)), paged(3), cost=COST)
    assert found.preemptions == 1
    assert found.recomputed_tokens == 16
    # The first runs alone until it is done; the other starts over, with the two tokens that it has generated.
    assert found.steps.batch.tolist() == [2, 2, 1, 1, 1, 1]
    assert found.steps.tokens.tolist() == [31, 33, 18, 19, 17, 18]
    assert found.steps.prefill_tokens.tolist() == [31, 0, 0, 0, 17, 0]
    assert found.steps.mapped_pages.max() == 3


def test_a_request_that_never_fits_is_refused():
    trace = trace_of((0.0, 60, 10))
    with pytest.raises(ValueError, match="needs 5 pages of 16 tokens, and there are 4 for 8 slots"):
        replay(trace, paged(4), cost=COST)
    assert replay(trace, paged(5), cost=COST).steps.mapped_pages.max() == 5


def test_a_counted_cache_refuses_what_it_does_not_have():
    cache = paged(3, num_slots=2)
    lengths = np.zeros(2, np.int32)
    lengths[cache.allocate(None)] = 33
    assert cache.step(lengths, lengths).mapped == 3
    lengths[cache.allocate(None)] = 1
    with pytest.raises(OutOfPagesError):
        cache.step(lengths, lengths)
    assert cache.pages_available() == 0
    cache.free(0)
    assert cache.pages_available() == 3
    lengths[0] = 0
    assert cache.step(lengths, lengths).mapped == 1


@pytest.mark.parametrize("options", [{}, {"background": False}, {"reclaim_below": 0.5}])
def test_the_manager_grants_what_a_paged_cache_counts(options):
    """In a pool that is always full: the real cache against the count, step by step."""
    rng = np.random.default_rng(0)
    trace = trace_of(*((0.0, int(rng.integers(1, 300)), int(rng.integers(1, 60))) for _ in range(60)))
    counted = replay(trace, paged(64), prefill_tokens=128).steps
    cache = managed(64, **options)
    found = replay(trace, cache, prefill_tokens=128).steps
    cache.close()
    assert found.batch.tolist() == counted.batch.tolist()
    assert found.tokens.tolist() == counted.tokens.tolist()
    assert found.mapped_pages.tolist() == counted.mapped_pages.tolist()
    assert (found.mapped_pages + found.spare_pages + found.parked_pages <= 64).all()
    assert found.mapped_pages.max() > 55
    assert cache.pages_lost == 0
    assert cache.counts()["background_failures"][-1] == 0
    assert cache.counts()["unmaps"][-1] > 0


def stable_load(cache: benchmark.ManagedCache) -> dict:
    """Forty requests of 7 pages, one at a time."""
    trace = trace_of(*((100.0 * i, 100, 10) for i in range(40)))
    found = replay(trace, cache, rate=1.0)
    cache.close()
    return benchmark._pages_row(found, trace, cache)


def test_a_stable_load_maps_nothing_once_warm_and_the_measure_can_fail():
    row = stable_load(managed(64))
    assert (row["warm_maps_share"], row["warm_unmaps_share"], row["adoptions"]) == (0, 0, 39)
    assert (row["pages_lost"], row["background_failures"]) == (0, 0)
    row = stable_load(managed(64, background=False))
    assert (row["warm_maps_share"], row["warm_unmaps_share"], row["adoptions"]) == (1, 1, 0)
    assert row["stall_share"] > 0


def lose_in_the_books(manager) -> None:
    manager._pages_free -= 1


def lose_in_the_pool(manager) -> None:
    manager._buffers[0].map([(manager.spec.num_slots * manager.spec.slot_pages - 1, 1, 1)])


def leak(manager) -> None:
    manager.step({manager.allocate(): 1})


@pytest.mark.parametrize("damage", [lose_in_the_books, lose_in_the_pool, leak])
def test_a_broken_cache_is_noticed(damage):
    cache = managed(64)
    step, calls = cache.step, []

    def damaged(lengths, next_lengths):
        held = step(lengths, next_lengths)
        calls.append(held)
        if len(calls) == 20:
            damage(cache.manager)
        return held

    cache.step = damaged
    assert stable_load(cache)["pages_lost"] > 0


def test_waste_counts_what_is_granted_and_not_filled():
    trace = trace_of((0.0, 40, 2))
    rows = {}
    for name, cache in {"paged": paged(8), "static": CountedCache.static(128, 128, num_slots=2)}.items():
        found = replay(trace, cache, cost=StepCost(1.0, np.inf, 1, np.inf))
        rows[name] = benchmark._memory_row(found, trace, cache, StepCost(token_bytes=2**20), 0.125)
    # 40 and then 41 tokens, a second each, in 3 pages of 16 or one of 128.
    assert rows["paged"]["waste"] == pytest.approx((8 / 40 + 7 / 41) / 2)
    assert rows["static"]["waste"] == pytest.approx((88 / 40 + 87 / 41) / 2)
    assert rows["paged"]["pool_filled"] == pytest.approx(40.5 / 128)
    assert rows["paged"]["waste_with_spare"] == rows["paged"]["waste"]


def test_spare_pages_of_live_requests_are_reported_apart():
    cache = managed(64)
    trace = trace_of((0.0, 160, 1), (100.0, 16, 1))  # the second inherits ten pages, and needs one
    found = replay(trace, cache, rate=1.0, cost=COST)
    cache.close()
    # With the page that was mapped ahead for the first.
    assert (found.steps.mapped_pages.tolist(), found.steps.spare_pages.tolist()) == ([10, 1], [1, 10])
    row = benchmark._memory_row(found, trace, cache, StepCost(), 1.0)
    assert row["waste"] == 0
    assert row["waste_with_spare"] == pytest.approx(np.average([1 / 10, 10 / 1], weights=[18.6, 2.76]), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no rows"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,3\n", "expected rows with the columns .*GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,0\n", "at least one token"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,1\n2023-11-16 18:15:45,3,1\n",
            "in order of TIMESTAMP",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace.read(path)


def test_the_sample_is_read_as_it_is_written():
    trace = Trace.read(benchmark._SAMPLE)
    assert len(trace) == 500
    assert (trace.arrivals[0], trace.prompt_tokens[0], trace.generated_tokens[0]) == (0, 374, 44)
    assert trace.arrivals[1] == pytest.approx(50.995169 - 46.680590)


def test_the_benchmark_on_the_sample(tmp_path, capsys):
    """As a user runs it, with a trace that lies elsewhere."""
    trace, result = tmp_path / "trace.csv", tmp_path / "report.json"
    shutil.copy(benchmark._SAMPLE, trace)
    assert command.main(["manager", "--trace", str(trace), "--steps", "3", "--json", str(result)]) == 0
    assert "**Three caches in the same memory**" in capsys.readouterr().out
    text = result.read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert (report["command"], report["settings"]["trace"]) == (
        "python -m benchmarks manager --trace trace.csv --steps 3",
        "trace.csv",
    )
    memory, pages, steps = (table["rows"] for table in report["tables"])
    for load in ("1", "saturated"):
        static, counted, ours = (row for row in memory if row["load"] == load)
        assert ours["waste"] < 0.04
        assert ours["batch_max"] == counted["batch_max"] >= static["batch_max"]
        assert ours["waste_with_spare"] > ours["waste"]
        assert static["waste"] > 5
    assert [(row["pages_lost"], row["background_failures"]) for row in pages] == [(0, 0)] * 2
    assert pages[0]["unmaps"] == 0  # there is room
    assert {row["slots"] for row in steps} == {64, 256, 1024}
