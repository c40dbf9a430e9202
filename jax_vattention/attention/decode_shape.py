"""Static sizes of the decode kernels: which heads, queries and tokens share a product and what is copied at once."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_vattention.attention import float8_queries
from jax_vattention.attention.decode_split import GRAIN
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_view import BOX, ROWS, CommonShape, tile_sizes
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

BLOCKS = 128
"""Of the 132 multiprocessors of an H100 or H200, which read no faster. Pairs of one length whose number is a power of
two are shared out without a rest, so that few of them are split or none."""
_JOINED = 2**16
"""Elements of a pair's partial results that one stream joins."""
_SHORT = 256
"""Bytes of a row of K or V, of one head of a token: shorter ones are read with those of other heads."""
_BOXES = 4
"""Of the rest of a tile, that one instruction copies while there are as many: six are enough for 15 boxes then."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What may be tuned: shared memory holds `stages + behind` tiles of K and V for each of the streams."""

    block_k: int = 64
    """Rows of a tile of K or V: a row is one head of a token."""
    stages: int = 2
    """Tiles of a stream that are in flight or being read."""
    behind: int = 0
    """More of them, of a stream that is slower than the others (see `mosaic_pace`),"""
    mark: int = 4
    """which is found out every so many tiles."""
    after: float = 0.9
    """Of the others: who comes to a mark after this share of them is behind."""
    streams: int = 1
    """Of a block."""
    blocks: int = BLOCKS
    keys_as_rows: bool = False
    """Of products, and queries as their columns, where the kernel can (see `Shape.keys_as_rows`)."""
    together: int = 1
    """KV heads of a tile, 1 or 8: tokens are read with all of these heads at once, if there are as many."""
    room: int = 0
    """Units of keys that are read in the time that it takes to begin and to end a pair (see `decode_split.split`)."""


def _kernels_overlap() -> bool:
    """Whether `XLA_FLAGS` asks to run kernels of a program that do not depend on each other at the same time."""
    return "command_buffer_scheduling_mode=CONCURRENT" in os.environ.get("XLA_FLAGS", "")


def default_tiling(head_dim: int, kv_dtype: Any, pairs: int | None = None) -> Tiling:
    """Where nothing was tuned. What is read of one token at once is no less than `_SHORT` bytes, if it can be.

    Args:
      pairs: of a KV head and a request, if they are known.
    """
    itemsize = jnp.dtype(kv_dtype).itemsize
    # Of the longest rows three tiles do not fit. Tiles of float8 take longer to multiply.
    pace: dict[str, Any] = {"behind": int(head_dim * itemsize < 2 * _SHORT)}
    if itemsize == 1:
        pace |= {"mark": 2, "after": 0.8}
    if head_dim * itemsize >= _SHORT:
        return Tiling(**pace)
    # Where streams share few pairs, there is much to join of a set of heads; of one head it is little.
    apart = pairs is not None and pairs <= BLOCKS and itemsize == 1 and head_dim >= 128
    # As many bytes in a tile as of rows that are not short.
    return Tiling(block_k=128 if head_dim <= 128 else 64, together=1 if apart else BOX, **pace)


@dataclasses.dataclass(frozen=True)
class Shape(CommonShape):
    """Static sizes of a kernel."""

    num_kv_heads: int
    queries: int
    """Most of a request."""
    tiling: Tiling
    prefixes: bool
    quantized: bool
    """K and V are float8. V is multiplied as float16, which holds all of its values, and K if it is not `narrow`."""
    narrow_products: bool
    """Of two float8 matrices: whether there are any."""
    paged: bool
    """See `mosaic_decode.run`."""
    direct: bool
    """Results of a pair that one stream reads all of are final; others, and all with sinks, are to be joined."""

    @classmethod
    def of(
        cls,
        q: jax.Array,
        view: LayerView,
        batch: RaggedBatch,
        features: Features,
        *,
        scale: float,
        tiling: Tiling,
        narrow_products: bool,
        paged: bool = False,
        interpret: Any = False,
    ) -> Shape:
        """Those of a kernel for these arguments."""
        if _kernels_overlap():  # where nothing is to be counted in a table that they share
            tiling = dataclasses.replace(tiling, behind=0)
        return cls(
            **cls.common(q, view, features, scale=scale, interpret=interpret),
            num_kv_heads=view.num_kv_heads,
            queries=batch.max_q_len,
            tiling=tiling,
            prefixes=features.prefix_lens is not None,
            quantized=view.scale_table is not None,
            narrow_products=narrow_products,
            paged=paged,
            direct=features.sinks is None,
        )

    def parts(self, batch: RaggedBatch) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What the kernel writes for `decode_split.join`, beside final results."""
        segments = batch.num_requests * self.sets + self.streams
        return (
            jax.ShapeDtypeStruct((segments, self.rows, self.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((segments, ROWS), jnp.float32),
        )

    @property
    def rows(self) -> int:
        """Rows of the query tile that are copied: of each query all the query heads of a set."""
        return -(-self.queries * self.set_heads // BOX) * BOX

    @property
    def product_rows(self) -> int:
        """Rows of a product, from the first on, that come of rows of the query tile. The others are idle."""
        return 2 * self.rows if self.narrow else self.rows

    @property
    def keys_as_rows(self) -> bool:
        """Whether keys are the rows of products: those of one head, in whole swizzled tiles, and float8 as such."""
        can = self.narrow and self.head_dim % 128 == 0 if self.quantized else self.head_dim % 64 == 0
        return self.tiling.keys_as_rows and self.together == 1 and can

    @property
    def halves(self) -> bool:
        """Whether half of a tile can be computed, if there are no more keys: it still has all rows of a product."""
        return self.keys_as_rows and self.tiling.block_k == 2 * ROWS

    @property
    def narrow(self) -> bool:
        """Whether float8 keys are multiplied as such, with queries in two parts, one eight of rows below the other."""
        return self.quantized and self.narrow_products and 2 * self.rows <= ROWS

    @property
    def part_rows(self) -> int:
        """Rows of the two numbers of queries: those of a product, or as many as there are."""
        return ROWS if self.in_eights else self.product_rows

    @property
    def in_eights(self) -> bool:
        """Whether of the rows of a product each second eight has the second numbers of the one above."""
        return self.narrow and not self.keys_as_rows

    @property
    def widened(self) -> tuple[str, ...]:
        """What is converted to float16 in shared memory."""
        if not self.quantized or self.keys_as_rows:
            return ()
        return ("v_wide",) if self.narrow else ("k_wide", "v_wide")

    @property
    def together(self) -> int:
        """KV heads of a set. Their rows are products of one tile of K, in which each sees every so many columns.

        The rows of a `wgmma` would be idle otherwise. What one set reads of a token is one stretch of memory, and as
        layers are interleaved, no other stream has to come to the same page for another head.
        """
        many, rows = self.tiling.together, ROWS // 2 if self.quantized and self.narrow_products else ROWS
        fits = self.num_kv_heads % many == 0 and many * self.group * self.queries <= rows
        return many if fits else 1

    @property
    def sets(self) -> int:
        """Of KV heads."""
        return self.num_kv_heads // self.together

    @property
    def set_heads(self) -> int:
        """Query heads of a set."""
        return self.together * self.group

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of K or V."""
        return self.tiling.block_k // self.together

    @property
    def tile(self) -> tuple[int, ...]:
        """Sizes of a tile of K or V in shared memory; the same memory as `[block_k, head_dim]`."""
        if self.together == 1 or self.interpreted:  # which has no two shapes for one thing
            return tile_sizes(self.tiling.block_k, self.head_dim, interpreted=self.interpreted)
        return self.tile_tokens, self.together, self.head_dim

    @property
    def sharing(self) -> int:
        """KV heads whose query heads are neighbours in one query tile; each uses rows of its own."""
        if self.together > 1:
            return self.together
        fits = self.queries == 1 and BOX % self.group == 0 and self.num_kv_heads * self.group % BOX == 0
        return BOX // self.group if fits else 1

    def room(self, requests: int) -> int:
        """That of a pair. Streams that have one pair each, or a part of one, need none."""
        return self.tiling.room * min(self.sets * requests, self.streams) // self.streams

    def query_tile(self, request: jax.Array, token: jax.Array, number: jax.Array) -> jax.Array:
        """Which of `query_tiles` holds the query heads of the set of this number."""
        row = token if self.queries == 1 else request
        return lax.div((row * self.sets + number) * self.together, self.sharing)

    def first_row(self, head: jax.Array, query: Any) -> jax.Array:
        """Row in a query tile of the first query head of a KV head, for a request's query of this number."""
        return lax.rem(head, self.sharing) * self.group + query * self.set_heads

    def row_of(self, product_row: jax.Array) -> jax.Array:
        """Row of the query tile that a row of a product is of."""
        return float8_queries.row_at(product_row) if self.in_eights else product_row

    def product_row(self, row: jax.Array) -> jax.Array:
        """Row of a product that has the result of a row of the query tile."""
        return float8_queries.place(row) if self.in_eights else row

    @property
    def reads_queries(self) -> bool:
        """Whether `query_tiles` is the memory of the queries: requests have one query, and rows need no padding."""
        return self.queries == 1 and (self.sharing > 1 or self.set_heads == self.rows)

    def query_tiles(self, q: jax.Array, batch: RaggedBatch) -> jax.Array:
        """`[tiles, rows, head_dim]`."""
        if self.reads_queries:
            return q.reshape(-1, self.rows, self.head_dim)
        if self.queries == 1:
            q = q.reshape(-1, self.set_heads, self.head_dim)
        else:
            at = batch.q_starts[:, None] + jnp.arange(self.queries, dtype=jnp.int32)
            q = q[jnp.minimum(at, q.shape[0] - 1)].reshape(-1, self.queries, self.sets, self.set_heads, self.head_dim)
            q = q.swapaxes(1, 2).reshape(-1, self.queries * self.set_heads, self.head_dim)
        return jnp.pad(q, ((0, 0), (0, self.rows - q.shape[1]), (0, 0)))

    @property
    def copies(self) -> int:
        """That a whole tile of K or V takes."""
        return max(1, self.tile_tokens // GRAIN) if self.paged else 1

    @property
    def boxes_at_once(self) -> int:
        """Of the rest of a tile, copied by one instruction as long as there are as many."""
        return 1 if self.paged or self.together > 1 else min(_BOXES, self.tile_tokens // BOX)

    @property
    def tail_arrivals(self) -> int:
        """At the barrier of a tile that is not whole: as many instructions as may copy it."""
        boxes, at_once = self.tile_tokens // BOX, self.boxes_at_once
        return max(boxes // at_once, boxes // at_once + at_once - 2) * self.arrivals(BOX)

    @property
    def copied_tokens(self) -> int:
        """That one instruction copies of a set of several heads: a box has five dimensions at most."""
        return 1 if self.interpreted else BOX

    def arrivals(self, tokens: int) -> int:
        """Of a copy of so many tokens: its instructions."""
        return 1 if self.together == 1 else tokens // self.copied_tokens

    @property
    def streams(self) -> int:
        """Of all blocks."""
        return self.tiling.blocks * self.tiling.streams

    @property
    def stages(self) -> int:
        """Tiles of K or V that shared memory holds for a stream."""
        return self.tiling.stages + self.tiling.behind

    @property
    def joins(self) -> bool:
        """Whether the last stream of a pair joins what all found (see `mosaic_join`), not a kernel of its own.

        A result that one stream had all keys of is final then. One stream must not have much to join, and no other
        kernel with the same table may run at the same time.
        """
        if self.interpreted or not self.direct or self.together > 1 or _kernels_overlap():
            return False
        segments = -(-self.streams // self.sets) + 1
        whole_threads = self.num_kv_heads * self.group * self.head_dim % 128 == 0
        return whole_threads and segments * self.queries * self.group * self.head_dim <= _JOINED

    @property
    def one_limit(self) -> bool:
        """Whether all rows of a query tile see the same keys of their head."""
        return self.queries == 1

    @property
    def all_see_keys(self) -> bool:
        """Whether a row that sees none of a tile's keys has seen some before."""
        return self.one_limit and self.window is None
