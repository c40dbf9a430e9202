"""How prefill attention is split into tiles of queries, and in which order these are dealt out.

The row of all tokens of a batch is cut into tiles, request by request; those that see most keys come first. Between
requests are padding tokens, whose results are zeros: `Schedule.gaps`.

Every tile reads its request's keys. Where K and V of all are more than L2 holds, they are worked on in sections: as
many heads of as many requests as it does hold, as FlashAttention's schedulers do (Dao-AILab/flash-attention,
`flash_attn/cute/tile_scheduler.py`). There blocks take the next tile as they end. Here all is dealt out before, so the
tiles of every other section are in reverse, from the fewest keys to the most: then what follows each other is about as
long, and all blocks get about as much, if a section takes them several rounds. The last one ends with the fewest keys.
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
_LEAST_ROUNDS = 6
"""Tiles that a block works on in a section, on average: of fewer, some blocks have many more keys than others."""
_MOST_LINES = 8
"""Of a program: what it takes for each is short, so many programs are done sooner."""


class Schedule(NamedTuple):
    """Who does what. It depends on no layer: XLA computes it once in a program."""

    tiles: jax.Array
    """int32 `[tiles * num_kv_heads, FIELDS]`: a row for each tile of queries and KV head begins with a `Tile`."""
    gaps: jax.Array
    """int32 `[requests + 1, 2]`: first padding token and number of them, for each gap between requests."""
    counts: jax.Array
    """int32 `[3]`: rows of `tiles` and of `gaps` that are used, and tiles of keys of a KV head, all together."""


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
    head: Any
    """The first query head of the KV head."""

    def own_rows(self, first, count: int) -> tuple[Any, Any]:
        """`(low, high)`: of so many rows from `first` on, `low .. high - 1` belong to the request."""
        return jnp.clip(self.low - first, 0, count), jnp.clip(self.high - first, 0, count)


class _Sections(NamedTuple):
    """Those in which a tile is: the same requests, and all KV heads."""

    behind: Any
    """Groups of requests that come behind its own; -1 for what is no tile."""
    heads: Any
    """KV heads of each, which divide all of them."""


class _Gap(NamedTuple):
    """Padding tokens between two requests, or before or behind all of them."""

    first: Any
    """Token."""
    size: Any
    """Tokens; 0 if there are none between these two."""


_FOUND = (*Tile._fields[:-1], *_Sections._fields, *_Gap._fields)
"""Of a line: what does not depend on the head."""


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
    num_kv_heads: int = 1
    group: int = 1
    """Query heads of a KV head."""
    blocks: int = 1
    """That share the work."""
    most_keys: int | None = None
    """Of all heads and requests of a section, if there are `_LEAST_ROUNDS`; a head of one request may have more. None:
    all are one section."""

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
        out_shape=jax.ShapeDtypeStruct((len(_FOUND), lines), jnp.int32),
        grid=(pl.cdiv(lines, chunk),),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="attention_prefill_schedule",
    )(batch.slots, batch.q_starts, batch.q_lens, batch.kv_lens, view.mapped, features.prefix_lens)
    at_once = min(pl.next_power_of_2(lines), _ELEMENTS // _MOST_LINES)
    return Schedule(
        *pl.pallas_call(
            functools.partial(_order_kernel, sizes=sizes, at_once=at_once),
            out_shape=[
                jax.ShapeDtypeStruct((most * sizes.num_kv_heads, FIELDS), jnp.int32),
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
    """Each program finds `chunk` tiles and gaps, in the order of their queries: see `_FOUND`. Tiles behind the last one
    have no tiles of keys."""
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

    starts, lens, keys = read(q_starts), read(q_lens), read(kv_lens)
    others = jnp.where(lens == 1, 1, 0) if apart else jnp.zeros_like(lens)
    queries = jnp.where(keys > first_key(slot_of(read(slots))), lens - others, 0)
    # Tiles begin with a multiple of a box too.
    tiles_of = jnp.where(queries > 0, (starts % _BOX + queries + block_q - 1) // block_q, 0)
    ends = jnp.cumsum(tiles_of)
    total = jnp.sum(tiles_of)
    stops = starts + queries + others
    before = ends[None, :] <= line[:, None]
    r = jnp.minimum(jnp.sum(before.astype(jnp.int32), axis=1), count - 1)

    def tile() -> tuple[Any, ...]:
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
        return token, low, high, position, prefix, begin, blocks, slot * slot_tokens, kv_len

    def sections() -> _Sections:
        if sizes.most_keys is None:
            return _Sections(jnp.where(line < total, 0, -1), jnp.full_like(line, sizes.num_kv_heads))
        read_keys = jnp.where(queries > 0, keys if window is None else jnp.minimum(keys, lens + window), 0)
        rounds = total * (sizes.num_kv_heads * sizes.group) // sizes.blocks
        most_sections = jnp.maximum(rounds // _LEAST_ROUNDS, 1)
        most_keys = jnp.maximum(jnp.sum(read_keys) * sizes.num_kv_heads // most_sections, sizes.most_keys)
        longest, heads = jnp.max(read_keys), jnp.int32(1)
        for divisor in range(2, sizes.num_kv_heads + 1):
            if sizes.num_kv_heads % divisor == 0:
                heads = jnp.where(longest <= most_keys // divisor, divisor, heads)
        # A request is of the group that its last key is in, if all requests' keys, one after the other, are cut evenly.
        even = jnp.maximum(most_keys // heads, 1)
        last = jnp.cumsum(read_keys)
        begins = (last - 1) // even > (last - read_keys - 1) // even  # a group
        behind = (begins[None, :] & (rows[None, :] > r[:, None])).astype(jnp.int32)
        return _Sections(jnp.where(line < total, jnp.sum(behind, axis=1), -1), jnp.broadcast_to(heads, line.shape))

    def gap() -> _Gap:
        earlier = (rows[None, :] < line[:, None]) & there[None, :]
        first = jnp.max(jnp.where(earlier, stops[None, :], 0), axis=1)
        start = jnp.where(line < count, triton.load(q_starts.at[jnp.minimum(line, count - 1)]), sizes.tokens)
        return _Gap(first, jnp.maximum(start - first, 0))

    for row, values in enumerate((*tile(), *sections(), *gap())):
        triton.store(found.at[row, line], values, mask=line < found.shape[1])


def _order_kernel(found, tiles, gaps, counts, *, sizes: Sizes, at_once: int):
    """Some programs find the places of tiles in their table, and write them there, others those of gaps; one counts."""
    line = pl.program_id(0) * _MOST_LINES + jnp.arange(_MOST_LINES, dtype=jnp.int32)
    num_tiles, num_gaps = tiles.shape[0] // sizes.num_kv_heads, gaps.shape[0]

    def at(name: str, number, count: int):
        return triton.load(found.at[_FOUND.index(name), number], mask=number < count, other=-1)

    def blocks_of(number):
        return at("blocks", number, num_tiles)

    def is_gap(number):
        return jnp.clip(at("size", number, num_gaps), -1, 1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        place = _place(line, lambda number: (at("behind", number, num_tiles), blocks_of(number)), num_tiles, at_once)
        sections = at("behind", line, num_tiles), jnp.maximum(at("heads", line, num_tiles), 1)
        before, among, rank, behind, heads = (each[:, None] for each in (*place, *sections))
        head = jnp.arange(pl.next_power_of_2(sizes.num_kv_heads), dtype=jnp.int32)[None, :]
        section, num_sections = head // heads, sizes.num_kv_heads // heads
        to_come = (behind + 1) * num_sections - 1 - section
        rank = jnp.where(to_come % 2 == 0, rank, among - 1 - rank)
        row = before * sizes.num_kv_heads + (section * among + rank) * heads + head % heads
        there = (line[:, None] < num_tiles) & (head < sizes.num_kv_heads)
        row = jnp.where(there, row, tiles.shape[0])  # an interpreter stores what is masked as it was
        values = *(at(name, line, num_tiles)[:, None] for name in Tile._fields[:-1]), head * sizes.group
        for column, each in enumerate(values):
            triton.store(tiles.at[row, column], jnp.broadcast_to(each, row.shape), mask=there)

    @pl.when(pl.program_id(1) == 1)
    def _():
        _, _, rank = _place(line, lambda number: (jnp.zeros_like(number), is_gap(number)), num_gaps, at_once)
        for column, name in enumerate(_Gap._fields):
            triton.store(gaps.at[rank, column], at(name, line, num_gaps), mask=line < num_gaps)

    @pl.when((pl.program_id(1) == 2) & (pl.program_id(0) == 0))
    def _():
        def add(i, sums):
            number = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            blocks = jnp.maximum(blocks_of(number), 0)
            some = jnp.minimum(blocks, 1), jnp.maximum(is_gap(number), 0), blocks
            return tuple(count + jnp.sum(more) for count, more in zip(sums, some, strict=True))

        used, some_gaps, blocks = lax.fori_loop(0, pl.cdiv(found.shape[1], at_once), add, (jnp.int32(0),) * 3)
        for i, each in enumerate((used * sizes.num_kv_heads, some_gaps, blocks)):
            counts[i] = each


def _place(line, values_at: Callable[[Any], tuple[Any, Any]], count: int, at_once: int) -> tuple[Any, Any, Any]:
    """Of each `line`, among lines `0 .. count - 1`: `(before, among, rank)`.

    Args:
      values_at: `(group, value)` of lines. `before` lines are of greater groups, `among` of its own. In that the
        largest value has rank 0, of equals the first line.
    """
    group, value = values_at(line)

    def add(i, sums):
        number = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        other_group, other = (each[None, :] for each in values_at(number))
        same = (other_group == group[:, None]) & (number[None, :] < count)
        first = (other > value[:, None]) | ((other == value[:, None]) & (number[None, :] < line[:, None]))
        some = other_group > group[:, None], same, same & first
        return tuple(sum + jnp.sum(each.astype(jnp.int32), axis=1) for sum, each in zip(sums, some, strict=True))

    return lax.fori_loop(0, pl.cdiv(count, at_once), add, (jnp.zeros_like(line),) * 3)
