"""What the kernels for Hopper GPUs share: how they see a cache, and which caches and queries they can read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.features import Features
from jax_vattention.cache import LayerView
from jax_vattention.spec import KV_TAIL_TOKENS

BLOCKS = 132
"""Multiprocessors of an H100 or H200; a block fills one."""
THREADS = 128
"""Of a warpgroup."""
ROWS = 64
"""Of a `wgmma`."""
BOX = 8
"""Tokens of the smallest copy: rows of a swizzled tile in shared memory."""
_RUN = KV_TAIL_TOKENS // BOX
"""Boxes that lie together."""


class Columns(NamedTuple):
    """K and V as rows of runs of 16 tokens, with columns for the boxes of K and V of all layers: the same memory."""

    k: jax.Array
    """`[slots * slot_tokens / 16, columns, 8, num_kv_heads, head_dim]`, or with heads in sets `[..., 8, sets, heads of
    a set, head_dim]`. As the interpreter cannot take a tile of boxes for one of tokens, for it a copy `[slots *
    slot_tokens, columns, num_kv_heads, head_dim]`, in which a K or V has one column."""
    v: jax.Array

    @classmethod
    def of(cls, view: LayerView, *, together: int = 1, interpreted: bool) -> Columns:
        """Those of a layer's view, with so many heads in a set."""
        sets = (view.num_kv_heads // together, together) if together > 1 and not interpreted else (view.num_kv_heads,)
        heads = *sets, view.head_dim
        columns = 1 if view.v is not None else math.prod(view.k.shape[2:4])
        if interpreted:
            runs = (each.reshape(-1, columns, KV_TAIL_TOKENS, *heads) for each in view.views)
            return cls(*(each.swapaxes(1, 2).reshape(-1, columns, *heads) for each in runs))
        return cls(*(each.reshape(-1, columns * _RUN, BOX, *heads) for each in view.views))


def tile_sizes(tokens: int, head_dim: int, *, interpreted: bool) -> tuple[int, ...]:
    """Of shared memory for so many tokens of one head of `Columns`."""
    return (tokens, head_dim) if interpreted else (tokens // KV_TAIL_TOKENS, _RUN, BOX, head_dim)


def tokens_of(ref, row: jax.Array, tokens: int, column: jax.Array, head: jax.Array, *, interpreted: bool):
    """So many tokens from a row on of an array of `Columns`: whole runs, as `tile_sizes` has them, or one box.

    Args:
      column: number of the K or V.
    """
    if interpreted:
        return ref.at[pl.ds(row, tokens), column, head]
    if tokens == BOX:
        run, box = place_of_box(row, column)
        return ref.at[pl.ds(run, 1), pl.ds(box, 1), :, head]
    runs = pl.ds(lax.div(row, KV_TAIL_TOKENS), tokens // KV_TAIL_TOKENS)
    return ref.at[runs, pl.ds(column * _RUN, _RUN), :, head]


def place_of_box(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column, of an array of `Columns`, of the box that begins with a row of the K or V of this number."""
    return lax.div(row, KV_TAIL_TOKENS), column * _RUN + lax.div(lax.rem(row, KV_TAIL_TOKENS), BOX)


def part_of(tile, first_box: Any, tokens: int, *, interpreted: bool):
    """So many tokens from a box of 8 tokens on, of a tile: whole runs, or one box."""
    if interpreted:
        return tile.at[pl.ds(first_box * BOX, tokens)]
    run = first_box // _RUN if isinstance(first_box, int) else lax.div(first_box, _RUN)
    if tokens == BOX:
        return tile.at[pl.ds(run, 1), pl.ds(first_box - run * _RUN, 1)]
    return tile.at[pl.ds(run, tokens // KV_TAIL_TOKENS)]


def as_rows(tile):
    """A tile as a matrix: the same memory."""
    *tokens, head_dim = tile.shape
    return tile if len(tokens) == 1 else tile.reshape(math.prod(tokens), head_dim)


@dataclasses.dataclass(frozen=True)
class CommonShape:
    """Static sizes that the kernels for decode and for prefill have in common."""

    group: int
    """Query heads of a KV head."""
    head_dim: int
    scale: float
    soft_cap: float | None
    window: int | None
    interpreted: bool
    layer_stride: int
    """From one layer to the next in `Columns`; 0 where a layer has arrays of its own."""
    v_column: int
    """Of V, from that of K of its layer; 0 where V is an array of its own."""

    @staticmethod
    def common(q: jax.Array, view: LayerView, features: Features, *, scale: float, interpret: Any) -> dict[str, Any]:
        """These, for a kernel with these arguments."""
        return {
            "group": q.shape[1] // view.num_kv_heads,
            "head_dim": q.shape[2],
            "scale": scale,
            "soft_cap": features.soft_cap,
            "window": view.window,
            "interpreted": bool(interpret),
            "layer_stride": 2 if view.v is None else 0,
            "v_column": 1 if view.v is None else 0,
        }


def swizzled(sizes: tuple[int, ...], dtype: Any, together: int | None = None, *, rank: int = 2) -> Any:
    """Shared memory as tensor cores read it.

    Args:
      together: as much of a row is swizzled as divides so many of its elements; all of them, unless said.
      rank: of a tile: how many of the last sizes.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd((together or sizes[-1]) * itemsize, 128)
    tiling = (*(1,) * (rank - 2), BOX, swizzle // itemsize)
    return plgpu.SMEM(sizes, dtype, transforms=(plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)))


def operand(tile, together: int | None = None) -> Any:
    """The type of a tile that is as `swizzled` makes it, in all of its dimensions, for what is inlined in a kernel."""
    return plgpu.RefType(swizzled(tile.shape, tile.dtype, together, rank=len(tile.shape)).transforms)


def pass_on(order, order_out, block) -> None:
    """The first block copies the order token."""

    @pl.when(block == 0)
    def _():
        for i in range(order.shape[0]):
            order_out[i] = order[i]


def store_rows(
    result, out_ref, token, head, low, high, *, group: int = 1, first_column: int = 0, first_eights: bool = False
) -> None:
    """Writes rows `low .. high - 1` of an array in the layout of a `wgmma`, from registers.

    Copies of shared memory take 8 rows, or one if not swizzled.

    Args:
      token, head: where row `low` goes in `out_ref`, `[tokens, heads, columns]`; the next ones are the other heads of a
        group, then those of the next token.
      first_column: the result's first one in `out_ref`.
      first_eights: rows are those of the first, third, ... eight, one after the other.
    """
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), scalar, scalar, scalar, scalar))
    def store(_, result, out, *scalars):
        index = ir.IndexType.get()
        token, head, low, high = (arith.index_cast(index, each.registers.item()) for each in scalars)
        firsts: dict[int, tuple] = {}
        places = result.layout.thread_idxs(result.shape)
        for at, place in zip(np.ndindex(result.registers.shape), places, strict=True):
            firsts.setdefault(at[4], place)
        for half, (row, column) in firsts.items():  # the thread's upper and lower row
            if first_eights:
                if half:
                    continue
                eight = mgpu.c(BOX, index)
                row = arith.addi(arith.muli(arith.divui(row, mgpu.c(2 * BOX, index)), eight), arith.remui(row, eight))
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, row, low), arith.cmpi(arith.CmpIPredicate.slt, row, high)
            )
            with mgpu.when(inside):
                number = arith.subi(row, low)
                size = mgpu.c(group, index)
                to_token = arith.addi(token, arith.divui(number, size) if group > 1 else number)
                to_head = arith.addi(head, arith.remui(number, size)) if group > 1 else head
                for at, register in np.ndenumerate(result.registers):
                    if at[4] == half:
                        to_column = arith.addi(column, mgpu.c(8 * at[1] + first_column, index))
                        vector.store(register, out, [to_token, to_head, to_column])

    store(result, out_ref, token, head, low, high)


def add_eights(array: jax.Array, factor: float) -> jax.Array:
    """Adds to each row of the first, third, ... eight `factor` times the row eight below, and writes it to both.

    Args:
      array: float32, in the layout of a `wgmma`: a thread has both rows.
    """
    own = plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=own)
    def add(_, array):
        registers = array.registers.copy()
        for at, register in np.ndenumerate(array.registers):
            if at[4]:
                continue
            below = (*at[:4], 1, *at[5:])
            many = vector.broadcast(register.type, mgpu.c(factor, ir.F32Type.get()))
            total = arith.addf(register, arith.mulf(array.registers[below], many))
            registers[at] = registers[below] = total
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return add(array)


def repeat_eights(array: jax.Array, *, interpreted: bool) -> jax.Array:
    """`array`, `[rows, ...]`, with each second eight of rows the same as the one before it."""
    return _with_second_eights(array, lambda first, _: first, array, interpreted=interpreted)


def zero_second_eights(array: jax.Array, *, interpreted: bool) -> jax.Array:
    """`array`, `[rows, ...]`, with zeros in each second eight of rows."""

    def zero(first, _):
        if interpreted:
            return jnp.zeros_like(first)
        return vector.broadcast(first.type, mgpu.c(0.0, ir.VectorType(first.type).element_type))

    return _with_second_eights(array, zero, array, interpreted=interpreted)


def second_eights_of(array: jax.Array, other: jax.Array, *, interpreted: bool) -> jax.Array:
    """`array`, `[rows, ...]`, with each second eight of rows that of `other`."""
    return _with_second_eights(array, lambda _, second: second, other, interpreted=interpreted)


def _with_second_eights(
    array: jax.Array, second: Callable[[Any, Any], Any], other: jax.Array, *, interpreted: bool
) -> jax.Array:
    """`array`, with `second` of each first eight of it and each second one of `other` in the latter's place.

    In registers a thread has an upper row, in a first eight, and a lower one.
    """
    if interpreted:
        upper, lower = (each.reshape(-1, 2, BOX, *each.shape[1:]) for each in (array, other))
        return jnp.stack([upper[:, 0], second(upper[:, 0], lower[:, 1])], axis=1).reshape(array.shape)
    layout = plgpu.Layout.WGMMA if array.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout))
    def change(_, array, other):
        registers = array.registers.copy()
        if registers.size == 2:
            registers.flat[1] = second(array.registers.flat[0], other.registers.flat[1])
        else:
            for at in np.ndindex(registers.shape):
                if at[4]:
                    registers[at] = second(registers[(*at[:4], 0, *at[5:])], other.registers[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return change(array, other)


def refusal(q: jax.Array, view: LayerView) -> str | None:
    """What no kernel serves of these; None if there is nothing."""
    slots, slot_tokens = view.k.shape[0], view.slot_tokens
    for refused, what in (
        (q.dtype not in (jnp.bfloat16, jnp.float16), f"queries of {q.dtype}"),
        (slot_tokens % KV_TAIL_TOKENS, f"slots of {slot_tokens} tokens"),
        (slots * slot_tokens >= 2**31, f"{slots} slots of {slot_tokens} tokens"),
    ):
        if refused:
            return what
    return None
