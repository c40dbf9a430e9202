"""Queries as sums of two float8 numbers, for products with float8 keys.

The tensor cores multiply float8 only with float8. A query is rounded to e4m3, and what that loses, 16 times larger, is
rounded once more: both together are as exact as bfloat16, in rows of a product that would be idle, or in more columns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref
from jax._src.lib.mlir.dialects import math as mlir_math
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_products import assembled, issue, unpacked
from jax_vattention.attention.mosaic_transposed import CHUNK, LINE, address, as_pair, warp_and_lane
from jax_vattention.attention.mosaic_view import BOX, operand, second_eights_of

LOST = 16.0
"""Times the second number is too large."""
_LARGEST = 256.0
"""What the largest of a query becomes: the largest e4m3 is 448, and its smallest normal number 2 ** -6."""
_OF_ROW = 16
"""Threads of a row."""
_SMALLEST = 2.0**-100
"""Queries with nothing larger become smaller than that: `_LARGEST` over it is finite."""


def place(row: jax.Array) -> jax.Array:
    """Row of a product of the first number of a query in this row of its tile; that of the second is an eight below."""
    return lax.div(row, BOX) * 2 * BOX + lax.rem(row, BOX)


def row_at(place: jax.Array) -> jax.Array:
    """Row of the tile whose first or second number is in this row of a product."""
    return lax.div(place, 2 * BOX) * BOX + lax.rem(place, BOX)


def split(twice, parts, *, interpreted: bool) -> jax.Array:
    """Splits queries in shared memory.

    Args:
      twice: `[rows, head_dim]`: of a tile each eight of queries twice, one after the other.
      parts: float8, of the same shape. Gets, in their places, the first numbers of queries, each times a factor of its
        own, and the second ones.

    Returns:
      float32 `[rows]`: by what products with these are to be multiplied.
    """
    values = plgpu.load(twice, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]  # jax 0.10
    values, lost, factor = _split(values, parts.dtype)
    parts[...] = second_eights_of(values, lost, interpreted=interpreted).astype(parts.dtype)
    # Before a product reads what was written, and a copy overwrites what was read.
    plgpu.commit_smem()
    return factor


def _split(values: jax.Array, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of queries `[rows, head_dim]` what is rounded to the first and the second numbers, and `[rows]` factors."""
    values = values.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(values).max(axis=1), _SMALLEST)
    values *= lax.broadcast_in_dim(_LARGEST / largest, values.shape, [0])
    lost = (values - values.astype(dtype).astype(jnp.float32)) * LOST
    return values, lost, largest / _LARGEST


def split_eights(queries, parts, factors, *, interpreted: bool) -> None:
    """As `split`, but of queries that are there once; each eight of them is for all warps.

    Args:
      queries: `[rows, head_dim]` in shared memory, of 16 bits.
      parts: float8 `[2 * rows, head_dim]`: gets the first numbers of an eight, then the second ones.
      factors: float32 `[2 * rows]`: gets what `split` returns.
    """
    if interpreted:
        first, second, factor = (each.reshape(-1, BOX, *each.shape[1:]) for each in _split(queries[...], parts.dtype))
        parts[...] = jnp.stack([first, second], axis=1).reshape(parts.shape).astype(parts.dtype)
        factors[...] = jnp.stack([factor, factor], axis=1).reshape(factors.shape)
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu(arg_types=(operand(queries), operand(parts), plgpu.RefType()))
    def split(_, queries, parts, factors):
        i32, f32, index = ir.IntegerType.get_signless(32), ir.F32Type.get(), ir.IndexType.get()
        number = functools.partial(mgpu.c, ty=i32)
        warp, lane = warp_and_lane(i32)
        place = arith.remui(lane, number(_OF_ROW))
        row = arith.addi(arith.muli(warp, number(32 // _OF_ROW)), arith.divui(lane, number(_OF_ROW)))
        # Eight numbers of each line of parts, which has those of two lines of queries.
        half, chunk = (divide(place, number(BOX)) for divide in (arith.divui, arith.remui))
        read_at = address(queries, row, arith.muli(chunk, number(CHUNK)))
        read_at = arith.addi(read_at, arith.muli(half, number(BOX * LINE)))
        write_at = address(parts, row, arith.muli(place, number(BOX)))
        (eights, *_), (_, lines, *_) = (ir.MemRefType(each.type).shape for each in (queries, parts))
        for eight in range(eights):
            values = [_read(queries, read_at, 2 * (eight * lines + line)) for line in range(lines)]
            largest = functools.reduce(arith.maximumf, map(mlir_math.absf, itertools.chain(*values)))
            for distance in (1, 2, 4, 8):
                largest = arith.maximumf(largest, mgpu.utils.shfl_bfly(largest, distance))
            largest = arith.maximumf(largest, mgpu.c(_SMALLEST, f32))
            factor = arith.divf(mgpu.c(_LARGEST, f32), largest)
            for line, numbers in enumerate(values):
                whole = [arith.mulf(each, factor) for each in numbers]
                words, rounded = zip(*(_round(whole[i : i + 4]) for i in (0, 4)), strict=True)
                differences = (arith.subf(*each) for each in zip(whole, itertools.chain(*rounded), strict=True))
                lost = [arith.mulf(each, mgpu.c(LOST, f32)) for each in differences]
                _write(write_at, 2 * eight * lines + line, words)
                _write(write_at, (2 * eight + 1) * lines + line, [_round(lost[i : i + 4])[0] for i in (0, 4)])
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, place, number(0))):
                inverse = arith.mulf(largest, mgpu.c(1 / _LARGEST, f32))
                for second in (0, 1):
                    at = arith.addi(arith.index_cast(index, row), mgpu.c((2 * eight + second) * BOX, index))
                    memref.store(inverse, factors, [at])

    split(queries, parts, factors)
    plgpu.commit_smem()


def _read(queries, place: ir.Value, eight: int) -> list[ir.Value]:
    """Eight float32 numbers of queries, in this one of their lines of eight rows."""
    asm = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {eight * BOX * LINE}];"
    words = assembled(asm, "=r,=r,=r,=r,r", place, results=4)
    return list(itertools.chain(*(_two(word, ir.MemRefType(queries.type).element_type) for word in words)))


def _write(place: ir.Value, eight: int, words: Sequence[ir.Value]) -> None:
    """Eight numbers of parts, where it is known of the first of their lines of eight rows."""
    issue(f"st.shared.v2.b32 [$0 + {eight * BOX * LINE}], {{$1, $2}};", place, *words)


def _round(numbers: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
    """Four numbers as float8, in one register, and what they are then."""
    asm = """{ .reg .b16 l, h;
        cvt.rn.satfinite.e4m3x2.f32 l, $4, $3;
        cvt.rn.satfinite.e4m3x2.f32 h, $6, $5;
        mov.b32 $0, {l, h};
        cvt.rn.f16x2.e4m3x2 $1, l;
        cvt.rn.f16x2.e4m3x2 $2, h; }"""
    word, *halves = assembled(asm, "=r,=r,=r,f,f,f,f", *numbers, results=3)
    return word, list(itertools.chain(*(_two(half, ir.F16Type.get()) for half in halves)))


def _two(word: ir.Value, of: ir.Type) -> list[ir.Value]:
    """The two numbers of 16 bits in a register, as float32."""
    return unpacked(arith.extf(ir.VectorType.get((2,), ir.F32Type.get()), as_pair(word, of)))
