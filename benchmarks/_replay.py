"""Replays a request trace against KV caches: a serving loop with simulated step times, and two caches that only count.

The loop is that of a server with continuous batching and chunked prefill. No model runs and no memory is touched here:
a cache says which pages it needs, and the length of a step comes from `StepCost`.
"""

from __future__ import annotations

import csv
import dataclasses
import heapq
import os
from array import array
from typing import NamedTuple, Protocol

import numpy as np

from jax_vattention.errors import OutOfPagesError

QUANTILE = 0.9
"""Of the generated lengths seen so far: what a request is expected to generate."""

_WARM_SHARE = 0.1  # of the requests: once so many have finished, a cache counts as warm


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in order of arrival. Arrays are `[requests]`."""

    arrivals: np.ndarray
    """Seconds since the first one."""
    prompt_tokens: np.ndarray
    generated_tokens: np.ndarray

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens.

        Raises:
          ValueError: there are no such columns, no rows, or the rows are not in order of arrival.
        """
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        if not rows or not set(columns) <= rows[0].keys():
            found = list(rows[0]) if rows else "no rows"
            raise ValueError(f"{path}: expected rows with the columns {', '.join(columns)}, got {found}")
        times = np.array([row["TIMESTAMP"] for row in rows], "datetime64[ns]")
        trace = cls(
            (times - times[0]).astype(np.int64) / 1e9,
            np.array([row["ContextTokens"] for row in rows], np.int64),
            np.array([row["GeneratedTokens"] for row in rows], np.int64),
        )
        if (np.diff(trace.arrivals) < 0).any():
            raise ValueError(f"{path}: expected rows in order of TIMESTAMP; sort them")
        if min(trace.prompt_tokens.min(), trace.generated_tokens.min()) < 1:
            raise ValueError(f"{path}: expected at least one token in every prompt and every answer")
        return trace

    @property
    def total_tokens(self) -> np.ndarray:
        """Of each request, prompt and answer."""
        return self.prompt_tokens + self.generated_tokens

    @property
    def cached_tokens(self) -> np.ndarray:
        """Most tokens that the cache holds of each request: the last token that is generated is never written."""
        return self.total_tokens - 1

    def __len__(self) -> int:
        return len(self.arrivals)

    def take(self, chosen: np.ndarray | slice) -> Trace:
        """Some of the requests."""
        return Trace(self.arrivals[chosen], self.prompt_tokens[chosen], self.generated_tokens[chosen])


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Simulated duration of a step: a base, and what prompt tokens and reading K and V add.

    The figures are those of Llama-3-8B in bfloat16 on one H100 80GB. A whole decode step of that shape took 6.0 ms at
    batch 1 and 13.6 ms at batch 128 with 1,024 tokens of context each; these figures say 6.5 and 13.7 ms. To add the
    parts is pessimistic for mixed steps, in which prompt tokens share the reading of the weights; it is so for all
    caches alike.
    """

    base_seconds: float = 16e9 / 2.5e12
    """16 GB of weights, read at 2.5 TB/s."""
    prefill_tokens_per_second: float = 37_800.0
    """vLLM 0.26, a prompt of 8,192 tokens in 217 ms."""
    token_bytes: int = 128 * 1024
    """K and V of a token: 32 layers, 8 heads of 128 for K and as many for V, 2 bytes each."""
    kv_bytes_per_second: float = 2.4e12
    """At which a decode step at batch 64 to 128 reads memory."""

    def seconds(self, prefill_tokens: int, kv_tokens: int) -> float:
        """Of a step with so many prompt tokens, whose queries read so many cached tokens in all."""
        reading = kv_tokens * self.token_bytes / self.kv_bytes_per_second
        return self.base_seconds + prefill_tokens / self.prefill_tokens_per_second + reading


class Held(NamedTuple):
    """Pages of a cache during a step."""

    mapped: int
    """Granted to live requests."""
    spare: int = 0
    """Attached to slots of live requests, but not granted."""
    parked: int = 0
    """Attached to slots without a request."""
    stall_seconds: float = 0.0
    """How long the step had to wait for memory, simulated."""


class Cache(Protocol):
    """What the serving loop asks of a KV cache. Its unit is the page, of `page_tokens` tokens of one request."""

    num_slots: int
    page_tokens: int
    pages_total: int
    watermark: int
    """Pages that stay free when a request is admitted, for those that run to grow."""

    def pages_available(self) -> int:
        """Pages that can be granted now."""

    def allocate(self, expected_tokens: int | None) -> int:
        """A slot for a request that will probably have so many tokens. None: nobody knows."""

    def step(self, lengths: np.ndarray, next_lengths: np.ndarray) -> Held:
        """Backs the tokens of a step.

        Args:
          lengths: int32 `[num_slots]`, the tokens of each slot at the end of the step; 0 where there is no request.
          next_lengths: the same for the step after it, as far as a server can know.

        Raises:
          OutOfPagesError: the pool is out of pages. Nothing has changed.
        """

    def free(self, slot: int) -> None:
        """Ends the request of a slot."""


class CountedCache:
    """A cache that is only counted: pages of equal size, given out one at a time and taken back with the request.

    With pages of 16 tokens it is PagedAttention's (vLLM calls a page a block, and keeps 1% of them free when it admits
    a request; arXiv 2309.06180). With one page of `max_seq_len` tokens for each request it is a static cache.
    """

    def __init__(self, pool_tokens: int, page_tokens: int, *, num_slots: int, watermark_share: float = 0.0):
        self.page_tokens = page_tokens
        self.pages_total = pool_tokens // page_tokens
        self.num_slots = num_slots
        self.watermark = -int(-watermark_share * self.pages_total // 1)
        self._idle = list(range(num_slots))  # a heap: low slots first
        self._pages = np.zeros(num_slots, np.int64)
        self._mapped = 0

    @classmethod
    def static(cls, pool_tokens: int, max_seq_len: int, *, num_slots: int) -> CountedCache:
        """Every request takes `max_seq_len` tokens of memory."""
        return cls(pool_tokens, max_seq_len, num_slots=num_slots)

    @classmethod
    def paged(cls, pool_tokens: int, *, num_slots: int, watermark_share: float) -> CountedCache:
        """Pages of 16 tokens, vLLM's default."""
        return cls(pool_tokens, 16, num_slots=num_slots, watermark_share=watermark_share)

    def pages_available(self) -> int:
        """Pages that no request has."""
        return self.pages_total - self._mapped

    def allocate(self, expected_tokens: int | None) -> int:
        """Takes an idle slot."""
        return heapq.heappop(self._idle)

    def step(self, lengths: np.ndarray, next_lengths: np.ndarray) -> Held:
        """See `Cache.step`."""
        pages = np.maximum(self._pages, pages_for(lengths, self.page_tokens))
        mapped = int(pages.sum())
        if mapped > self.pages_total:
            raise OutOfPagesError(f"needed {mapped} pages, there are {self.pages_total}: free a slot")
        self._pages, self._mapped = pages, mapped
        return Held(mapped)

    def free(self, slot: int) -> None:
        """Gives its pages back."""
        self._mapped -= int(self._pages[slot])
        self._pages[slot] = 0
        heapq.heappush(self._idle, slot)


def pages_for(tokens: np.ndarray, page_tokens: int) -> np.ndarray:
    """Pages of `page_tokens` tokens that hold `tokens` tokens of one request, for each element."""
    return -(-tokens // page_tokens)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What every step of a replay was. Arrays are `[steps]`."""

    started: np.ndarray
    """Simulated seconds since the first arrival."""
    seconds: np.ndarray
    batch: np.ndarray
    waiting: np.ndarray
    """Requests that had arrived and did not run."""
    prefill_tokens: np.ndarray
    tokens: np.ndarray
    """In the cache, at the end of the step."""
    mapped_pages: np.ndarray
    spare_pages: np.ndarray
    parked_pages: np.ndarray
    stall_seconds: np.ndarray
    """Part of `seconds`."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found."""

    steps: Steps
    first_token_seconds: np.ndarray
    """Of each request, from its arrival to its first token."""
    preemptions: int
    recomputed_tokens: int
    """That preempted requests had in the cache."""
    warm_step: int
    """The first step after a tenth of the requests had finished."""
    warm_finished: int
    """Requests that had finished then."""

    @property
    def total_seconds(self) -> float:
        """From the first arrival to the end of the last step, simulated."""
        return float(self.steps.started[-1] + self.steps.seconds[-1])

    def mean(self, values: np.ndarray, chosen: np.ndarray | None = None) -> float | None:
        """Mean of a figure over simulated time in steps: all, or the `chosen` ones. None if there are none."""
        weights = self.steps.seconds if chosen is None else self.steps.seconds * chosen
        total = weights.sum()
        return float((values * weights).sum() / total) if total else None


def replay(
    trace: Trace,
    cache: Cache,
    *,
    rate: float = float("inf"),
    prefill_tokens: int = 2048,
    cost: StepCost | None = None,
) -> Replay:
    """Serves all requests of a trace, first come, first served.

    A step gives one token to every request in decode, and up to `prefill_tokens` prompt tokens to the others, in order
    of arrival. Requests that wait are admitted while some of those are left, and while the pages of the whole prompt
    are available beside the watermark and what the running requests need in this step. If the cache runs out all the
    same, the request that came last loses its pages and starts over later, with the tokens that it has.

    Args:
      trace: requests.
      cache: fresh, or left with all slots freed.
      rate: how much faster than in the trace requests arrive; infinite: all are there from the start.
      prefill_tokens: most prompt tokens of a step.
      cost: of a step.

    Raises:
      ValueError: a request does not fit into the cache even alone.
    """
    return _Server(trace, cache, rate, prefill_tokens, cost or StepCost()).run()


class _Server:
    """State of one replay.

    A request knows `known` tokens (its prompt, and those generated so far), of which the cache holds `cached`. It is in
    decode when one, the last that was generated, is left to cache; once all are cached a step yields the next one.
    Requests run and wait in order of arrival, and all that run came before all that wait.
    """

    def __init__(self, trace: Trace, cache: Cache, rate: float, prefill_tokens: int, cost: StepCost):
        worst = int(pages_for(trace.cached_tokens, cache.page_tokens).max())
        if worst > cache.pages_total or cache.num_slots < 1:
            raise ValueError(
                f"a request needs {worst} pages of {cache.page_tokens} tokens, and there are {cache.pages_total} for "
                f"{cache.num_slots} slots: enlarge the pool"
            )
        self._trace, self._cache, self._cost, self._budget = trace, cache, cost, prefill_tokens
        self._arrivals = trace.arrivals / rate
        self._known = trace.prompt_tokens.copy()
        self._cached = np.zeros(len(trace), np.int64)
        self._running = np.empty(0, np.int64)  # requests
        self._slots = np.empty(0, np.int64)  # of those
        self._preempted: list[int] = []  # the last one came first
        self._next = 0  # the first request that never ran
        self._now = 0.0
        self._lengths = np.zeros(cache.num_slots, np.int32)
        self._next_lengths = np.zeros(cache.num_slots, np.int32)
        self._finished = 0
        # Of finished requests: how many generated so many tokens.
        self._generated_counts = np.zeros(int(trace.generated_tokens.max()) + 1, np.int64)
        self._first_token = np.full(len(trace), np.nan)
        self._preemptions = self._recomputed = 0
        self._warm_step: int | None = None
        self._warm_finished = 0
        self._steps = array("d")  # rows, in the order of the fields of Steps

    def run(self) -> Replay:
        """Runs until all requests have finished."""
        count = len(self._trace)
        steps = 0
        while self._finished < count:
            if not self._running.size and not self._preempted:
                self._now = max(self._now, float(self._arrivals[self._next]))  # idle until then
            if self._warm_step is None and self._finished >= _WARM_SHARE * count:
                self._warm_step, self._warm_finished = steps, self._finished
            self._step()
            steps += 1
        table = np.frombuffer(self._steps).reshape(steps, -1).T
        return Replay(
            Steps(*table),
            self._first_token - self._arrivals,
            self._preemptions,
            self._recomputed,
            steps if self._warm_step is None else self._warm_step,
            count if self._warm_step is None else self._warm_finished,
        )

    def _step(self) -> None:
        chunks, prefill = self._chunks()
        arrived = int(np.searchsorted(self._arrivals, self._now, side="right"))
        if arrived > self._next or self._preempted:
            chunks = self._admit(arrived, chunks, self._budget - prefill)
        held, chunks = self._grow(chunks)
        running, cached = self._running, self._cached[self._running]
        in_prefill = (self._known[running] - cached > 1) | (cached == 0)
        cached += chunks
        self._cached[running] = cached
        prefill = int(chunks[in_prefill].sum())
        # Each row with queries reads its keys and values once.
        seconds = self._cost.seconds(prefill, int(cached[chunks > 0].sum())) + held.stall_seconds
        waiting = arrived - self._next + len(self._preempted)
        row = (self._now, seconds, running.size, waiting, prefill, int(cached.sum()), *held)
        self._steps.extend(row)
        self._now += seconds
        self._sample(running, cached)

    def _chunks(self) -> tuple[np.ndarray, int]:
        """Tokens that each running request adds in this step, and how many of them count as prompt tokens."""
        cached = self._cached[self._running]
        pending = self._known[self._running] - cached
        in_prefill = (pending > 1) | (cached == 0)
        if not in_prefill.any():
            return pending, 0
        wanted = np.where(in_prefill, pending, 0)
        before = np.cumsum(wanted) - wanted
        granted = np.clip(self._budget - before, 0, wanted)
        return np.where(in_prefill, granted, 1), int(granted.sum())

    def _admit(self, arrived: int, chunks: np.ndarray, budget: int) -> np.ndarray:
        """Gives slots to waiting requests while there is memory; chunks with theirs at the end."""
        cache, page_tokens = self._cache, self._cache.page_tokens
        batch = self._running.size
        if budget <= 0 or batch >= cache.num_slots:
            return chunks
        cached = self._cached[self._running]
        growth = int((pages_for(cached + chunks, page_tokens) - pages_for(cached, page_tokens)).sum())
        available = cache.pages_available() - growth - cache.watermark
        admitted: list[tuple[int, int, int]] = []  # request, slot, chunk
        while budget > 0 and batch + len(admitted) < cache.num_slots:
            if self._preempted:
                request = self._preempted[-1]
            elif self._next < arrived:
                request = self._next
            else:
                break
            tokens = int(self._known[request])
            needed = -(-tokens // page_tokens)
            # Not into a pool that it would only be preempted from; unless nothing runs that could make room.
            if needed > available and (batch or admitted):
                break
            if self._preempted:
                self._preempted.pop()
            else:
                self._next += 1
            chunk = min(tokens, budget)
            admitted.append((request, cache.allocate(self._expected(request)), chunk))
            available -= needed
            budget -= chunk
        if not admitted:
            return chunks
        requests, slots, more = np.array(admitted, np.int64).T
        self._running = np.concatenate([self._running, requests])
        self._slots = np.concatenate([self._slots, slots])
        return np.concatenate([chunks, more])

    def _expected(self, request: int) -> int | None:
        """Tokens that a request will probably have. Only requests that have finished are asked how long they got."""
        if not self._finished:
            return None
        generated = int(np.searchsorted(np.cumsum(self._generated_counts), QUANTILE * self._finished))
        return int(max(self._trace.prompt_tokens[request] + generated, self._known[request] + 1))

    def _grow(self, chunks: np.ndarray) -> tuple[Held, np.ndarray]:
        """Backs the tokens of the step; preempts until they fit."""
        while True:
            reach = self._cached[self._running] + chunks
            pending = self._known[self._running] - reach
            self._lengths[self._slots] = reach
            # Whether a request ends with the token of this step, a server does not know before it is over.
            self._next_lengths[self._slots] = reach + np.clip(pending, 1, max(1, self._budget))
            try:
                return self._cache.step(self._lengths, self._next_lengths), chunks
            except OutOfPagesError as error:
                if self._running.size == 1:
                    raise ValueError("a request does not fit into the cache alone: enlarge the pool") from error
                self._preempt_last()
                chunks = chunks[:-1]

    def _preempt_last(self) -> None:
        request = int(self._running[-1])
        self._leave(np.array([self._running.size - 1]))
        self._preempted.append(request)
        self._preemptions += 1
        self._recomputed += int(self._cached[request])
        self._cached[request] = 0

    def _leave(self, places: np.ndarray) -> None:
        """Frees the slots of running requests, given by their places among those that run."""
        for slot in self._slots[places].tolist():
            self._cache.free(slot)
            self._lengths[slot] = self._next_lengths[slot] = 0
        self._running = np.delete(self._running, places)
        self._slots = np.delete(self._slots, places)

    def _sample(self, running: np.ndarray, cached: np.ndarray) -> None:
        """Gives a token to each request whose tokens are all cached, and ends those that have their last."""
        trace = self._trace
        sampled = running[cached == self._known[running]]
        self._known[sampled] += 1
        first = sampled[self._known[sampled] == trace.prompt_tokens[sampled] + 1]
        self._first_token[first] = self._now
        places = np.flatnonzero(self._known[running] == trace.prompt_tokens[running] + trace.generated_tokens[running])
        if places.size:
            done = running[places]
            np.add.at(self._generated_counts, trace.generated_tokens[done], 1)
            self._finished += places.size
            self._leave(places)
