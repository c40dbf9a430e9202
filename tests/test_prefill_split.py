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
    """`(tiles, gaps)`: rows of the tables that are used, but for their order.

    Args:
      requests: of each `(slot, start, queries, keys, prefix)`.
    """
    tiles, gaps, stop = [], [], 0
    for number, (slot, start, q_len, kv_len, prefix) in enumerate(requests):
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
            tile = token, low, high, position, prefix, begin, blocks, slot * SLOT_TOKENS, kv_len
            tiles.append((number, tile))
    gaps.append((stop, max(sizes.tokens - stop, 0)))
    return tiles, [gap for gap in gaps if gap[1]]


def in_order(tiles, requests, sizes, *, window):
    """Rows of tiles, as `model` has them, and KV heads: section by section, those with most keys first, and last in
    every other section."""
    heads_at_once, groups = sizes.num_kv_heads, [[number for number, _ in tiles]]
    if sizes.most_keys is not None:
        keys = {number: requests[number][3] for number, _ in tiles}
        if window is not None:
            keys = {number: min(kv_len, requests[number][2] + window) for number, kv_len in keys.items()}
        rounds = len(tiles) * sizes.num_kv_heads * sizes.group // sizes.blocks
        most = max(sizes.most_keys, sum(keys.values()) * sizes.num_kv_heads // max(rounds // 6, 1))
        divisors = [count for count in range(1, sizes.num_kv_heads + 1) if sizes.num_kv_heads % count == 0]
        longest = max(keys.values(), default=0)
        heads_at_once = max([count for count in divisors if longest * count <= most], default=1)
        even, read, found = max(most // heads_at_once, 1), 0, {}
        for number in sorted(keys):
            read += keys[number]
            found.setdefault((read - 1) // even, []).append(number)
        groups = list(found.values())
    sections = [(group, heads) for group in groups for heads in range(0, sizes.num_kv_heads, heads_at_once)]
    rows = []
    for place, (group, first) in enumerate(sections):
        own = sorted((tile for number, tile in tiles if number in group), key=lambda tile: -tile[6])  # equals stay so
        for tile in own if (len(sections) - place) % 2 else reversed(own):
            rows += [Tile(*tile, head * sizes.group) for head in range(first, first + heads_at_once)]
    return rows


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


def check(
    requests,
    tokens,
    *,
    apart=False,
    block_q=128,
    block_k=64,
    window=None,
    mapped=(0,) * SLOTS,
    prefixes=True,
    **sections,
):
    if not prefixes:
        requests = [(*each[:4], 0) for each in requests]
    sizes = Sizes(tokens, max(up(tokens, BOX) * BOX, block_q), block_q, block_k, **sections)
    slots, starts, q_lens, kv_lens, prefix_lens = (jnp.asarray(each, jnp.int32) for each in zip(*requests, strict=True))
    batch = RaggedBatch(slots, starts, q_lens, kv_lens, max_q_len=300)
    view = view_without_contents(SLOTS, SLOT_TOKENS, window=window, mapped_first=mapped)
    features = Features(prefix_lens=prefix_lens if prefixes else None)
    found = _schedule(batch, view, features, sizes, apart)
    tiles, gaps = model(requests, sizes, window=window, mapped=mapped, apart=apart)
    rows = in_order(tiles, requests, sizes, window=window)
    blocks = sum(row.blocks for row in rows) // sizes.num_kv_heads
    np.testing.assert_array_equal(found.counts, (len(tiles) * sizes.num_kv_heads, len(gaps), blocks))
    assert len(rows) == len(tiles) * sizes.num_kv_heads <= len(found.tiles)
    fields = len(Tile._fields)
    np.testing.assert_array_equal(found.tiles[: len(rows), :fields], np.reshape(rows, (-1, fields)))
    np.testing.assert_array_equal(found.gaps[: len(gaps)], np.reshape(gaps, (-1, 2)))


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([128, 256]), st.booleans(), st.booleans())
def test_tiles_and_gaps_of_any_batch(batch, block_q, prefixes, apart):
    check(*batch, block_q=block_q, prefixes=prefixes, apart=apart)


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([1, 16, 100]), st.lists(st.sampled_from([0, 5, 64]), min_size=SLOTS, max_size=SLOTS))
def test_keys_behind_a_window_or_not_mapped_are_not_in_a_tile(batch, window, mapped):
    check(*batch, window=window, mapped=tuple(mapped), prefixes=False)


_SECTIONS = [(8, 1, 8, None), (8, 2600, 1, None), (8, 9000, 1, 100), (6, 1000, 1, 100), (6, 4000, 1, None)]


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(_SECTIONS))
def test_a_section_has_as_many_heads_and_requests_as_l2_holds(batch, sizes):
    heads, most_keys, blocks, window = sizes
    sections = {"num_kv_heads": heads, "group": 4, "blocks": blocks, "most_keys": most_keys}
    check(*batch, window=window, prefixes=False, **sections)


@pytest.mark.parametrize(("requests", "tokens", "sections"), [(1, 8192, 2), (4, 4096, 4), (1, 32_768, 8), (1, 2048, 1)])
def test_blocks_get_about_as_much_where_there_are_many_sections(requests, tokens, sections):
    """As `mosaic_prefill.Work` deals them out: in turn, and every other time in reverse."""
    heads, group, blocks = 8, 4, 132
    total = requests * tokens
    sizes = Sizes(total, total, 128, 128, num_kv_heads=heads, group=group, blocks=blocks, most_keys=32_768)
    rows, lens = jnp.arange(requests, dtype=jnp.int32), jnp.full(requests, tokens, jnp.int32)
    batch = RaggedBatch(rows, rows * tokens, lens, lens, max_q_len=tokens)
    found = prefill_split.schedule(batch, view_without_contents(requests, tokens), Features(), sizes, interpret=True)
    tiles = np.asarray(found.tiles)[: int(found.counts[0])]
    assert len(tiles) == total // 128 * heads
    of_section = tiles[: len(tiles) // sections]
    pairs = {
        (row, head) for row, head in of_section[:, [Tile._fields.index(name) for name in ("row", "head")]].tolist()
    }
    assert len(pairs) == requests * heads // sections
    keys = np.repeat(tiles[:, Tile._fields.index("blocks")], group)
    of = np.arange(len(keys)) % blocks
    of = np.where(np.arange(len(keys)) // blocks % 2, blocks - 1 - of, of)
    shares = np.bincount(of, keys, blocks)
    assert shares.max() <= shares.mean() * (1.002 if sections > 1 else 1.05)


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
