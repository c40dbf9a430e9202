"""Decode attention through Pallas' Mosaic GPU backend: Hopper GPUs.

Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023) with the keys split evenly over the GPU (see `decode_split`), and
joined by the last of those who had keys of a pair, or by a kernel of its own (see `mosaic_join`).

A block holds streams, each a pair of warpgroups: one that copies tiles of K and V into shared memory with the tensor
memory accelerator, and one that multiplies them with the query heads that share the KV head (see `mosaic_compute`).

What is not mapped is never addressed: a last tile is copied as far as there are boxes of `KV_TAIL_TOKENS` tokens, up to
which the manager maps, with tokens of the request. Behind them is what was there before, and it is not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import decode_split, mosaic_columns, mosaic_copy, mosaic_join, mosaic_pace
from jax_vattention.attention.decode_shape import Shape, Tiling, default_tiling
from jax_vattention.attention.decode_split import GRAIN, Piece, Work
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_compute import Refs
from jax_vattention.attention.mosaic_rows import Products, Rows, Wgmma
from jax_vattention.attention.mosaic_view import (
    BOX,
    ROWS,
    Columns,
    part_of,
    pass_on,
    place_of_box,
    swizzled,
    tokens_of,
)
from jax_vattention.attention.tilings import tuned
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_REGISTERS = {2: (208, 40)}
"""Of a thread of the warpgroups that multiply and copy, by the streams of a block. A thread of one stream has all that
it can have."""


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of what `mosaic_view.refusal` lets pass; None if it serves these arguments."""
    del features  # all of them
    group, head_dim = q.shape[1] // view.num_kv_heads, q.shape[2]
    slots, slot_tokens = view.k.shape[0], view.slot_tokens
    for refused, what in (
        (view.k.dtype not in (q.dtype, jnp.float8_e4m3fn), f"{q.dtype} queries of a {view.k.dtype} cache"),
        (head_dim not in (64, 96, 128, 192, 256), f"head_dim {head_dim}"),
        (group * batch.max_q_len > ROWS, f"{batch.max_q_len} queries of {group} query heads for a KV head"),
        # With the room of pairs its units are more.
        (slots * slot_tokens // GRAIN * view.num_kv_heads >= 2**30, f"{slots} slots of {slot_tokens} tokens"),
    ):
        if refused:
            return what
    return None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    page_table: jax.Array | None = None,
    products: type[Products] = Wgmma,
    interpret: Any = False,
    interpret_tables: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`.

    Args:
      page_table: int32 `[requests, pages]`: where in its slot each `GRAIN` tokens of a request are, in as many tokens.
        Only to measure what the indirection of a paged cache costs (`benchmarks/decode.py`): ours needs none.
      products: how the GPU multiplies.
    """
    if tiling is None:
        default = default_tiling(view.head_dim, view.k.dtype, batch.num_requests * view.num_kv_heads)
        tiling = tuned(default, "mosaic_decode", view)
    shape = Shape.of(
        q, view, batch, features, scale=scale, tiling=tiling, narrow_products=products.narrow,
        paged=page_table is not None, interpret=interpret,
    )  # fmt: skip
    columns = Columns.of(view, together=shape.together, interpreted=shape.interpreted)
    split = decode_split.split(
        batch, view, features, tokens=q.shape[0], sets=shape.sets, streams=shape.streams,
        room=shape.room(batch.num_requests), interpret=interpret_tables,
    )  # fmt: skip
    # No float8 is widened to bfloat16; a narrow product splits its queries itself.
    queries = shape.query_tiles(q.astype(jnp.float16) if shape.quantized and not shape.narrow else q, batch)
    pages = jnp.zeros((1, 1), jnp.int32) if page_table is None else page_table
    scales = jnp.ones(1, jnp.float32) if view.scale_table is None else view.scale_table.reshape(-1)
    out_types = (jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, order))
    out, order, parts, lse = plgpu.kernel(
        functools.partial(_decode, shape=shape, products=products),
        out_type=(*out_types, *shape.parts(batch)),
        scratch_types=scratch_types(shape, queries.dtype, view.k.dtype, q.dtype)
        | products.scratch(shape, queries.dtype),
        grid=(shape.tiling.blocks,),
        grid_names=("block",),
        num_threads=2 * shape.tiling.streams,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="attention_decode",
    )(
        queries,
        *columns,
        split.requests,
        split.streams,
        split.owners,
        pages,
        view.layer.reshape(1),
        scales,
        order,
    )
    if shape.joins:
        return out, order
    return decode_split.join(
        out, parts, lse, split, order, features, heads=view.num_kv_heads, sets=shape.sets, first_row=shape.first_row,
        product_row=shape.product_row, whole_are_there=shape.direct, interpret=interpret_tables,
    )  # fmt: skip


def scratch_types(shape: Shape, dtype: Any, kv_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory of a block, for each stream."""
    streams, stages, block_k = shape.tiling.streams, shape.stages, shape.tiling.block_k

    def tiles(*sizes: int, dtype: Any = dtype):
        return swizzled((streams, *sizes), dtype)

    def kv():
        return swizzled((streams, stages, *shape.tile), kv_dtype, rank=len(shape.tile))

    many = streams * stages
    whole = shape.copies * shape.arrivals(shape.tile_tokens // shape.copies)
    rows = (("out_smem", out_dtype), ("part_smem", jnp.float32))
    return {
        "q_smem": tiles(2, shape.rows if shape.keys_as_rows else ROWS, shape.head_dim),
        **({"q_parts": tiles(shape.part_rows, shape.head_dim, dtype=kv_dtype)} if shape.narrow else {}),
        "k_smem": kv(),
        "v_smem": kv(),
        **(mosaic_columns.scratch(shape, dtype) if shape.keys_as_rows else {}),
        **{name: tiles(block_k, shape.head_dim, dtype=jnp.float16) for name in shape.widened},
        **(
            {name: plgpu.SMEM((streams, ROWS, shape.head_dim), each) for name, each in rows}
            if shape.interpreted
            else {}
        ),
        "q_ready": plgpu.Barrier(
            num_arrivals=2 * shape.rows // BOX if shape.in_eights else 1, num_barriers=2 * streams
        ),
        "k_ready": plgpu.Barrier(num_arrivals=whole, num_barriers=many),
        "v_ready": plgpu.Barrier(num_arrivals=whole, num_barriers=many),
        "k_tail_ready": plgpu.Barrier(num_arrivals=shape.tail_arrivals, num_barriers=many),
        "v_tail_ready": plgpu.Barrier(num_arrivals=shape.tail_arrivals, num_barriers=many),
        "k_free": plgpu.Barrier(num_barriers=many),
        "v_free": plgpu.Barrier(num_barriers=many),
        **({"flags": plgpu.SMEM((streams, 2), jnp.int32)} if shape.joins else {}),
    }


def _decode(
    q_ref,
    k_ref,
    v_ref,
    requests,
    streams,
    owners,
    pages,
    layer_ref,
    scales,
    order,
    out_ref,
    order_out,
    parts_ref,
    lse_ref,
    *,
    shape: Shape,
    products: type[Products],
    **scratch,
):
    """One block; `decode_split.Split` has the tables, `scratch_types` and `Products.scratch` the rest.

    Args:
      q_ref: see `Shape.query_tiles`.
      k_ref, v_ref: see `Columns`.
      scales: of each layer those of each head of K, then of V; used if they are float8.
      order: to have it makes the read come after the append that returned it.
      order_out: the same once more: it comes out when the kernel is over.
      out_ref, parts_ref, lse_ref: see `decode_split.join`.
    """
    warpgroup, block, count = lax.axis_index("warpgroup"), lax.axis_index("block"), shape.tiling.streams
    local = lax.rem(warpgroup, count)
    work = Work(requests, streams, block * count + local, shape.together, shape.room(requests.shape[0]))
    limited = _REGISTERS.get(count)

    @pl.when(warpgroup >= count)
    def _():
        if limited:
            plgpu.set_max_registers(limited[1], action="decrease")
        layer, together = layer_ref[0] * shape.layer_stride, products.together(shape)
        copy(shape, local, work, layer, k_ref, v_ref, pages, together=together, **scratch)

        @pl.when(local == 0)
        def _():
            pass_on(order, order_out, block)
            if shape.joins:
                mosaic_join.fill(owners, requests, out_ref, block, shape.tiling.blocks, unowned=True)

    @pl.when(warpgroup < count)
    def _():
        if limited:
            plgpu.set_max_registers(limited[0], action="increase")
        first_scale = 2 * shape.num_kv_heads * layer_ref[0]
        refs = Refs(q_ref, scales, first_scale, out_ref, parts_ref, lse_ref)
        multiply(shape, local, work, products, refs, scratch)


class _Progress(NamedTuple):
    """Of the warpgroup that copies: tiles, the first ones of them whose memory others can have, keys, and how many
    tiles may be under way."""

    tiles: jax.Array
    free: jax.Array
    keys: jax.Array
    depth: jax.Array


def copy(
    shape: Shape, local, work: Work, layer, k_ref, v_ref, pages, *, k_smem, v_smem, k_ready, v_ready, k_tail_ready,
    v_tail_ready, k_free, v_free, together: tuple[int | None, int | None] = (None, None), **_,
):  # fmt: skip
    """The warpgroup that copies K and V for the stream with this number in its block.

    Args:
      together: see `Products.together`.
    """
    tokens, stages = shape.tile_tokens, shape.stages
    sides = (
        (k_ref, k_smem, k_ready, k_tail_ready, k_free, together[0]),
        (v_ref, v_smem, v_ready, v_tail_ready, v_free, together[1]),
    )

    def wait_until_free(free, first, end):
        def wait(tile, nothing):
            plgpu.barrier_wait(free.at[local * stages + lax.rem(tile, stages)])
            return nothing

        lax.fori_loop(first, end, wait, None)

    def piece(piece: Piece, state: _Progress):
        base, columns = piece.of.row, (layer, layer + shape.v_column)

        def place(token):
            """Where in its slot a token is."""
            if not shape.paged:
                return token
            return pages[piece.request, lax.div(token, GRAIN)] * GRAIN + lax.rem(token, GRAIN)

        def tile(tile, state: _Progress, *, tail: bool):
            # With this one at most `depth` are under way. Where that has grown, there is nothing to wait for.
            end = jnp.maximum(state.tiles - state.depth + 1, state.free)
            stage = lax.rem(state.tiles, stages)
            barrier = local * stages + stage
            token = piece.first + tile * tokens
            for column, (ref, smem, ready, tail_ready, free, line) in zip(columns, sides, strict=True):
                wait_until_free(free, state.free, end)
                to = functools.partial(_copy, shape, ref, base, column, piece.head, smem.at[local, stage], line)
                if tail:
                    _copy_tail(shape, to, token, piece.end, place, tail_ready.at[barrier])
                    continue
                size = tokens // shape.copies
                for part in range(0, tokens, size):
                    to(place(token + part), part // BOX, size, ready.at[barrier])
            keys, depth = state.keys + (piece.end - token if tail else tokens), state.depth
            if shape.tiling.behind:
                depth = mosaic_pace.depth(shape, work.streams, state.keys, keys, depth)
            return _Progress(state.tiles + 1, end, keys, depth)

        whole = piece.whole_tiles(tokens)
        state = lax.fori_loop(0, whole, functools.partial(tile, tail=False), state)
        return lax.fori_loop(whole, piece.tiles(tokens), functools.partial(tile, tail=True), state)

    state = work.each_piece(piece, _Progress(*map(jnp.int32, (0, 0, 0, shape.tiling.stages))))
    if shape.tiling.behind:
        mosaic_pace.end(shape, work.streams)
    for free in (k_free, v_free):
        wait_until_free(free, state.free, state.tiles)


def _copy_tail(shape: Shape, to: Callable[..., None], token, end, place: Callable[[Any], Any], ready) -> None:
    """Copies a tile, from a token on, as far as there are tokens: no box more. It arrives as often as any such tile."""
    boxes = lax.div(end - token + BOX - 1, BOX)

    def copy(first, stop, size: int):
        def one(number, nothing):
            box = number * (size // BOX)
            to(place(token + box * BOX), box, size, ready)
            return nothing

        lax.fori_loop(first, stop, one, None)

    def arrive(_, nothing):
        plgpu.barrier_arrive(ready)
        return nothing

    several = lax.div(boxes, shape.boxes_at_once)
    copy(0, several, shape.boxes_at_once * BOX)
    left = boxes
    if shape.boxes_at_once > 1:
        copy(several * shape.boxes_at_once, boxes, BOX)
        left = several + boxes - several * shape.boxes_at_once
    lax.fori_loop(left * shape.arrivals(BOX), shape.tail_arrivals, arrive, None)


def _copy(shape: Shape, ref, base, column, head, smem, together, token, box, size: int, ready) -> None:
    """Copies so many tokens of a set, from one of a slot on, to where a box of a tile is."""
    # Partial results and tables stay in L2 then. Where rows are longer, and there is less to join, nothing is gained.
    policy, row = mosaic_copy.READ_ONCE if shape.quantized else None, base + token
    if shape.together == 1:
        tokens = tokens_of(ref, row, size, column, head, interpreted=shape.interpreted)
        smem = part_of(smem, box, size, interpreted=shape.interpreted)
        mosaic_copy.copy(tokens, smem, ready, policy=policy, together=together, interpreted=shape.interpreted)
        return
    for token in range(0, size, shape.copied_tokens):
        if shape.interpreted:
            source = ref.at[row + token, column, pl.ds(head, shape.together)]
            target = smem.at[pl.ds((box * BOX + token) * shape.together, shape.together)]
        else:
            source = ref.at[*place_of_box(row + token, column), :, lax.div(head, shape.together)]
            target = smem.at[pl.ds(box * BOX + token, BOX)]
        mosaic_copy.copy(source, target, ready, policy=policy, together=together, interpreted=shape.interpreted)


def multiply(shape: Shape, local, work: Work, products: type[Products], refs: Refs, scratch: dict[str, Any]) -> None:
    """The warpgroup that computes for the stream with this number in its block; see `scratch_types`."""
    if shape.keys_as_rows:
        mosaic_columns.Columns(shape, local, work, refs, **scratch).run()
    else:
        Rows(shape, local, work, products, refs, **scratch).run()
