"""How prefill attention is split into tiles of queries, and in which order these are dealt out.

The row of all tokens of a batch is cut into tiles, request by request; those that see most keys come first. Between
requests are padding tokens, whose results are zeros: `Schedule.gaps`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

FIELDS = 32
"""int32 of a row of `Schedule.tiles`: copies take a multiple of 128 bytes."""
_BOX = 8
"""Tiles of queries begin with a multiple of it."""
_ELEMENTS = 4096
"""Comparisons that a program makes at once."""
_MOST_LINES = 8
"""Of a program: what it takes for each is short, so many programs are done sooner."""


class Schedule(NamedTuple):
    """Who does what. It depends on no layer: XLA computes it once in a program."""

    tiles: jax.Array
    """int32 `[tiles, FIELDS]`: tiles of queries, those that see most keys first; a row begins with a `Tile`."""
    gaps: jax.Array
    """int32 `[requests + 1, 2]`: first padding token and number of them, for each gap between requests."""
    counts: jax.Array
    """int32 `[3]`: rows of `tiles` and of `gaps` that are used, and tiles of keys of the former, all together."""


class Tile(NamedTuple):
    """Of one tile of queries. The first `block_q` tokens from `token` on are its rows."""

    token: Any
    low: Any
    """The first row that belongs to the request."""
    high: Any
    """One past the last."""
    position: Any
    """Of the query in row 0; less than 0 if that is none of the request."""
    prefix: Any
    """All rows see the keys before it."""
    begin: Any
    """The first key that is read: that of a run."""
    blocks: Any
    """Tiles of keys from there on; at least 1."""
    row: Any
    """Of the request's token 0 in the view."""
    kv_len: Any

    def own_rows(self, first, count: int) -> tuple[Any, Any]:
        """`(low, high)`: of so many rows from `first` on, `low .. high - 1` belong to the request."""
        return jnp.clip(self.low - first, 0, count), jnp.clip(self.high - first, 0, count)


class _Gap(NamedTuple):
    """Padding tokens between two requests, or before or behind all of them."""

    first: Any
    """Token."""
    size: Any
    """Tokens; 0 if there are none between these two."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What does not depend on the requests."""

    tokens: int
    """Of the query array."""
    padded_tokens: int
    """Of the array that tiles lie in."""
    block_q: int
    """Queries of a tile."""
    block_k: int
    """Keys of a tile."""

    def most_tiles(self, requests: int) -> int:
        """Of queries of so many requests."""
        return (self.tokens + (self.block_q + _BOX - 2) * requests) // self.block_q


def schedule(
    batch: RaggedBatch,
    view: LayerView,
    features: Features,
    sizes: Sizes,
    *,
    apart: bool = False,
    interpret: bool = False,
) -> Schedule:
    """Tiles of queries of all requests, and what lies between these.

    In two launches, where XLA would make a dozen: one finds all of them, the other one puts them in their order.

    Args:
      apart: requests of one query have no tiles, and their results are written elsewhere.
    """
    requests, most = batch.num_requests, sizes.most_tiles(batch.num_requests)
    lines = max(most, requests + 1)
    chunk = max(1, min(_MOST_LINES, _ELEMENTS // pl.next_power_of_2(requests)))
    find = functools.partial(
        _find_kernel, sizes=sizes, slot_tokens=view.slot_tokens, window=view.window, chunk=chunk, apart=apart
    )
    found = pl.pallas_call(
        find,
        out_shape=jax.ShapeDtypeStruct((len(Tile._fields) + len(_Gap._fields), lines), jnp.int32),
        grid=(pl.cdiv(lines, chunk),),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="attention_prefill_schedule",
    )(batch.slots, batch.q_starts, batch.q_lens, batch.kv_lens, view.mapped, features.prefix_lens)
    at_once = min(pl.next_power_of_2(lines), _ELEMENTS // _MOST_LINES)
    return Schedule(
        *pl.pallas_call(
            functools.partial(_order_kernel, at_once=at_once),
            out_shape=[
                jax.ShapeDtypeStruct((most, FIELDS), jnp.int32),
                jax.ShapeDtypeStruct((requests + 1, len(_Gap._fields)), jnp.int32),
                jax.ShapeDtypeStruct((3,), jnp.int32),
            ],
            grid=(pl.cdiv(lines, _MOST_LINES), 3),
            compiler_params=triton.CompilerParams(num_warps=4),
            interpret=interpret,
            name="attention_prefill_order",
        )(found)
    )


def _find_kernel(
    slots, q_starts, q_lens, kv_lens, mapped, prefix_lens, found, *,
    sizes: Sizes, slot_tokens: int, window: int | None, chunk: int, apart: bool,
):  # fmt: skip
    """Each program finds `chunk` tiles and gaps, in the order of their queries: a column of `found` is a `Tile`, and
    then a `_Gap`. Tiles behind the last one have no tiles of keys."""
    count, block_q = slots.shape[0], sizes.block_q
    rows = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    there = rows < count
    line = pl.program_id(0) * chunk + jnp.arange(chunk, dtype=jnp.int32)

    def read(ref, at=rows, mask=there):
        return triton.load(ref.at[at], mask=mask, other=0)

    def first_key(slot):
        """That may be read. Runs begin with a multiple of their size: one that begins before it is not read."""
        if window is None:
            return jnp.zeros_like(slot)
        return (triton.load(mapped.at[0, slot]) + KV_TAIL_TOKENS - 1) // KV_TAIL_TOKENS * KV_TAIL_TOKENS

    def slot_of(slot):
        return jnp.clip(slot, 0, mapped.shape[1] - 1)

    starts, lens = read(q_starts), read(q_lens)
    others = jnp.where(lens == 1, 1, 0) if apart else jnp.zeros_like(lens)
    queries = jnp.where(read(kv_lens) > first_key(slot_of(read(slots))), lens - others, 0)
    # Tiles begin with a multiple of a box too.
    tiles_of = jnp.where(queries > 0, (starts % _BOX + queries + block_q - 1) // block_q, 0)
    ends = jnp.cumsum(tiles_of)
    total = jnp.sum(tiles_of)
    stops = starts + queries + others

    def tile() -> Tile:
        before = ends[None, :] <= line[:, None]
        r = jnp.minimum(jnp.sum(before.astype(jnp.int32), axis=1), count - 1)
        index = line - jnp.sum(jnp.where(before, tiles_of[None, :], 0), axis=1)
        start, q_len, kv_len, slot = (triton.load(each.at[r]) for each in (q_starts, q_lens, kv_lens, slots))
        slot = slot_of(slot)
        first = first_key(slot)
        stop = start + jnp.where(kv_len > first, q_len, 0)
        begin_token = start // _BOX * _BOX + index * block_q
        token = jnp.clip(begin_token, 0, sizes.padded_tokens - block_q)
        low = jnp.maximum(begin_token, start) - token
        high = jnp.minimum(begin_token + block_q, stop) - token
        position = kv_len - q_len + token - start
        prefix = jnp.zeros_like(r) if prefix_lens is None else triton.load(prefix_lens.at[r])
        begin = jnp.zeros_like(r)
        if window is not None:
            begin = jnp.maximum(jnp.maximum(position + low - window + 1, 0) // KV_TAIL_TOKENS * KV_TAIL_TOKENS, first)
        end = jnp.minimum(jnp.maximum(jnp.maximum(position + high, prefix), begin + 1), kv_len)
        blocks = jnp.where(line < total, (end - begin + sizes.block_k - 1) // sizes.block_k, 0)
        return Tile(token, low, high, position, prefix, begin, blocks, slot * slot_tokens, kv_len)

    def gap() -> _Gap:
        before = (rows[None, :] < line[:, None]) & there[None, :]
        first = jnp.max(jnp.where(before, stops[None, :], 0), axis=1)
        start = jnp.where(line < count, triton.load(q_starts.at[jnp.minimum(line, count - 1)]), sizes.tokens)
        return _Gap(first, jnp.maximum(start - first, 0))

    for row, values in enumerate((*tile(), *gap())):
        triton.store(found.at[row, line], values, mask=line < found.shape[1])


def _order_kernel(found, tiles, gaps, counts, *, at_once: int):
    """Some programs find the places of tiles in their table, and write them there, others those of gaps; one counts."""
    line = pl.program_id(0) * _MOST_LINES + jnp.arange(_MOST_LINES, dtype=jnp.int32)
    num_tile, num_gap = len(Tile._fields), len(_Gap._fields)

    def at(row: int, number, count: int):
        return triton.load(found.at[row, number], mask=number < count, other=-1)

    def blocks_of(number):
        return at(Tile._fields.index("blocks"), number, tiles.shape[0])

    def is_gap(number):
        return jnp.clip(at(num_tile + _Gap._fields.index("size"), number, gaps.shape[0]), -1, 1)

    def write(table, rows: range, rank):
        for column, row in enumerate(rows):
            triton.store(table.at[rank, column], at(row, line, table.shape[0]), mask=line < table.shape[0])

    @pl.when(pl.program_id(1) == 0)
    def _():
        write(tiles, range(num_tile), _rank(line, blocks_of, tiles.shape[0], at_once))

    @pl.when(pl.program_id(1) == 1)
    def _():
        write(gaps, range(num_tile, num_tile + num_gap), _rank(line, is_gap, gaps.shape[0], at_once))

    @pl.when((pl.program_id(1) == 2) & (pl.program_id(0) == 0))
    def _():
        def add(i, sums):
            number = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            blocks = jnp.maximum(blocks_of(number), 0)
            some = jnp.minimum(blocks, 1), jnp.maximum(is_gap(number), 0), blocks
            return tuple(count + jnp.sum(more) for count, more in zip(sums, some, strict=True))

        sums = lax.fori_loop(0, pl.cdiv(found.shape[1], at_once), add, (jnp.int32(0),) * 3)
        for i, each in enumerate(sums):
            counts[i] = each


def _rank(line, value_at: Callable[[jax.Array], jax.Array], count: int, at_once: int) -> jax.Array:
    """Of each `line`, among lines `0 .. count - 1`: the largest value comes first, of equals the first line."""
    value = value_at(line)

    def add(i, rank):
        number = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        other = value_at(number)
        before = (other[None, :] > value[:, None]) | (
            (other[None, :] == value[:, None]) & (number[None, :] < line[:, None])
        )
        return rank + jnp.sum(before.astype(jnp.int32), axis=1)

    return lax.fori_loop(0, pl.cdiv(count, at_once), add, jnp.zeros_like(line))
