"""Decodes and chunks of prompts of one step in one kernel: Hopper GPUs.

Decoding waits for memory and prefill for the tensor cores, so at the same time they take less than one after the other
(POD-Attention, Kamath et al., arXiv 2410.18038). There the two share a multiprocessor; here every block has its share
of both, first decodes as `mosaic_decode` does and then multiplies as `mosaic_prefill` does, or the other way round: so
at any time some read memory and others compute, whatever there is of each. Blocks of a cluster prefill together, hence
in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
    mosaic_pace,
    mosaic_prefill,
    prefill_shape,
    prefill_split,
)
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_compute import Refs
from jax_vattention.attention.mosaic_rows import Wgmma
from jax_vattention.attention.mosaic_view import Columns, pass_on
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_COPIES = 2
"""The warpgroup that copies; those before it multiply, in decoding the first of them."""


@dataclasses.dataclass(frozen=True)
class Tiling(mosaic_prefill.Tiling):
    """What may be tuned: what a prefill has, with other defaults."""

    cluster: int = 2
    """Blocks that prefill together leave more of what L2 delivers to those that decode."""
    registers: tuple[int, int] = (72, 216)
    """The warpgroup that copies does so for both, and has more to keep."""
    keep_keys: bool = True
    """What decodes read, each key once, would displace K and V of the prefill, which all tiles of queries read."""


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
      tiling, decode_tiling: of the two parts. One stream of a block decodes, in no more blocks than there are.
    """
    kernels = "mosaic_prefill", "mosaic_mixed"
    tiling = mosaic_prefill.tiling_of(tiling, Tiling(), q, view, kernels=kernels, interpret=interpret)
    if decode_tiling is None:
        decode_tiling = tuned(default_decode_tiling(q.shape[2], view.k.dtype), "mosaic_mixed_decode", view)
    blocks = min(decode_tiling.blocks, tiling.blocks)
    decode_tiling = dataclasses.replace(decode_tiling, blocks=blocks, streams=1)
    decodes, first, chunks = parted(q, batch)
    one = dataclasses.replace(features, prefix_lens=None)  # which change nothing for a request's last token
    decode = decode_shape.Shape.of(
        q, view, decodes, one, scale=scale, tiling=decode_tiling, narrow_products=True, interpret=interpret
    )
    prefill = mosaic_prefill.shape_of(q, view, features, scale=scale, tiling=tiling, interpret=interpret)
    schedule = prefill_split.schedule(
        chunks, view, features, prefill.split_sizes(q.shape[0]), others=decodes.q_lens, interpret=interpret_tables
    )
    # A row for each request is gathered only where it has to be padded anyway.
    queries, query_rows = (q, first) if decode.reads_queries else (q[first], None)
    split = decode_split.split(
        decodes, view, one, tokens=batch.num_requests, sets=decode.sets, streams=decode.streams,
        query_rows=query_rows, out_rows=first, interpret=interpret_tables,
    )  # fmt: skip
    sinks = () if features.sinks is None else (features.sinks,)
    columns = Columns.of(view, interpreted=prefill.interpreted)
    in_sets = Columns.of(view, together=decode.together, interpreted=decode.interpreted)
    out, order, parts, lse = plgpu.kernel(
        functools.partial(_mixed, decode=decode, prefill=prefill, tiling=tiling, has_sinks=bool(sinks)),
        out_type=(*mosaic_prefill.results(prefill, q, order), *decode.parts(decodes)),
        scratch_types=_scratch(decode, prefill, tiling, view.k.dtype),
        **tiling.grid,
        num_threads=_COPIES + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_mixed",
    )(
        mosaic_prefill.padded(q, prefill),
        decode.query_tiles(queries, decodes),
        *columns,
        *in_sets,
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
        product_row=decode.product_row,
        whole_are_there=decode.direct, fill=False, interpret=interpret_tables,
    )  # fmt: skip
    return out[: q.shape[0]], order


def default_decode_tiling(head_dim: int, kv_dtype: Any) -> decode_shape.Tiling:
    """Where nothing was tuned."""
    return dataclasses.replace(decode_shape.default_tiling(head_dim, kv_dtype), behind=0)


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


def _scratch(
    decode: decode_shape.Shape, prefill: prefill_shape.Shape, tiling: mosaic_prefill.Tiling, dtype: Any
) -> dict[str, Any]:
    """Shared memory, which a block uses for one thing or the other, and the barriers of both."""
    both = (
        mosaic_decode.scratch_types(decode, dtype, dtype, dtype),
        mosaic_prefill.scratch_types(prefill, tiling, dtype),
    )
    arrays, barriers = zip(*(_by_kind(each) for each in both), strict=True)
    between = tiling.barrier(num_arrivals=_COPIES + 1)
    return {"memory": plgpu.RefUnion(*arrays), "barriers": barriers, "between": between}


def _by_kind(scratch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    kinds = plgpu.Barrier, plgpu.ClusterBarrier
    barriers = {name: each for name, each in scratch.items() if isinstance(each, kinds)}
    return {name: each for name, each in scratch.items() if name not in barriers}, barriers


def _mixed(
    q_ref, q_tiles, k_ref, v_ref, k_sets, v_sets, tiles, gaps, counts, requests, streams, owners, layer_ref, order,
    *refs, decode: decode_shape.Shape, prefill: prefill_shape.Shape, tiling: mosaic_prefill.Tiling, has_sinks: bool,
    memory, barriers, between,
):  # fmt: skip
    """One block. Arguments are those of the two kernels."""
    *sinks, out_ref, order_out, parts_ref, lse_ref = refs
    warpgroup = lax.axis_index("warpgroup")
    own, others = (arrays | each for arrays, each in zip(memory, barriers, strict=True))
    layer = layer_ref[0] * prefill.layer_stride
    computing = mosaic_prefill.Work.of(tiles, counts[0], prefill)
    reading = decode_split.Work(requests, streams, computing.block, decode.together)
    number_of_decodes = lax.rem(computing.cluster, 2)

    def in_both_orders(decodes: Callable[[], None], prefills: Callable[[], None]) -> None:
        def job(number, nothing):
            @pl.when(number > 0)
            def _():
                # The second one uses the shared memory of the first one; prefill that of all blocks of its cluster.
                mosaic_prefill.meet(between)

            is_decode = number_of_decodes == number
            pl.when(is_decode & (computing.block < decode.tiling.blocks))(decodes)
            pl.when(jnp.logical_not(is_decode))(prefills)
            return nothing

        lax.fori_loop(0, 2, job, None)

    @pl.when(warpgroup == _COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[0], action="decrease")

        def prefill_copies():
            fill = functools.partial(mosaic_prefill.fill_gaps, computing, gaps, counts[1], out_ref, others["zero_smem"])
            copied = mosaic_prefill.copy(computing, layer, q_ref, k_ref, v_ref, fill, **others)
            mosaic_prefill.drain(computing, copied, **others)

        def decodes():
            team = _team(number_of_decodes, decode, tiling.cluster)
            mosaic_decode.copy(decode, 0, reading, layer, k_sets, v_sets, None, team=team, **own)
            if decode.joins:
                mosaic_join.fill(owners, requests, out_ref, computing.block, decode.tiling.blocks, unowned=False)

        pass_on(order, order_out, computing.block)
        in_both_orders(decodes, prefill_copies)

    @pl.when(warpgroup < _COPIES)
    def _():
        plgpu.set_max_registers(tiling.registers[1], action="increase")

        def decodes():
            @pl.when(warpgroup == 0)
            def _():
                refs = Refs(q_tiles, None, 0, out_ref, parts_ref, lse_ref)
                mosaic_decode.multiply(decode, 0, reading, Wgmma, refs, own)

        def prefills():
            sink = sinks[0] if has_sinks else None
            mosaic_prefill.multiply(computing, tiling, warpgroup, sink, out_ref, **others)

        in_both_orders(decodes, prefills)

    mosaic_prefill.leave(between, tiling)


def _team(number: jax.Array, decode: decode_shape.Shape, cluster: int) -> mosaic_pace.Team:
    """Of a block whose job of this number is to decode: others do so at another time."""
    first = sum(block // cluster % 2 == 0 for block in range(decode.tiling.blocks))
    sizes = first, decode.tiling.blocks - first
    most = tuple(int(decode.tiling.after * size) for size in sizes)
    return mosaic_pace.Team(number, *(jnp.where(number == 0, *map(jnp.int32, each)) for each in (sizes, most)))
