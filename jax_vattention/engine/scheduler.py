"""Which requests run, and what the next program does for them. Policy only: no array is touched here."""

from __future__ import annotations

import collections
import dataclasses

from jax_vattention.engine.request import Sequence
from jax_vattention.errors import OutOfPagesError
from jax_vattention.manager import KVCacheManager


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next `count` pending tokens of a sequence."""

    sequence: Sequence
    count: int


class Scheduler:
    """First come, first served, with prefill before decode.

    A request runs once it has a row of the batch and a slot of the cache. When the pool runs out of pages the
    request that came last is preempted: it loses its slot and starts over later, with the tokens that it has.

    Args:
      manager: of the cache.
      max_batch: rows of the batch.
      prefill_tokens: most prompt tokens of one program.
      decode_tokens: most tokens that one decode program adds to a request.
    """

    def __init__(self, manager: KVCacheManager, *, max_batch: int, prefill_tokens: int, decode_tokens: int):
        self._manager = manager
        self._rows = list(range(max_batch - 1, -1, -1))
        self._prefill_tokens = prefill_tokens
        self._decode_tokens = decode_tokens
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []  # in order of arrival

    def add(self, sequence: Sequence) -> None:
        """Queues a request."""
        self._waiting.append(sequence)

    @property
    def idle(self) -> bool:
        """No request waits or runs."""
        return not self._waiting and not self._running

    def next_prefill(self) -> list[Chunk]:
        """The chunks of the next prefill program, in order of rows; empty when all that run are in decode."""
        self._admit()
        budget = self._prefill_tokens
        chunks = []
        for sequence in self._running:
            # A sequence is in decode when one token, the last that was sampled, is pending.
            if budget and (sequence.pending > 1 or sequence.cached == 0):
                count = min(sequence.pending, budget)
                chunks.append(Chunk(sequence, count))
                budget -= count
        return sorted(chunks, key=lambda chunk: chunk.sequence.row or 0)

    def next_decode(self) -> list[Sequence]:
        """The sequences of the next decode program: all that run."""
        return list(self._running)

    def lengths(self, sequences: list[Sequence], tokens: list[int]) -> dict[int, int]:
        """What `KVCacheManager.step` must back so that each sequence can add this many tokens to the cache."""
        return {s.slot: s.cached + count for s, count in zip(sequences, tokens, strict=True) if s.slot is not None}

    def seq_lens(self, sequences: list[Sequence]) -> dict[int, int]:
        """Tokens that the cache holds of each, so that what is behind a sliding window can be given back."""
        return {s.slot: s.cached for s in sequences if s.slot is not None}

    def next_lengths(self, sequences: list[Sequence], tokens: list[int]) -> dict[int, int]:
        """What the step after that will probably have to back, for the manager to map meanwhile."""
        found = {}
        for sequence, count in zip(sequences, tokens, strict=True):
            if sequence.slot is None:
                continue
            pending = sequence.pending - count
            more = min(pending, self._prefill_tokens) if pending > 0 else self._decode_tokens
            # The last token that is generated is never written.
            most = len(sequence.tokens) + sequence.tokens_left - 1
            found[sequence.slot] = min(sequence.cached + count + more, most)
        return found

    def preempt(self, error: OutOfPagesError) -> None:
        """Takes the slot of the request that came last, so that the others can go on.

        Raises:
          OutOfPagesError: it is the only one; the pool is too small for it.
        """
        if len(self._running) == 1:
            raise error
        sequence = self._running.pop()
        self._leave(sequence)
        sequence.cached = 0
        self._waiting.appendleft(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a request that runs."""
        self._running.remove(sequence)
        self._leave(sequence)

    def abort(self) -> None:
        """Drops all requests, so that the cache can be used again or closed."""
        self._waiting.clear()
        while self._running:
            self._leave(self._running.pop())

    def _admit(self) -> None:
        free_pages = self._manager.stats().pages_available - sum(map(self._missing_pages, self._running))
        while self._waiting and self._rows:
            sequence = self._waiting[0]
            needed = self._missing_pages(sequence)
            # Not into a pool that it would only be preempted from; unless nothing runs that could make room.
            if needed > free_pages and self._running:
                return
            free_pages -= needed
            self._waiting.popleft()
            sequence.row = self._rows.pop()
            sequence.slot = self._manager.allocate(len(sequence.tokens) + sequence.tokens_left - 1)
            self._running.append(sequence)

    def _missing_pages(self, sequence: Sequence) -> int:
        """Pages that it needs to be prefilled and to decode once, without those that it has."""
        spec = self._manager.spec
        reach = len(sequence.tokens) - 1 + min(self._decode_tokens + 1, sequence.tokens_left)
        return spec.pages_for(reach) - spec.pages_for(sequence.cached)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._manager.free(sequence.slot)
        if sequence.row is not None:
            self._rows.append(sequence.row)
        sequence.row = sequence.slot = None
