"""How decodes are shared out, and how what streams found is joined, in Pallas' interpreter against plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import view_without_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_vattention import RaggedBatch
from jax_vattention.attention import decode_split
from jax_vattention.attention.decode_split import (
    ARRIVED,
    FIRST_FROM,
    FIRST_KEY,
    FIRST_PAIR,
    FIRST_REQUEST,
    FIRST_TO,
    GRAIN,
    LAST_TO,
    NUM_PAIRS,
    NUM_UNITS,
)
from jax_vattention.attention.features import Features

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

RUN, SLOT_TOKENS, SLOTS, TOKENS, SETS, GROUP, DIM = 16, 2048, 6, 8, 2, 3, 8


@functools.partial(jax.jit, static_argnames=("sets", "streams", "room", "apart", "queries_apart"))
def _split(batch, view, *, sets, streams, room, **apart):
    tokens = max(TOKENS, batch.num_requests)
    table = decode_split.split(
        batch, view, Features(), tokens=tokens, sets=sets, streams=streams, room=room, interpret=True, **apart
    )
    return table.requests, table.streams, table.owners


def split(batch, view, *, streams, sets=SETS, room=0, **apart):
    return decode_split.Split(*_split(batch, view, sets=sets, streams=streams, room=room, **apart))


@functools.partial(jax.jit, static_argnames=("whole_are_there", "fill"))
def join(out, parts, lse, *table, whole_are_there, fill):
    return decode_split.join(
        out, parts, lse, decode_split.Split(*table), jnp.zeros(4, jnp.int32), Features(), heads=SETS, sets=SETS,
        first_row=lambda head, query: query * GROUP, product_row=lambda row: row + 1,
        whole_are_there=whole_are_there, fill=fill, interpret=True,
    )[0]  # fmt: skip


def first_keys(requests, window, mapped):
    """Of each `(slot, start, queries, keys)` the first key of its first unit, and the number of keys; 0 if none."""
    found = []
    for slot, _, q_len, kv_len in requests:
        keys, lower = kv_len if q_len else 0, 0
        if window is not None:
            lower = min(max(keys - q_len - window + 1, -(-mapped[slot] // RUN) * RUN), keys)
        found.append((lower // RUN * RUN, keys))
    return found


def pieces(table, bounds, room=0):
    """`(stream, pair, first key, end)` of the work that the table shares out, as a kernel walks through it."""
    for stream, row in enumerate(np.asarray(table.streams)):
        left, first = int(row[NUM_UNITS]), int(row[FIRST_KEY])
        for pair in range(row[FIRST_PAIR], row[FIRST_PAIR] + row[NUM_PAIRS]):
            begin, end = bounds[pair % len(bounds)]
            first = first if pair == row[FIRST_PAIR] else begin
            stop = min(end, first + left * GRAIN)
            left -= -(-(stop - first) // GRAIN) + (room if stop > first else 0)
            yield stream, pair, first, stop
        assert left == 0 or -room <= left < 0, "it ends with a key, or in the room behind the last one"


@st.composite
def batches(draw):
    requests, at = [], 0
    for _ in range(TOKENS // 2):  # always as many: no example compiles again
        at += draw(st.sampled_from([0, 0, 1]))
        q_len = min(draw(st.integers(0, 2)), max(0, TOKENS - at))
        kv_len = draw(st.sampled_from([1, 15, 16, 17, 64, 100, 250]))
        requests.append((draw(st.integers(0, SLOTS - 1)), min(at, TOKENS - 1), q_len, max(kv_len, q_len)))
        at += q_len
    return requests


def make(requests, **of_view):
    columns = (jnp.asarray(each, jnp.int32) for each in zip(*requests, strict=True))
    return RaggedBatch(*columns, max_q_len=2), view_without_contents(SLOTS, SLOT_TOKENS, **of_view)


@settings(max_examples=40, deadline=None)
@given(
    batches(),
    st.sampled_from([None, 1, 30, 200]),
    st.lists(st.sampled_from([0, 5, 64]), min_size=SLOTS, max_size=SLOTS),
    st.sampled_from([0, 1, 7]),
)
def test_every_key_is_one_streams_and_all_have_the_same_number_of_units(requests, window, mapped, room):
    batch, view = make(requests, window=window, mapped_first=mapped)
    table = split(batch, view, streams=5, room=room)
    bounds = first_keys(requests, window, mapped)
    sizes = [-(-(end - first) // GRAIN) for first, end in bounds]
    share = SETS * sum(size + room for size in sizes if size) / 5
    units = np.asarray(table.streams)[:, NUM_UNITS]
    assert units.max() < share + 1
    if not room:
        assert units.sum() == SETS * sum(sizes)
        assert units.max() - units.min() <= 1
    seen = {pair: bounds[pair % len(bounds)][0] for pair in range(SETS * len(bounds))}
    last, streams_of = -1, {}
    work = np.zeros(5)
    for stream, pair, first, stop in pieces(table, bounds, room):
        work[stream] += -(-(stop - first) // GRAIN) + (room if stop > first else 0)
        if stop > first:
            streams_of.setdefault(pair, []).append(stream)
        assert first == seen[pair], "the piece before it ends there"
        seen[pair] = max(stop, first)
        assert pair + stream > last, "each piece has a segment of its own"
        last = pair + stream
    assert all(seen[pair] == bounds[pair % len(bounds)][1] for pair in seen)
    assert np.all(np.abs(work - share) < room + 1), "but for half a room at each end"
    for row in np.asarray(table.streams):
        if row[NUM_UNITS]:
            of_first, of_last = streams_of[row[FIRST_PAIR]], streams_of[row[FIRST_PAIR] + row[NUM_PAIRS] - 1]
            assert (row[FIRST_FROM], row[FIRST_TO], row[LAST_TO]) == (of_first[0], of_first[-1], of_last[-1])
            assert row[ARRIVED] == 0
            first_request = np.asarray(table.requests)[row[FIRST_PAIR] % len(requests)]
            np.testing.assert_array_equal(row[FIRST_REQUEST : FIRST_REQUEST + 7], first_request[:7])


@settings(max_examples=30, deadline=None)
@given(batches(), st.booleans(), st.booleans(), st.integers(0, 99), st.sampled_from([0, 7]))
def test_what_streams_found_is_joined_to_what_one_would_have_found(requests, whole_are_there, fill, seed, room):
    rng = np.random.default_rng(seed)
    batch, view = make(requests)
    table, bounds = split(batch, view, streams=5, room=room), first_keys(requests, None, None)
    rows, longest = 2 * GROUP, 256
    scores = rng.normal(size=(SETS, len(requests), rows, longest)) * 4
    values = rng.normal(size=(SETS, len(requests), rows, longest, DIM))

    def found(pair, first, stop):
        at = pair // len(requests), pair % len(requests), slice(None), slice(first, stop)
        weights = np.exp2(scores[at])
        total = weights.sum(-1)
        return (weights[..., None] * values[at]).sum(-2) / total[:, None], np.log2(total)

    segments = SETS * len(requests) + 5
    # What no stream has written to is not read.
    parts, lse = np.full((segments, rows, DIM), np.nan, np.float32), np.full((segments, 64), np.nan, np.float32)
    out = np.full((TOKENS, SETS * GROUP, DIM), 7, np.float32)
    expected = np.where(fill, 0, out)

    def place(array, pair, result):
        _, start, q_len, _ = requests[pair % len(requests)]
        heads = slice(pair // len(requests) * GROUP, (pair // len(requests) + 1) * GROUP)
        array[start : start + q_len, heads] = result.reshape(2, GROUP, DIM)[:q_len]

    for stream, pair, first, stop in pieces(table, bounds, room):
        if stop > first:
            parts[pair + stream], lse[pair + stream, 1 : rows + 1] = found(pair, first, stop)
            if whole_are_there and (first, stop) == bounds[pair % len(requests)]:
                place(out, pair, parts[pair + stream])
                parts[pair + stream] = np.nan
    for pair in range(SETS * len(requests)):
        first, stop = bounds[pair % len(requests)]
        if stop > first:
            place(expected, pair, found(pair, first, stop)[0])
    tables = table.requests, table.streams, table.owners
    joined = join(out, parts, lse, *tables, whole_are_there=whole_are_there, fill=fill)
    np.testing.assert_allclose(joined, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("requests", "sets", "streams_of_a_pair"), [(16, 8, 1), (4, 8, 4), (64, 8, 1 / 4), (1024, 8, 1 / 64), (1, 8, 16)]
)
def test_pairs_of_one_length_are_split_without_a_rest(requests, sets, streams_of_a_pair):
    """128 streams: each has so many whole pairs, or one of as many parts of one pair."""
    length = 1024
    batch, view = make([(i % SLOTS, i, 1, length) for i in range(requests)])
    found = list(pieces(split(batch, view, sets=sets, streams=128), [(0, length)] * requests))
    assert len(found) == max(128, requests * sets)
    assert {stop - first for *_, first, stop in found} == {length / max(streams_of_a_pair, 1)}


@settings(max_examples=20, deadline=None)
@given(batches(), st.booleans(), st.sampled_from([0, 7]))
def test_requests_of_one_query_alone_are_a_decode_whose_results_are_elsewhere(requests, queries_apart, room):
    batch, view = make(requests)
    found = split(batch, view, streams=5, room=room, apart=3, queries_apart=queries_apart)
    decodes = RaggedBatch.decode(batch.slots, batch.kv_lens, batch.q_lens == 1)
    alone = split(decodes, view, streams=5, room=room)
    out = np.minimum(np.asarray(batch.q_starts), 2)  # of three tokens
    expected = np.array(alone.requests)
    expected[:, decode_split.OUT] = out
    if queries_apart:
        expected[:, decode_split.TOKEN] = out
    np.testing.assert_array_equal(np.asarray(found.requests)[:, :7], expected[:, :7])
    np.testing.assert_array_equal(found.owners, alone.owners)
    rows = np.array(alone.streams)
    own = rows[:, NUM_PAIRS] > 0  # the others do not look at what they begin with
    of_request = slice(FIRST_REQUEST, FIRST_REQUEST + 7)
    rows[own, of_request] = expected[rows[own, FIRST_PAIR] % len(requests), :7]
    np.testing.assert_array_equal(np.asarray(found.streams)[own], rows[own])
    assert not np.asarray(found.streams)[~own, NUM_PAIRS].any()


def test_slots_that_do_not_exist_are_cut_to_those_that_do():
    batch, view = make([(SLOTS + 3, 0, 1, 5), (-1, 1, 1, 5)])
    rows = np.asarray(split(batch, view, streams=5).requests)[:, decode_split.ROW]
    np.testing.assert_array_equal(rows, [(SLOTS - 1) * SLOT_TOKENS, 0])
