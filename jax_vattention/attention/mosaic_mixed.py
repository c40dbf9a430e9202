"""Decodes and chunks of prompts of one step in one kernel: Hopper GPUs.

Decoding waits for memory and prefill for the tensor cores, so at the same time they take less than one after the other
(POD-Attention, Kamath et al., arXiv 2410.18038). There the two share a multiprocessor; here some blocks decode as
`mosaic_decode` does, and the others multiply as `mosaic_prefill` does. How many decode follows from the work of both.
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

from jax_vattention.attention import decode_split, mosaic_decode, mosaic_prefill
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_view import BLOCKS, Columns
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_COPIES = 2
"""The warpgroup that copies; those before it multiply, of which decoding uses the first."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What may be tuned, beside the tilings of the two kernels."""

    flops_per_byte: float = 100.0
    """What a block computes in a prefill while another one reads a byte in a decode: what a block of each is worth."""
    blocks: int = BLOCKS


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    prefill_tiling: mosaic_prefill.Tiling | None = None,
    interpret: Any = False,
    interpret_tables: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`. Requests of one query are decodes."""
    head_dim, dtype = q.shape[2], view.k.dtype
    tiling = tiling or tuned(Tiling(), "mosaic_mixed", head_dim, dtype)
    prefill_tiling = prefill_tiling or tuned(mosaic_prefill.Tiling(), "mosaic_prefill", head_dim, dtype)
    prefill_tiling = dataclasses.replace(prefill_tiling, blocks=tiling.blocks)
    decode_tiling = mosaic_decode.Tiling(blocks=tiling.blocks)

    decodes, first, chunks = parted(q, batch)
    one = dataclasses.replace(features, prefix_lens=None)  # which change nothing for a request's last token
    decode = mosaic_decode.Shape.of(
        q, view, decodes, one, scale=scale, tiling=decode_tiling, products=mosaic_decode.Wgmma, interpret=interpret
    )
    prefill = mosaic_prefill.shape_of(q, view, features, scale=scale, tiling=prefill_tiling, interpret=interpret)
    schedule = mosaic_prefill.schedule(
        chunks, view, features, prefill, q.shape[0], view.k.shape[1], others=decodes.q_lens
    )
    many = _decoding_blocks(decode, prefill, schedule, decodes, tiling.flops_per_byte, dtype.itemsize)
    split = decode_split.split(
        decodes, view, one, tokens=batch.num_requests, sets=decode.sets, streams=tiling.blocks, active=many,
        out_rows=first, interpret=interpret_tables,
    )  # fmt: skip
    sinks = () if features.sinks is None else (features.sinks,)
    columns = Columns.of(view)
    out, order, parts, lse = plgpu.kernel(
        functools.partial(_mixed, decode=decode, prefill=prefill, tiling=prefill_tiling, has_sinks=bool(sinks)),
        out_type=(*mosaic_prefill.results(prefill, q, order), *decode.parts(decodes)),
        scratch_types=_scratch(decode, prefill, prefill_tiling, dtype),
        grid=(tiling.blocks,),
        grid_names=("block",),
        num_threads=_COPIES + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_mixed",
    )(
        mosaic_prefill.padded(q, prefill),
        decode.query_tiles(q[first], decodes),
        columns.k,
        columns.v,
        *schedule,
        split.requests,
        split.streams,
        many,
        view.layer.reshape(1),
        order,
        *sinks,
    )
    out, order = decode_split.join(
        out, parts, lse, split, order, one, heads=view.num_kv_heads, sets=decode.sets, first_row=decode.first_row,
        whole_are_there=decode.direct, fill=False, interpret=interpret_tables,
    )  # fmt: skip
    return out[: q.shape[0]], order


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


def _decoding_blocks(
    decode: mosaic_decode.Shape,
    prefill: mosaic_prefill.Shape,
    schedule: mosaic_prefill.Schedule,
    decodes: RaggedBatch,
    flops_per_byte: float,
    itemsize: int,
) -> jax.Array:
    """int32 `[1]`: how many blocks decode, so that both kinds end at the same time; at least one prefills."""
    blocks = prefill.tiling.blocks
    lengths = jnp.where(decodes.q_lens > 0, decodes.kv_lens, 0)
    if decode.window is not None:
        lengths = jnp.minimum(lengths, decode.window)
    keys = lengths.sum().astype(jnp.float32)
    reading = keys * (2 * decode.num_kv_heads * decode.head_dim * itemsize * flops_per_byte)
    tiles = schedule.tiles[:, mosaic_prefill.Tile._fields.index("blocks")].sum().astype(jnp.float32)
    tile_flops = 4 * prefill.head_dim * prefill.block_q * prefill.tiling.block_k
    computing = tiles * (prefill.num_q_heads * tile_flops)
    share = reading / jnp.maximum(reading + computing, 1)
    return jnp.clip(jnp.round(share * blocks), keys > 0, blocks - 1).astype(jnp.int32).reshape(1)


def _scratch(
    decode: mosaic_decode.Shape, prefill: mosaic_prefill.Shape, tiling: mosaic_prefill.Tiling, dtype: Any
) -> dict[str, Any]:
    """Shared memory, which a block uses for one thing or the other, and the barriers of both."""
    both = (
        mosaic_decode.scratch_types(decode, dtype, dtype, dtype),
        mosaic_prefill.scratch_types(prefill, tiling, dtype),
    )
    arrays, barriers = zip(*(_by_kind(each) for each in both), strict=True)
    return {"memory": plgpu.RefUnion(*arrays), "barriers": barriers}


def _by_kind(scratch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    barriers = {name: each for name, each in scratch.items() if isinstance(each, plgpu.Barrier)}
    return {name: each for name, each in scratch.items() if name not in barriers}, barriers


def _mixed(
    q_ref, q_tiles, k_ref, v_ref, tiles, gaps, counts, requests, streams, many_ref, layer_ref, order, *refs,
    decode: mosaic_decode.Shape, prefill: mosaic_prefill.Shape, tiling: mosaic_prefill.Tiling, has_sinks: bool, memory,
    barriers,
):  # fmt: skip
    """One block. Arguments are those of the two kernels, and of how many blocks decode: those with low numbers."""
    *sinks, out_ref, order_out, parts_ref, lse_ref = refs
    warpgroup, block, many = lax.axis_index("warpgroup"), lax.axis_index("block"), many_ref[0]
    own, others = (arrays | each for arrays, each in zip(memory, barriers, strict=True))
    layer = layer_ref[0] * prefill.layer_stride
    reading = mosaic_decode.Work(requests, streams, block, jnp.int32(0), decode)
    computing = mosaic_prefill.Work(
        tiles, counts[0] * prefill.num_q_heads, block - many, prefill.tiling.blocks - many, prefill
    )

    @pl.when(warpgroup == _COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")

        @pl.when(block < many)
        def _():
            mosaic_decode.copy(reading, layer, k_ref, v_ref, None, **own)

        @pl.when(block >= many)
        def _():
            mosaic_prefill.pass_on(order, order_out, block - many)
            fill = functools.partial(mosaic_prefill.fill_gaps, computing, gaps, counts[1], out_ref, others["zero_smem"])
            copied = mosaic_prefill.copy(computing, layer, q_ref, k_ref, v_ref, fill, **others)
            mosaic_prefill.drain(computing, copied, **others)

    @pl.when(warpgroup < _COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[1], action="increase")

        @pl.when((block < many) & (warpgroup == 0))
        def _():
            mosaic_decode.multiply(
                reading, mosaic_decode.Wgmma, q_tiles, None, None, 0, out_ref, parts_ref, lse_ref, **own
            )

        @pl.when(block >= many)
        def _():
            sink = sinks[0] if has_sinks else None
            mosaic_prefill.multiply(computing, tiling, warpgroup, sink, out_ref, **others)
