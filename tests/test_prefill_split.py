"""The schedule of a prefill, in Pallas' interpreter, against one that is made tile by tile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import view_without_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_vattention import RaggedBatch
from jax_vattention.attention import prefill_split
from jax_vattention.attention.features import Features
from jax_vattention.attention.prefill_split import Sizes, Tile

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

BOX, RUN, SLOT_TOKENS, SLOTS = 8, 16, 2048, 6


def up(number, of):
    return -(-number // of)


def model(requests, sizes, *, window, mapped, apart):
    """`(tiles, gaps)`: rows of the tables that are used.

    Args:
      requests: of each `(slot, start, queries, keys, prefix)`.
    """
    tiles, gaps, stop = [], [], 0
    for slot, start, q_len, kv_len, prefix in requests:
        others = 1 if apart and q_len == 1 else 0
        first = 0 if window is None else up(mapped[slot], RUN) * RUN
        own = q_len - others if kv_len > first else 0
        gaps.append((stop, max(start - stop, 0)))
        stop = max(stop, start + own + others)
        for begin_token in range(start // BOX * BOX, start + own, sizes.block_q) if own else ():
            token = min(max(begin_token, 0), sizes.padded_tokens - sizes.block_q)
            low = max(begin_token, start) - token
            high = min(begin_token + sizes.block_q, start + own) - token
            position = kv_len - q_len + token - start
            begin = 0 if window is None else max(max(position + low - window + 1, 0) // RUN * RUN, first)
            end = min(max(position + high, prefix, begin + 1), kv_len)
            blocks = up(end - begin, sizes.block_k)
            tiles.append(Tile(token, low, high, position, prefix, begin, blocks, slot * SLOT_TOKENS, kv_len))
    gaps.append((stop, max(sizes.tokens - stop, 0)))
    tiles.sort(key=lambda tile: -tile.blocks)  # which keeps the order of equals, as the kernel does
    return tiles, [gap for gap in gaps if gap[1]]


@st.composite
def batches(draw):
    requests, at = [], 0
    for _ in range(4):  # always as many, and as many tokens: no example compiles again
        at += draw(st.sampled_from([0, 0, 1, 7, 40]))
        q_len = draw(st.sampled_from([0, 1, 1, 5, 63, 128, 129, 300]))
        kv_len = q_len + draw(st.sampled_from([0, 1, 100, 1000]))
        prefix = draw(st.integers(0, kv_len))
        requests.append((draw(st.integers(0, SLOTS - 1)), at, q_len, kv_len, prefix))
        at += q_len
    return requests, max(at, draw(st.sampled_from([1360, 1400])))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _schedule(batch, view, features, sizes, apart):
    return prefill_split.schedule(batch, view, features, sizes, apart=apart, interpret=True)


def check(requests, tokens, *, apart=False, block_q=128, block_k=64, window=None, mapped=(0,) * SLOTS, prefixes=True):
    if not prefixes:
        requests = [(*each[:4], 0) for each in requests]
    sizes = Sizes(tokens, max(up(tokens, BOX) * BOX, block_q), block_q, block_k)
    slots, starts, q_lens, kv_lens, prefix_lens = (jnp.asarray(each, jnp.int32) for each in zip(*requests, strict=True))
    batch = RaggedBatch(slots, starts, q_lens, kv_lens, max_q_len=300)
    view = view_without_contents(SLOTS, SLOT_TOKENS, window=window, mapped_first=mapped)
    features = Features(prefix_lens=prefix_lens if prefixes else None)
    found = _schedule(batch, view, features, sizes, apart)
    tiles, gaps = model(requests, sizes, window=window, mapped=mapped, apart=apart)
    np.testing.assert_array_equal(found.counts, (len(tiles), len(gaps), sum(tile.blocks for tile in tiles)))
    assert len(tiles) <= len(found.tiles)
    np.testing.assert_array_equal(found.tiles[: len(tiles), : len(Tile._fields)], np.reshape(tiles, (-1, 9)))
    np.testing.assert_array_equal(found.gaps[: len(gaps)], np.reshape(gaps, (-1, 2)))


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([128, 256]), st.booleans(), st.booleans())
def test_tiles_and_gaps_of_any_batch(batch, block_q, prefixes, apart):
    check(*batch, block_q=block_q, prefixes=prefixes, apart=apart)


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([1, 16, 100]), st.lists(st.sampled_from([0, 5, 64]), min_size=SLOTS, max_size=SLOTS))
def test_keys_behind_a_window_or_not_mapped_are_not_in_a_tile(batch, window, mapped):
    check(*batch, window=window, mapped=tuple(mapped), prefixes=False)


@pytest.mark.parametrize(("requests", "tokens"), [(300, 1), (1100, 1), (1, 9000), (70, 130)])
def test_more_lines_than_a_program_takes(requests, tokens):
    check([(i % SLOTS, i * tokens, tokens, tokens + i, 0) for i in range(requests)], requests * tokens)


def test_slots_that_do_not_exist_are_cut_to_those_that_do():
    requests = [(SLOTS + 3, 0, 5, 5, 0)]
    sizes = Sizes(5, 128, 128, 64)
    batch = RaggedBatch(*(jnp.asarray([each], jnp.int32) for each in requests[0][:4]), max_q_len=5)
    view = view_without_contents(SLOTS, SLOT_TOKENS)
    found = prefill_split.schedule(batch, view, Features(), sizes, interpret=True)
    assert Tile(*found.tiles[0, : len(Tile._fields)].tolist()).row == (SLOTS - 1) * SLOT_TOKENS
