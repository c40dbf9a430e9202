"""How decode attention is split over the streams of a GPU, and how what they found is joined.

As in Stream-K (Osama et al., arXiv 2301.03598) the keys of all requests stand in one row, and every stream takes an
equal part of it, whatever the lengths. If not all KV heads are read together, their sets stand in it one after the
other, each with all requests. Where it takes time to begin and to end a request, it has room around its keys, half of
it on each side: so streams of many short requests have fewer keys. A pair of a set and a request whose keys lie in the
parts of several streams is joined afterwards, as in Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023): by `join`
here, or by the last of these streams (see `mosaic_join`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
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

_LOG2_E = math.log2(math.e)

GRAIN = 16
"""Keys of a unit: a part ends at a whole number of them, or at the end of a request."""
_SEARCHED_ELEMENTS, _MOST_LINES, _MOST_WARPS = 256, 8, 4
"""Comparisons that a warp of `_schedule_kernel` makes for each of its columns, and rows and warps of a program at most:
many small programs are done sooner than a few."""
_JOINED_ELEMENTS, _MOST_SEGMENTS = 4096, 32
"""Of partial results that a program of `_join_kernel` reads at first: no more, unless columns are `_LEAST_COLUMNS`."""
_LEAST_COLUMNS = 16
"""Of such a program, but for heads that have fewer."""
_WARP_ELEMENTS = 1024
"""Of those, what one warp reads."""
_THEN = 4
"""Of pairs in more segments than most, this many times as many at once: each time waits for memory."""


# Columns of `Split.requests`.
TOKEN, ROW, QUERIES, LENGTH, LOWER, PREFIX, OUT = range(7)
# Columns of `Split.streams`; from `FIRST_REQUEST` on those of `Split.requests`.
FIRST_PAIR, FIRST_KEY, NUM_UNITS, NUM_PAIRS, ALL_UNITS, FIRST_REQUEST = range(6)
FIRST_FROM, FIRST_TO, LAST_TO, ARRIVED, PROGRESS = range(FIRST_REQUEST + OUT + 1, 17)
# Columns of `Split.owners`.
OWNER, QUERY, _START, OWNED_UNITS = range(4)


@dataclasses.dataclass(frozen=True)
class Split:
    """Who does what. It depends on no layer: XLA computes it once in a program.

    Pair `p` is set `p // requests` of KV heads, of request `p % requests`.
    """

    requests: jax.Array
    """int32 `[requests, 8]`: first query token, row of token 0 in the view, queries, keys (0 without queries), the
    first key that its first query sees, the length of its bidirectional prefix, and the first row of its result."""
    streams: jax.Array
    """int32 `[streams, 17]`: first pair, first key of it, units from there on, pairs, the units of all requests of one
    set (both with the room of pairs), and what `requests` says of the first pair's: to begin, a stream reads one row.
    Then the first and the last stream that have keys of the first pair, the last one that has keys of its last pair,
    and 0: in a kernel it is the number of streams that are done with the pair whose first stream this is, if it has
    others; the last of them sets it to 0 again. Then 0 once more: in a kernel the first row says how far all streams
    together are (see `mosaic_pace`)."""
    owners: jax.Array
    """int32 `[tokens, 4]`: the request whose query a token is, or -1; which of its queries; units of one set before
    that request; and its own units."""


def first_unit_key(lower: jax.Array) -> jax.Array:
    """The key with which the first unit of a request begins, given the first key that is seen."""
    return lax.div(lower, KV_TAIL_TOKENS) * KV_TAIL_TOKENS


def split(
    batch: RaggedBatch,
    view: LayerView,
    features: Features,
    *,
    tokens: int,
    sets: int,
    streams: int,
    room: int = 0,
    apart: int | None = None,
    queries_apart: bool = False,
    interpret: bool,
) -> Split:
    """Shares the keys of a batch out over some streams.

    Args:
      tokens: of the query array.
      sets: of KV heads.
      streams: how many.
      room: of each pair, in units of keys that are read in the time that it takes to begin and to end a pair.
      apart: only requests of one query have keys here, and each is a token of its own. Their results belong to an array
        of so many tokens, where `q_starts` says.
      queries_apart: and so do their queries.
    """
    slot_tokens = view.slot_tokens
    searched = pl.next_power_of_2(batch.num_requests)
    chunk = max(1, min(_MOST_LINES, _SEARCHED_ELEMENTS // searched))
    warps = max(1, min(_MOST_WARPS, searched // _SEARCHED_ELEMENTS))
    make = functools.partial(
        _schedule_kernel, chunk=chunk, sets=sets, slot_tokens=slot_tokens, room=room, window=view.window, apart=apart,
        queries_apart=queries_apart,
    )  # fmt: skip
    requests, table, owners = pl.pallas_call(
        make,
        out_shape=[
            jax.ShapeDtypeStruct((batch.num_requests, 8), jnp.int32),
            jax.ShapeDtypeStruct((streams, PROGRESS + 1), jnp.int32),
            jax.ShapeDtypeStruct((tokens, 4), jnp.int32),
        ],
        grid=(pl.cdiv(max(streams, tokens), chunk),),
        compiler_params=triton.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="attention_decode_schedule",
    )(batch.slots, batch.q_starts, batch.q_lens, batch.kv_lens, view.mapped, features.prefix_lens)
    return Split(requests, table, owners)


def _schedule_kernel(
    slots, q_starts, q_lens, kv_lens, mapped, prefix_lens, requests, streams, owners, *,
    chunk: int, sets: int, slot_tokens: int, room: int, window: int | None, apart: int | None, queries_apart: bool,
):  # fmt: skip
    """Each program makes `chunk` rows of the tables. Fused by XLA the same takes about twenty launches."""
    count = slots.shape[0]
    rows = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)
    there = rows < count
    line = pl.program_id(0) * chunk + jnp.arange(chunk, dtype=jnp.int32)

    def read(ref, other=0):
        return triton.load(ref.at[rows], mask=there, other=other)

    queries, starts = read(q_lens), read(q_starts)
    token = out = starts
    if apart is not None:
        out = jnp.clip(starts, 0, apart - 1)
        queries, starts = jnp.where(queries == 1, 1, 0), rows
        token = out if queries_apart else starts
    slot = jnp.clip(read(slots), 0, mapped.shape[1] - 1)
    lengths = jnp.where(queries > 0, read(kv_lens), 0)
    lower = jnp.zeros_like(lengths)
    if window is not None:
        first = triton.load(mapped.at[0, slot], mask=there, other=0)
        first = -(-first // KV_TAIL_TOKENS) * KV_TAIL_TOKENS  # for a unit begins with a run of keys
        lower = jnp.minimum(jnp.maximum(lengths - queries - window + 1, first), lengths)
    units = (lengths - first_unit_key(lower) + GRAIN - 1) // GRAIN
    lead, spans = room // 2, jnp.where(units > 0, units + room, 0)
    ends = jnp.cumsum(spans)
    total = jnp.sum(spans)

    prefix = jnp.zeros_like(lengths) if prefix_lens is None else read(prefix_lens)
    of_requests = (token, slot * slot_tokens, queries, lengths, lower, prefix, out)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for column, values in enumerate(of_requests):
            triton.store(requests.at[rows, column], values, mask=there)

    def picked(which, values):
        """Of each line the sum of the `values` of the requests that `which` `[chunk, requests]` holds."""
        return jnp.sum(jnp.where(which, values[None, :], 0), axis=1)

    each, more = _shares(total, sets, streams.shape[0])
    low, own = line * each + jnp.minimum(line, more), each + (line < more).astype(jnp.int32)
    end = low + own

    def pair_of(unit):
        """The pair of a unit, or of a place in its room, the pair's first unit, and how many it has."""
        number = jnp.minimum(unit // jnp.maximum(total, 1), sets - 1)
        before = ends[None, :] <= (unit - number * total)[:, None]  # requests behind the last one have no units
        request = jnp.minimum(jnp.sum(before.astype(jnp.int32), axis=1), count - 1)
        start = picked(before, spans) + number * total + lead
        return number * count + request, start, picked(rows[None, :] == request[:, None], units)

    def stream_of(unit):
        return _stream_of(unit, each, more)

    last_unit = end - 1
    if room:  # the room of a pair alone, behind its keys or before them, is nothing to begin or to end with
        _, start, size = pair_of(low)
        low = jnp.where(low >= start + size, start + size + room - lead, low)
        _, start, _ = pair_of(last_unit)
        last_unit = jnp.where(last_unit < start, start - lead - 1, last_unit)
    (first, start, size), (last, last_start, last_size) = pair_of(low), pair_of(last_unit)
    low = jnp.maximum(low, start)
    first_request = rows[None, :] == (first % count)[:, None]
    key = picked(first_request, first_unit_key(lower)) + (low - start) * GRAIN
    pairs = jnp.where(low <= last_unit, last - first + 1, 0)
    own = jnp.where(low <= last_unit, end - low, 0)
    first_streams, last_to = (stream_of(start), stream_of(start + size - 1)), stream_of(last_start + last_size - 1)
    all_units = jnp.broadcast_to(total, line.shape)
    of_first = (picked(first_request, values) for values in of_requests)
    counters = jnp.zeros_like(line), jnp.zeros_like(line)
    for column, values in enumerate((first, key, own, pairs, all_units, *of_first, *first_streams, last_to, *counters)):
        triton.store(streams.at[line, column], values, mask=line < streams.shape[0])

    owned = (line[:, None] >= starts[None, :]) & (line[:, None] < (starts + queries)[None, :]) & there[None, :]
    request = jnp.max(jnp.where(owned, rows[None, :], -1), axis=1)
    owned = rows[None, :] == request[:, None]
    for column, values in enumerate(
        (request, line - picked(owned, starts), picked(owned, ends - spans + lead), picked(owned, units))
    ):
        triton.store(owners.at[line, column], values, mask=line < owners.shape[0])


def _shares(total: jax.Array, sets: int, streams: int) -> tuple[jax.Array, jax.Array]:
    """Units of each stream, and how many of the first streams take one more."""
    return total * sets // streams, total * sets % streams


def _stream_of(unit: jax.Array, each: jax.Array, more: jax.Array) -> jax.Array:
    """The stream that has a unit of the row."""
    wide = more * (each + 1)
    return jnp.where(unit < wide, unit // (each + 1), more + (unit - wide) // jnp.maximum(each, 1))


class Request(NamedTuple):
    """A row of `Split.requests`."""

    token: jax.Array
    row: jax.Array
    queries: jax.Array
    length: jax.Array
    lower: jax.Array
    prefix: jax.Array
    out: jax.Array

    @classmethod
    def read(cls, table, row: jax.Array, first_column: int = 0) -> Request:
        """From this column of a row on."""
        return cls(*(table[row, first_column + column] for column in range(OUT + 1)))


class Queries(NamedTuple):
    """Where those of a pair are."""

    request: jax.Array
    token: jax.Array
    """The first of them."""
    head: jax.Array
    """The first KV head of the set."""


class Piece(NamedTuple):
    """Some keys of a pair, which one stream reads from the first to the last."""

    pair: jax.Array
    number: jax.Array
    """Of those of this stream."""
    request: jax.Array
    head: jax.Array
    """The first KV head of the set."""
    of: Request
    first: jax.Array
    end: jax.Array
    is_last: jax.Array
    """Of those of this stream."""
    next_queries: Queries
    """Of the pair after this one."""

    @property
    def is_whole(self) -> jax.Array:
        """Whether it has all keys of the pair."""
        return (self.first == first_unit_key(self.of.lower)) & (self.end == self.of.length)

    def tiles(self, tokens: int) -> jax.Array:
        """Of so many; the last may have fewer."""
        return lax.div(self.end - self.first + tokens - 1, tokens)

    def whole_tiles(self, tokens: int) -> jax.Array:
        """Those that have as many."""
        return lax.div(self.end - self.first, tokens)


class SharedPair(NamedTuple):
    """A pair, and the first and the last stream that have keys of it."""

    pair: jax.Array
    first: jax.Array
    last: jax.Array

    @property
    def streams(self) -> jax.Array:
        """How many these are."""
        return self.last - self.first + 1


@dataclasses.dataclass(frozen=True)
class Work:
    """What one stream has to do: its part of the row of keys, piece by piece. Read in a kernel."""

    requests: Any
    """See `Split`, as for `streams`."""
    streams: Any
    stream: jax.Array
    """Row of `streams`."""
    together: int
    """KV heads of a set."""
    room: int = 0
    """Of each pair; see `split`."""

    @property
    def first_pair(self) -> jax.Array:
        """With which it begins."""
        return self.streams[self.stream, FIRST_PAIR]

    @property
    def num_pairs(self) -> jax.Array:
        """Of which it has keys."""
        return self.streams[self.stream, NUM_PAIRS]

    @property
    def first_request(self) -> Request:
        """That of the first pair."""
        return Request.read(self.streams, self.stream, FIRST_REQUEST)

    def set_and_request(self, pair) -> tuple[jax.Array, jax.Array]:
        """Numbers of the set of KV heads and of the request that a pair is of."""
        count = self.requests.shape[0]
        return lax.div(pair, count), lax.rem(pair, count)

    @property
    def first_queries(self) -> Queries:
        """Those of the first pair."""
        number, request = self.set_and_request(self.first_pair)
        return Queries(request, self.first_request.token, number * self.together)

    @property
    def shared_pairs(self) -> tuple[SharedPair, SharedPair]:
        """The first and the last pair, of which other streams may have keys too; the last one only if it is another."""
        from_stream, to_stream, last_to = (self.streams[self.stream, at] for at in (FIRST_FROM, FIRST_TO, LAST_TO))
        last_to = jnp.where(self.num_pairs > 1, last_to, self.stream)
        first = SharedPair(self.first_pair, from_stream, to_stream)
        return first, SharedPair(self.first_pair + self.num_pairs - 1, self.stream, last_to)

    def each_piece(self, body, carry):
        """`carry = body(piece, carry)` for every piece."""
        columns = FIRST_PAIR, NUM_PAIRS, FIRST_KEY, NUM_UNITS
        first_pair, pairs, first_key, units = (self.streams[self.stream, column] for column in columns)
        number, request = self.set_and_request(first_pair)

        def after(request):
            return jnp.where(request + 1 == self.requests.shape[0], 0, request + 1)

        def step(i, state):
            left, number, request, of, next_token, carry = state
            following = after(request)
            # Read ahead, as where the queries after the next ones are: between two pieces nothing waits for the table.
            next_of, token = Request.read(self.requests, following), self.requests[after(following), TOKEN]
            first = jnp.where(i == 0, first_key, first_unit_key(of.lower))
            end = jnp.minimum(of.length, first + left * GRAIN)
            next_number = jnp.where(following == 0, number + 1, number)
            queries = Queries(following, next_token, next_number * self.together)
            head, is_last = number * self.together, i + 1 == pairs
            carry = body(Piece(first_pair + i, i, request, head, of, first, end, is_last, queries), carry)
            left = left - lax.div(end - first + GRAIN - 1, GRAIN)
            if self.room:
                left = left - jnp.where(first < end, self.room, 0)
            return left, next_number, following, next_of, token, carry

        state = (units, number, request, self.first_request, self.requests[after(request), TOKEN], carry)
        return lax.fori_loop(0, pairs, step, state)[-1]


def out_row(requests, request, query, token):
    """Where the result of a token goes that is this query of a request; its own row if no request has it (-1)."""
    return jnp.where(request < 0, token, requests[jnp.maximum(request, 0), OUT] + query)


def join(
    out: jax.Array,
    parts: jax.Array,
    lse: jax.Array,
    split: Split,
    order: jax.Array,
    features: Features,
    *,
    heads: int,
    sets: int,
    first_row: Any,
    product_row: Any,
    whole_are_there: bool,
    fill: bool = True,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Joins what several streams found for a pair.

    Args:
      out: `[tokens, num_q_heads, head_dim]`, to be completed in its place.
      parts, lse: `[segments, rows, head_dim]` and `[segments, at least rows]`: results over some keys, and the base 2
        logarithm of their sums of exponentials. What stream `s` found for pair `p` is in segment `p + s`: from one
        piece of work to the next the pair, the stream or both are one higher.
      first_row: of a KV head and a query of a request, int32: which row has the first of its query heads.
      product_row: of a row of `parts`: its place in `lse`.
      whole_are_there: `out` has the results of pairs that one stream read all of.
      fill: the rows that no request owns become 0.

    Returns:
      `(out, order)`.
    """
    streams, requests = split.streams.shape[0], split.requests.shape[0]
    rows = pl.next_power_of_2(out.shape[1] // heads)
    # In as many segments are pairs of equal lengths. Of many segments a program takes some columns only.
    many = pl.next_power_of_2(pl.cdiv(streams, sets * requests) + 1)
    segments = min(many, _MOST_SEGMENTS)
    columns = min(pl.next_power_of_2(out.shape[2]), max(_JOINED_ELEMENTS // (many * rows), _LEAST_COLUMNS))
    num_warps = max(1, segments * rows * columns // _WARP_ELEMENTS)
    order, out = pl.pallas_call(
        functools.partial(
            _join_kernel,
            heads=heads,
            sets=sets,
            columns=columns,
            segments=segments,
            first_row=first_row,
            product_row=product_row,
            whole_are_there=whole_are_there,
            fill=fill,
        ),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (order, out)],
        grid=(heads, split.owners.shape[0], pl.cdiv(out.shape[2], columns)),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=triton.CompilerParams(num_warps=min(4, num_warps)),
        interpret=interpret,
        name="attention_decode_combine",
    )(order, out, split.requests, split.owners, split.streams, parts, lse, features.sinks)
    return out, order


def _join_kernel(
    _order, _out, requests, owners, streams, parts, lse, sinks, _order_out, out_ref, *, heads: int, sets: int,
    columns: int, segments: int, first_row: Any, product_row: Any, whole_are_there: bool, fill: bool,
):  # fmt: skip
    """The query heads of one token that share a KV head; zeros if no request owns the token."""
    head, token, part = (pl.program_id(axis) for axis in range(3))
    dim = part * columns + jnp.arange(columns)
    total = streams[0, ALL_UNITS]
    request, query, start, units = (owners[token, column] for column in range(4))
    number = head // (heads // sets)
    unit = number * total + start
    shares = _shares(total, sets, streams.shape[0])
    from_stream, to_stream = _stream_of(unit, *shares), _stream_of(unit + units - 1, *shares)
    first = number * requests.shape[0] + request + from_stream
    end = jnp.where(units > 0, first + to_stream - from_stream + 1, first)
    to_do = request >= (-1 if fill else 0)
    if whole_are_there:
        to_do &= (units == 0) | (from_stream != to_stream)

    @pl.when(to_do)
    def _():
        row = out_row(requests, request, query, token)
        low = first_row(head, query)
        _join_pair(head, row, first, end, low, product_row, dim, parts, lse, sinks, out_ref, heads, segments)


def _join_pair(
    head, token, first, end, low, product_row, dim, parts, lse, sinks, out_ref, heads: int, segments: int
):  # fmt: skip
    """Columns `dim` of the rows from `low` on of segments `first .. end - 1`, `segments` of them at first."""
    group, head_dim = out_ref.shape[1] // heads, out_ref.shape[2]
    rows = jnp.arange(pl.next_power_of_2(group))
    used, own_rows = rows < group, low + rows
    lse_rows = product_row(own_rows)
    tile_used = used[:, None] & (dim < head_dim)[None, :]

    def add(chunk: int, begin, i, state):
        maximum, total, acc = state
        segment = begin + i * chunk + jnp.arange(chunk)
        there = (segment < end)[:, None] & used[None, :]
        part_lse = triton.load(lse.at[segment[:, None], lse_rows[None, :]], mask=there, other=-jnp.inf)
        at = parts.at[segment[:, None, None], own_rows[None, :, None], dim[None, None, :]]
        mask = there[:, :, None] & tile_used[None, :, :]
        part = triton.load(at, mask=mask, other=0).astype(jnp.float32)
        new_maximum = jnp.where(used, jnp.maximum(maximum, part_lse.max(axis=0)), 0)
        # Of a piece in which a row sees no key.
        base = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        shrink, weights = jnp.exp2(maximum - base), jnp.exp2(part_lse - base[None, :])
        acc = acc * shrink[:, None] + (part * weights[:, :, None]).sum(axis=0)
        return new_maximum, total * shrink + weights.sum(axis=0), acc

    state = (
        jnp.full(rows.shape, -jnp.inf, jnp.float32),
        jnp.zeros(rows.shape, jnp.float32),
        jnp.zeros((rows.size, dim.size), jnp.float32),
    )
    state = add(segments, first, 0, state)
    then, left = _THEN * segments, jnp.maximum(end - first - segments, 0)
    add_then = functools.partial(add, then, first + segments)
    maximum, total, acc = lax.fori_loop(0, pl.cdiv(left, then), add_then, state)
    if sinks is not None:
        sink = triton.load(sinks.at[head * group + rows], mask=used, other=0)
        total += jnp.exp2(sink * _LOG2_E - maximum)
    out = acc / jnp.where(total == 0, 1, total)[:, None]
    at = out_ref.at[token, (head * group + rows)[:, None], dim[None, :]]
    triton.store(at, out.astype(out_ref.dtype), mask=tile_used)
