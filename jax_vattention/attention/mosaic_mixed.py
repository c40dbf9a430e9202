"""Decodes and chunks of prompts of one step in one kernel: Hopper GPUs.

Decoding waits for memory and prefill for the tensor cores, so at the same time they take less than one after the other
(POD-Attention, Kamath et al., arXiv 2410.18038). Here every block does its share of both at once: two warpgroups
multiply and one copies as in `mosaic_prefill`, one multiplies and one copies as in `mosaic_decode`, each kind with
shared memory and registers of its own. Neither waits for the other. As decodes have their queries as columns (see
`mosaic_columns`), they take little of what prefill needs: registers, tensor cores and power. But what prefill takes of
these makes decodes slower, and so it takes its time, if it has time: see `Tiling.beside`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import (
    decode_shape,
    decode_split,
    mosaic_decode,
    mosaic_join,
    mosaic_prefill,
    prefill_shape,
    prefill_split,
    target,
)
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_compute import Refs
from jax_vattention.attention.mosaic_rows import Wgmma
from jax_vattention.attention.mosaic_view import BOX, Columns, pass_on
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_PREFILL_COPIES, _DECODES, _DECODE_COPIES = 2, 3, 4
"""Warpgroups; those before them multiply for the prefill."""
_DECODE_REGISTERS = 48, 88
"""Of a thread that copies for decodes, and of one that multiplies: with those of the prefill, all that a block has."""
_UNHURRIED = 1.6
"""Time of a key for a tile of queries, in an unhurried prefill; of a key of a decode it is 1. Measured on an H200."""
_MOST_ROWS = 2 * BOX
"""Of a query tile of decodes: more have too few registers, and too little shared memory."""


@dataclasses.dataclass(frozen=True)
class Tiling(mosaic_prefill.Tiling):
    """What may be tuned: what a prefill has, with defaults that leave the decodes their part of a block."""

    block_k: int = 64
    q_stages: int = 1
    own_out: bool = False
    registers: tuple[int, int] = (40, 152)
    blocks: int = decode_shape.BLOCKS
    beside: int = 1
    """Tiles of keys that may be under way while the block decodes; afterwards, and if decodes are not what takes
    longest, all that there is memory for."""
    keep_keys: bool = True
    """What decodes read, each key once, would displace K and V of the prefill, which all tiles of queries read."""


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of what both other kernels serve; None if it serves these arguments."""
    del batch, features  # all of them
    group = q.shape[1] // view.num_kv_heads
    if target.REGISTERS_STAY:
        return f"jax {jax.__version__}, with which warpgroups cannot give each other registers"
    return f"{group} query heads for a KV head" if group > _MOST_ROWS else None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    decode_tiling: decode_shape.Tiling | None = None,
    interpret: Any = False,
    interpret_tables: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`. Requests of one query are decodes.

    Args:
      tiling, decode_tiling: of the two parts. One stream of a block decodes, in no more blocks than there are, with
        queries as columns.
    """
    tiling = mosaic_prefill.tiling_of(tiling, Tiling(), q, view, kernel="mosaic_mixed", interpret=interpret)
    if decode_tiling is None:
        decode_tiling = tuned(default_decode_tiling(q.shape[2], view.k.dtype), "mosaic_mixed_decode", view)
    blocks = min(decode_tiling.blocks, tiling.blocks)
    decode_tiling = dataclasses.replace(decode_tiling, blocks=blocks, streams=1, together=1, keys_as_rows=True)
    decodes, first, _ = parted(q, batch)
    one = dataclasses.replace(features, prefix_lens=None)  # which change nothing for a request's last token
    decode = decode_shape.Shape.of(
        q, view, decodes, one, scale=scale, tiling=decode_tiling, narrow_products=True, interpret=interpret
    )
    prefill = mosaic_prefill.shape_of(q, view, features, scale=scale, tiling=tiling, interpret=interpret)
    schedule = prefill_split.schedule(
        batch, view, features, prefill.split_sizes(q.shape[0]), apart=True, interpret=interpret_tables
    )
    # A row for each request is gathered only where it has to be padded anyway.
    queries = q if decode.reads_queries else q[first]
    split = decode_split.split(
        batch, view, one, tokens=batch.num_requests, sets=decode.sets, streams=decode.streams,
        room=decode.room(batch.num_requests), apart=q.shape[0], queries_apart=decode.reads_queries,
        interpret=interpret_tables,
    )  # fmt: skip
    sinks = () if features.sinks is None else (features.sinks,)
    columns = Columns.of(view, interpreted=prefill.interpreted)
    out, order, parts, lse = plgpu.kernel(
        functools.partial(_mixed, decode=decode, prefill=prefill, tiling=tiling, has_sinks=bool(sinks)),
        out_type=(*mosaic_prefill.results(prefill, q, order), *decode.parts(decodes)),
        scratch_types=_scratch(decode, prefill, tiling, view.k.dtype),
        **tiling.grid,
        num_threads=_DECODE_COPIES + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_mixed",
    )(
        mosaic_prefill.padded(q, prefill),
        decode.query_tiles(queries, decodes),
        *columns,
        *columns,  # Copies that have a policy for L2 and copies that have none cannot be of one argument.
        *schedule,
        split.requests,
        split.streams,
        split.owners,
        view.layer.reshape(1),
        order,
        *sinks,
    )
    if decode.joins:
        return out[: q.shape[0]], order
    out, order = decode_split.join(
        out, parts, lse, split, order, one, heads=view.num_kv_heads, sets=decode.sets, first_row=decode.first_row,
        product_row=decode.product_row, whole_are_there=decode.direct, fill=False, interpret=interpret_tables,
    )  # fmt: skip
    return out[: q.shape[0]], order


def default_decode_tiling(head_dim: int, kv_dtype: Any) -> decode_shape.Tiling:
    """Where nothing was tuned: tiles of as many bytes, whatever the head dim."""
    block_k = 16_384 // (head_dim * jnp.dtype(kv_dtype).itemsize)
    return decode_shape.Tiling(block_k=block_k, behind=1, mark=8, after=0.5)


def parted(q: jax.Array, batch: RaggedBatch) -> tuple[RaggedBatch, jax.Array, RaggedBatch]:
    """The requests of one query, the token that each request begins with, and the requests of more queries."""
    alone = batch.q_lens == 1
    decodes = RaggedBatch.decode(batch.slots, batch.kv_lens, alone)
    chunks = dataclasses.replace(batch, q_lens=jnp.where(alone, 0, batch.q_lens))
    return decodes, jnp.clip(batch.q_starts, 0, q.shape[0] - 1), chunks


def placed(decoded: jax.Array, out: jax.Array, batch: RaggedBatch) -> jax.Array:
    """`out`, with what was found for requests of one query, in an array of a row for each request."""
    rows = jnp.where(batch.q_lens == 1, batch.q_starts, out.shape[0])
    return out.at[rows].set(decoded, mode="drop")


def _scratch(decode: decode_shape.Shape, prefill: prefill_shape.Shape, tiling: Tiling, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of both, and what blocks of a cluster leave by."""
    done = {"done": tiling.barrier(num_arrivals=_DECODE_COPIES + 1)} if tiling.cluster > 1 else {}
    return done | {
        "decoding": plgpu.SMEM((1,), jnp.int32),
        "reads": mosaic_decode.scratch_types(decode, dtype, dtype, dtype),
        "computes": mosaic_prefill.scratch_types(prefill, tiling, dtype),
    }


def _there_is_time(tiles, units, prefill: prefill_shape.Shape):
    """Whether decodes take longer than a prefill that is not in a hurry.

    Args:
      tiles: of keys, of all tiles of queries.
      units: of the decodes of a block.
    """
    prefilled = tiles.astype(jnp.float32) * (prefill.num_q_heads * prefill.tiling.block_k / prefill.tiling.blocks)
    return prefilled * _UNHURRIED <= units.astype(jnp.float32) * decode_split.GRAIN


def _mixed(
    q_ref, q_tiles, k_ref, v_ref, k_again, v_again, tiles, gaps, counts, requests, streams, owners, layer_ref, order,
    *refs, decode: decode_shape.Shape, prefill: prefill_shape.Shape, tiling: Tiling, has_sinks: bool,
    decoding, reads, computes, done=None,
):  # fmt: skip
    """One block. Arguments are those of the two kernels."""
    *sinks, out_ref, order_out, parts_ref, lse_ref = refs
    warpgroup = lax.axis_index("warpgroup")
    layer = layer_ref[0] * prefill.layer_stride
    computing = mosaic_prefill.Work.of(tiles, counts[0], prefill)
    room = decode.room(requests.shape[0])
    reading = decode_split.Work(requests, streams, computing.block, decode.together, room)
    decodes = computing.block < decode.tiling.blocks

    there_is_time = _there_is_time(counts[2], streams[0, decode_split.NUM_UNITS], prefill)

    def depth_of(i):
        # The first item comes before it is said whether the block decodes.
        still = i == 0 if prefill.interpreted else there_is_time & decodes & ((i == 0) | (decoding[0] != 0))
        return jnp.where(still, min(tiling.beside, tiling.stages), tiling.stages)

    @pl.when(warpgroup < _PREFILL_COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[1], action="increase")
        mosaic_prefill.multiply(computing, tiling, warpgroup, sinks[0] if has_sinks else None, out_ref, **computes)

    @pl.when(warpgroup == _PREFILL_COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")
        pass_on(order, order_out, computing.block)
        fill = functools.partial(mosaic_prefill.fill_gaps, computing, gaps, counts[1], out_ref, computes["zero_smem"])
        copied = mosaic_prefill.copy(computing, layer, q_ref, k_ref, v_ref, fill, depth_of=depth_of, **computes)
        mosaic_prefill.drain(computing, copied, **computes)

    @pl.when(warpgroup == _DECODES)
    def _():
        plgpu.set_max_registers(_DECODE_REGISTERS[1], action="decrease")
        refs = Refs(q_tiles, None, 0, out_ref, parts_ref, lse_ref)
        pl.when(decodes)(lambda: mosaic_decode.multiply(decode, 0, reading, Wgmma, refs, reads))

    @pl.when(warpgroup == _DECODE_COPIES)
    def _():
        plgpu.set_max_registers(_DECODE_REGISTERS[0], action="decrease")

        @pl.when(decodes)
        def _():
            decoding[0] = jnp.int32(1)
            mosaic_decode.copy(decode, 0, reading, layer, k_again, v_again, None, **reads)
            decoding[0] = jnp.int32(0)
            if decode.joins:
                mosaic_join.fill(owners, requests, out_ref, computing.block, decode.tiling.blocks, unowned=False)

    mosaic_prefill.leave(done, tiling)
