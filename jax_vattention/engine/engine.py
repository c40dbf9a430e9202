"""Generates tokens for many requests at once: a host loop around the manager and two jitted programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jax_vattention.cache import KVCache
from jax_vattention.engine.programs import Model, Programs, Rows
from jax_vattention.engine.request import FinishReason, Output, Request, Sequence
from jax_vattention.engine.scheduler import Chunk, Scheduler
from jax_vattention.errors import OutOfPagesError, SequenceTooLongError
from jax_vattention.manager import KVCacheManager
from jax_vattention.spec import KVCacheSpec

_SMALLEST_PREFILL = 16  # tokens; prefill programs are compiled for powers of two from here


class Engine:
    """Continuous batching over a KV cache that is mapped on demand.

    Args:
      model: an `nnx.Module` as `programs.Model` describes; its weights are on `device`.
      spec: dimensions of the cache. `spec.num_slots` must cover `max_batch`.
      eos_ids: tokens that end a request.
      max_batch: most requests that run at once; programs are compiled for this many rows.
      prefill_tokens: most prompt tokens of one prefill program; longer prompts are prefilled in chunks.
      decode_tokens: tokens that one decode program generates for each request.
      pool_bytes, pool_share, device, strict: as `KVCacheManager` takes them; half of the free memory by default.
      kv_scales: of a float8 cache, likewise.

    Raises:
      ValueError: a size is not positive, there are fewer slots than rows, or the scales do not fit the cache.
    """

    def __init__(
        self,
        model: Model,
        spec: KVCacheSpec,
        *,
        eos_ids: Iterable[int] = (),
        max_batch: int = 8,
        prefill_tokens: int = 256,
        decode_tokens: int = 8,
        pool_bytes: int | None = None,
        pool_share: float | None = None,
        device: jax.Device | None = None,
        strict: bool = False,
        kv_scales: Any = None,
    ):
        for name, value in (("prefill_tokens", prefill_tokens), ("decode_tokens", decode_tokens)):
            if value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 < max_batch <= spec.num_slots:
            raise ValueError(f"max_batch: expected 1 to num_slots={spec.num_slots}, got {max_batch}")
        if pool_bytes is None and pool_share is None:
            pool_share = 0.5
        self.manager = KVCacheManager(
            spec, pool_bytes=pool_bytes, pool_share=pool_share, device=device, strict=strict, kv_scales=kv_scales
        )
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._closed = False
        self._spec = spec
        self._eos_ids = frozenset(eos_ids)
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._decode_tokens = decode_tokens
        self._programs = Programs(model, eos_ids=self._eos_ids, decode_tokens=decode_tokens, device=self.manager.device)

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling so far; it is in neither `prefill_seconds` nor `decode_seconds`."""
        return self._programs.compile_seconds

    def generate(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Runs requests to their end and yields tokens as they come.

        Raises:
          SequenceTooLongError: a prompt leaves no room for a token below `max_seq_len`.
          OutOfPagesError: the pool is too small for one of the requests alone.
        """
        scheduler = Scheduler(
            self.manager,
            max_batch=self._max_batch,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
        )
        for index, request in enumerate(requests):
            scheduler.add(Sequence(index, self._fitted(index, request), list(request.prompt_ids)))
        try:
            while not scheduler.idle:
                chunks = scheduler.next_prefill()
                yield from self._prefill(scheduler, chunks) if chunks else self._decode(scheduler)
        finally:
            if not self._closed:
                scheduler.abort()

    def close(self) -> None:
        """Gives the cache's memory back, also of requests under way. Closing twice is no error."""
        self.manager.close()
        self._closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, exception_type: Any, *_: Any) -> None:
        # An error on its way out keeps its frames, and with them its caches, alive. The memory goes when they do.
        if exception_type is None:
            self.close()

    def _fitted(self, index: int, request: Request) -> Request:
        """The request with no more tokens than the cache has positions for."""
        room = self._spec.max_seq_len - len(request.prompt_ids)
        if room <= 0:
            raise SequenceTooLongError(
                f"request {index}: its prompt has {len(request.prompt_ids)} tokens; expected fewer than "
                f"max_seq_len={self._spec.max_seq_len}"
            )
        # The last token that is generated is never written to the cache, but it has a position.
        return Request(request.prompt_ids, min(request.max_tokens, room), request.temperature, request.seed)

    def _prefill(self, scheduler: Scheduler, chunks: list[Chunk]) -> Iterator[Output]:
        cache = self._step(scheduler, [c.sequence for c in chunks], [c.count for c in chunks])
        if cache is None:
            return
        rows = self._rows([chunk.sequence for chunk in chunks])
        (drawn,), seconds = self._run(self._programs.prefill, cache, rows, *self._pack(chunks))
        del cache  # a generator that waits in a yield must not keep the view alive
        self.prefill_seconds += seconds
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
            if chunk.sequence.pending == 0:
                yield from self._add(scheduler, chunk.sequence, [int(drawn[chunk.sequence.row])])

    def _decode(self, scheduler: Scheduler) -> Iterator[Output]:
        sequences = scheduler.next_decode()
        counts = [min(self._decode_tokens, sequence.tokens_left) for sequence in sequences]
        cache = self._step(scheduler, sequences, counts)
        if cache is None:
            return
        tokens = np.zeros(self._max_batch, np.int32)
        for sequence in sequences:
            tokens[sequence.row] = sequence.tokens[-1]
        (produced, produced_counts), seconds = self._run(self._programs.decode, cache, self._rows(sequences), tokens)
        del cache
        self.decode_seconds += seconds
        for sequence in sequences:
            count = int(produced_counts[sequence.row])
            new = produced[sequence.row, :count].tolist()
            sequence.cached += count
            yield from self._add(scheduler, sequence, new)

    def _step(self, scheduler: Scheduler, sequences: list[Sequence], tokens: list[int]) -> KVCache | None:
        """The cache with room for this many more tokens of each sequence; None where one had to be preempted."""
        try:
            return self.manager.step(
                scheduler.lengths(sequences, tokens),
                seq_lens=scheduler.seq_lens(sequences),
                next_lengths=scheduler.next_lengths(sequences, tokens),
            )
        except OutOfPagesError as error:
            scheduler.preempt(error)
            return None

    def _run(
        self, program: Callable[..., tuple[jax.Array, ...]], cache: KVCache, *arguments: Any
    ) -> tuple[list[np.ndarray], float]:
        """Runs a program to its end. Returns its results, and the seconds it took without those of compiling."""
        start = time.perf_counter() - self.compile_seconds
        try:
            *results, order = program(cache, *arguments)
        except BaseException:
            # It did not start. The manager takes its own order token back, and holds no pages back for it.
            self.manager.finish(cache)
            raise
        self.manager.finish(order)
        return [np.asarray(result) for result in results], time.perf_counter() - self.compile_seconds - start

    def _pack(self, chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of chunks one after the other, where each row's chunk starts, and its length."""
        total = sum(chunk.count for chunk in chunks)
        tokens = np.zeros(_bucket(total, self._prefill_tokens), np.int32)
        q_lens = np.zeros(self._max_batch, np.int32)
        end = 0
        for chunk in chunks:
            sequence = chunk.sequence
            q_lens[sequence.row] = chunk.count
            tokens[end : end + chunk.count] = sequence.tokens[sequence.cached : sequence.cached + chunk.count]
            end += chunk.count
        # Rows without a chunk start where the one before them ends: starts must ascend.
        q_starts = np.zeros(self._max_batch, np.int32)
        q_starts[1:] = np.cumsum(q_lens)[:-1]
        return tokens, q_starts, q_lens

    def _add(self, scheduler: Scheduler, sequence: Sequence, new: list[int]) -> Iterator[Output]:
        """Takes new tokens in, ends the request where it ends, and reports."""
        sequence.tokens += new
        reason: FinishReason | None = None
        if new and new[-1] in self._eos_ids:
            reason, new = "stop", new[:-1]
        elif sequence.tokens_left <= 0:
            reason = "length"
        sequence.finish_reason = reason
        if reason is not None:
            scheduler.finish(sequence)
        if new or reason is not None:
            yield Output(sequence.index, tuple(new), reason)

    def _rows(self, sequences: list[Sequence]) -> Rows:
        size = self._max_batch
        rows = Rows(
            slots=np.zeros(size, np.int32),
            cached=np.zeros(size, np.int32),
            active=np.zeros(size, np.bool_),
            tokens_left=np.zeros(size, np.int32),
            temperatures=np.zeros(size, np.float32),
            seeds=np.zeros(size, np.uint32),
        )
        for sequence in sequences:
            row = sequence.row
            rows.slots[row] = sequence.slot
            rows.cached[row] = sequence.cached
            rows.active[row] = True
            rows.tokens_left[row] = sequence.tokens_left
            rows.temperatures[row] = sequence.request.temperature
            rows.seeds[row] = sequence.request.seed
        return rows


def _bucket(tokens: int, most: int) -> int:
    """The size of program for this many tokens: a power of two, and no more than `most`."""
    size = _SMALLEST_PREFILL
    while size < tokens:
        size *= 2
    return max(tokens, min(size, most))
