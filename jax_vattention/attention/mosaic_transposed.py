"""Instructions for arrays whose columns are queries: Hopper GPUs.

In the layout of a `wgmma` a thread has, of each eight columns, two, and in every 16 rows of its warp two: so what is
found of a column is spread over eight threads of each warp, and over the warps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_products import assembled, elements, issue, packed, unpacked
from jax_vattention.attention.mosaic_view import BOX, ROWS, THREADS, operand

WARPS = THREADS // 32
"""Of a warpgroup."""
OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""That of one number for each column."""
_WGMMA = plgpu.Layout.WGMMA
_SCALAR = plgpu.Layout.WG_SPLAT(())
_LANES = 4
"""Of a warp: so many have all columns of an eight, each two of them."""
LINE, CHUNK = 128, 16
"""Bytes of a row of a swizzled tile, and of what is swizzled."""
_FOUR = 4
"""Columns of float8 that a thread reads at once."""


def across(combine: Callable[..., Any], begin: jax.Array, array: jax.Array, memory) -> jax.Array:
    """`[columns]`: `begin`, combined with all that there is in each column of an array.

    All threads of the warpgroup have to meet once more before the memory is written again.

    Args:
      combine: of two numbers.
      memory: float32 `[4, columns]` in shared memory, for what each warp has found.
    """
    of = plgpu.ShapeDtypeStruct(begin.shape, begin.dtype, OF_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(OF_COLUMNS, _WGMMA, plgpu.RefType()), return_type=of)
    def combined(_, begin, array, memory):
        index, pair = ir.IndexType.get(), ir.VectorType.get((2,), ir.F32Type.get())
        warp, lane = warp_and_lane(index)
        found = [functools.reduce(combine, column) for column in _columns(array)]
        for distance in (_LANES, 2 * _LANES, 4 * _LANES):
            found = [combine(each, mgpu.utils.shfl_bfly(each, distance)) for each in found]
        places = [_column(lane, number, index) for number in range(0, len(found), 2)]
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, lane, mgpu.c(_LANES, index))):
            for place, *own in zip(places, found[::2], found[1::2], strict=True):
                vector.store(packed(pair, own), memory, [warp, place])
        mgpu.warpgroup_barrier()
        values = [value for _, value in elements(begin)]
        for number, place in enumerate(places):
            for other in range(WARPS):
                two = vector.load(pair, memory, [mgpu.c(other, index), place])
                for i, one in enumerate(unpacked(two)):
                    values[2 * number + i] = combine(values[2 * number + i], one)
        registers, taken = begin.registers.copy(), iter(values)
        for at, register in np.ndenumerate(begin.registers):
            kind = ir.VectorType(register.type)
            registers[at] = packed(kind, [next(taken) for _ in range(kind.shape[0])])
        return mgpu.FragmentedArray(_registers=registers, _layout=begin.layout, _is_signed=None)

    return combined(begin, array, memory)


def sums_of_rows(weights: jax.Array, *, interpreted: bool) -> jax.Array:
    """`[64, columns]`: sums of every 64th row, each of values of one thread."""
    rows, columns = weights.shape
    if interpreted:
        return weights.reshape(rows // ROWS, ROWS, columns).sum(axis=0)

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=plgpu.ShapeDtypeStruct((ROWS, columns), weights.dtype, _WGMMA))
    def add(_, weights):
        total = weights[:ROWS]
        for row in range(ROWS, rows, ROWS):
            total += weights[row : row + ROWS]
        return total

    return add(weights)


def add_second_eights(array: jax.Array, factor: float, *, interpreted: bool) -> jax.Array:
    """`[rows, columns / 2]`: each first, third, ... eight of columns, and `factor` times the next one."""
    rows, columns = array.shape
    if interpreted:
        first, second = jnp.moveaxis(array.reshape(rows, -1, 2, BOX), 2, 0)
        return (first + factor * second).reshape(rows, columns // 2)
    of = plgpu.ShapeDtypeStruct((rows, columns // 2), array.dtype, _WGMMA)

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=of)
    def add(_, array):
        registers = array.registers[:, ::2].copy()
        for at, second in np.ndenumerate(array.registers[:, 1::2]):
            many = vector.broadcast(second.type, mgpu.c(factor, ir.F32Type.get()))
            registers[at] = arith.addf(registers[at], arith.mulf(second, many))
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return add(array)


def widened(tile, first: Any, end: Any, *, interpreted: bool) -> tuple[jax.Array, ...]:
    """Columns of a float8 matrix in shared memory as rows of float16 ones, of 64 each, left operands of products.

    A thread has four columns that follow each other as its rows, two of one part and two of the next: it reads them at
    once. Which rows these are only `store_columns` has to know.

    Args:
      first, end: rows before and behind these are 0; if they are not None.
    """
    keys, columns = tile.shape
    if interpreted:
        wide = tile[...].astype(jnp.float16).T
        if first is not None:
            wide = jnp.where(jnp.arange(keys) >= first, wide, 0)
        if end is not None:
            wide = jnp.where(jnp.arange(keys) < end, wide, 0)
        return tuple(wide[row : row + ROWS] for row in range(0, columns, ROWS))
    of = plgpu.ShapeDtypeStruct((ROWS, keys), jnp.float16, _WGMMA)

    at_least, below = arith.CmpIPredicate.sge, arith.CmpIPredicate.slt
    limits = {how: limit for how, limit in ((at_least, first), (below, end)) if limit is not None}

    @plgpu.inline_mgpu(arg_types=(operand(tile), *(_SCALAR for _ in limits)), return_type=(of,) * (columns // ROWS))
    def widen(_, tile, *bounds):
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = warp_and_lane(i32)
        # A thread has two keys of each eight, and four bytes of a line of each.
        key, byte = arith.remui(lane, mgpu.c(_LANES, i32)), arith.divui(lane, mgpu.c(_LANES, i32))
        key = arith.muli(key, mgpu.c(2, i32))
        byte = arith.addi(arith.muli(byte, mgpu.c(_FOUR, i32)), arith.muli(warp, mgpu.c(LINE // WARPS, i32)))
        two = key, arith.addi(key, mgpu.c(1, i32))
        places = [address(tile, each, byte) for each in two]
        numbers = [each.registers.item() for each in bounds]

        def word(place: ir.Value, key: ir.Value, eight: int, line: int) -> ir.Value:
            """Four numbers of a key, or 0 for them."""
            asm = f"ld.shared.b32 $0, [$1 + {(eight * lines + line) * BOX * LINE}];"
            (found,) = assembled(asm, "=r,r", place, results=1)
            key = arith.addi(key, mgpu.c(eight * BOX, i32))
            for how, bound in zip(limits, numbers, strict=True):
                found = arith.select(arith.cmpi(how, key, bound), found, mgpu.c(0, i32))
            return found

        layout, lines = fragments.WGMMA_LAYOUT, columns // LINE
        parts = [np.empty(layout.registers_shape((ROWS, keys)), dtype=object) for _ in range(columns // ROWS)]
        for eight, line in np.ndindex(keys // BOX, lines):
            pairs = _widen(*(word(*each, eight, line) for each in zip(places, two, strict=True)))
            for i, pair in enumerate(pairs):
                part = parts[2 * line + i // 2]
                part[(0, eight, 0, 0, i % 2, *(0,) * (part.ndim - 5))] = pair
        return tuple(mgpu.FragmentedArray(_registers=part, _layout=layout, _is_signed=None) for part in parts)

    return widen(tile, *limits.values())


def address(tile, row: ir.Value, byte: ir.Value) -> ir.Value:
    """In shared memory, of a byte of a row of the first eight, as `swizzled` makes it."""
    i32 = ir.IntegerType.get_signless(32)
    size = mgpu.c(CHUNK, i32)
    chunk = arith.xori(arith.divui(byte, size), row)
    offset = arith.addi(arith.muli(chunk, size), arith.remui(byte, size))
    offset = arith.addi(offset, arith.muli(row, mgpu.c(LINE, i32)))
    return arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), offset)


def _widen(first: ir.Value, second: ir.Value) -> list[ir.Value]:
    """Four pairs of float16: of four float8 numbers of one key and of another, those of one column."""
    asm = """{ .reg .b32 c; .reg .b16 l, h;
        prmt.b32 c, $4, $5, 0x5140;
        mov.b32 {l, h}, c;
        cvt.rn.f16x2.e4m3x2 $0, l;
        cvt.rn.f16x2.e4m3x2 $1, h;
        prmt.b32 c, $4, $5, 0x7362;
        mov.b32 {l, h}, c;
        cvt.rn.f16x2.e4m3x2 $2, l;
        cvt.rn.f16x2.e4m3x2 $3, h; }"""
    words = assembled(asm, "=r,=r,=r,=r,r,r", first, second, results=4)
    return [as_pair(word, ir.F16Type.get()) for word in words]


def as_pair(word: ir.Value, of: ir.Type) -> Any:
    """What a register of 32 bits holds, as a vector of two numbers of 16 bits."""
    return vector.bitcast(ir.VectorType.get((2,), of), vector.broadcast(ir.VectorType.get((1,), word.type), word))


def store_transposed(array: jax.Array, target, *, interpreted: bool) -> None:
    """Writes `[rows, columns]` of 16 bits to `[columns, rows]` in shared memory, as `swizzled` makes it.

    Args:
      target: it may be wider, and is written from its first column on.
    """
    if interpreted:
        target[:, : array.shape[0]] = array.T
        return
    tiles = target.shape[1] // ROWS

    @plgpu.inline_mgpu(arg_types=(_WGMMA, operand(target)))
    def store(_, array, target):
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = warp_and_lane(i32)
        # A lane says where a row of eight keys of one of two matrices goes, whoever holds it: a warp has 16 keys.
        eight = mgpu.c(BOX, i32)
        row, half = arith.remui(lane, eight), arith.remui(arith.divui(lane, eight), mgpu.c(2, i32))
        chunk = arith.addi(arith.muli(warp, mgpu.c(2, i32)), half)
        begin = address(target, row, arith.muli(chunk, mgpu.c(CHUNK, i32)))
        halves: dict[int, list[ir.Value]] = {}
        for at, register in np.ndenumerate(array.registers):
            halves.setdefault(at[1] * tiles + at[0], []).append(_bits(register))
        for tile, registers in halves.items():
            to = arith.addi(begin, mgpu.c(tile * BOX * LINE, i32))
            issue("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};", to, *registers)

    store(array, target)


def _bits(register: ir.Value) -> ir.Value:
    """Two numbers of 16 bits as one of 32."""
    (whole,) = unpacked(vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), register))
    return whole


def store_columns(
    result: tuple[jax.Array, ...], out_ref, token, head, low, high, *, group: int, in_fours: bool = False
) -> None:
    """Writes columns `low .. high - 1` of an array, as `mosaic_view.store_rows` writes rows.

    Args:
      in_fours: rows are those of parts of `widened`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(_SCALAR,) * 4, *(_WGMMA for _ in result)))
    def store(_, out, *arguments):
        index = ir.IndexType.get()
        scalars, parts = arguments[:4], arguments[4:]
        token, head, low, high = (arith.index_cast(index, each.registers.item()) for each in scalars)
        warp, lane = warp_and_lane(index)
        size = mgpu.c(group, index)
        of_parts = map(_columns, parts)
        columns: list[list[Any]] = [list(itertools.chain(*each)) for each in zip(*of_parts, strict=True)]
        if in_fours:
            of_warp, of_lane, firsts = LINE // WARPS, _FOUR, range(0, len(columns[0]), _FOUR)
            offsets = [first // _FOUR * LINE for first in firsts]
            four = ir.VectorType.get((_FOUR,), ir.MemRefType(out.type).element_type)
            columns = [[packed(four, each[first : first + _FOUR]) for first in firsts] for each in columns]
        else:
            of_warp, of_lane = ROWS // WARPS, 1
            offsets = [i // 2 * ROWS + i % 2 * BOX for i in range(len(columns[0]))]
        row = arith.muli(arith.divui(lane, mgpu.c(_LANES, index)), mgpu.c(of_lane, index))
        row = arith.addi(arith.muli(warp, mgpu.c(of_warp, index)), row)
        for number, values in enumerate(columns):
            column = _column(lane, number, index)
            is_inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, column, low), arith.cmpi(arith.CmpIPredicate.slt, column, high)
            )
            with mgpu.when(is_inside):
                place = arith.subi(column, low)
                to_token = arith.addi(token, arith.divui(place, size))
                to_head = arith.addi(head, arith.remui(place, size))
                for offset, value in zip(offsets, values, strict=True):
                    at = [to_token, to_head, arith.addi(row, mgpu.c(offset, index))]
                    (vector if in_fours else memref).store(value, out, at)

    store(out_ref, token, head, low, high, *result)


def store_line(line, out_ref, row) -> None:
    """Writes `[columns]` to where row `row` of a matrix begins."""

    @plgpu.inline_mgpu(arg_types=(OF_COLUMNS, plgpu.RefType(), _SCALAR))
    def store(_, line, out, row):
        index = ir.IndexType.get()
        warp, lane = warp_and_lane(index)
        to = arith.index_cast(index, row.registers.item())
        thread = arith.addi(arith.muli(warp, mgpu.c(32, index)), lane)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, thread, mgpu.c(_LANES, index))):
            for number, (_, value) in enumerate(elements(line)):
                memref.store(value, out, [to, _column(lane, number, index)])

    store(line, out_ref, row)


def warp_and_lane(of: ir.Type) -> tuple[ir.Value, ir.Value]:
    """Of a thread: its warp in the warpgroup, and its number in the warp."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.thread_idx(), mgpu.c(THREADS, i32))
    two = arith.divui(thread, mgpu.c(32, i32)), arith.remui(thread, mgpu.c(32, i32))
    warp, lane = two if of == i32 else (arith.index_cast(of, each) for each in two)
    return warp, lane


def _column(lane: ir.Value, number: int, index: ir.Type) -> ir.Value:
    """That of a thread of this number: it has two of each eight."""
    first = arith.muli(arith.remui(lane, mgpu.c(_LANES, index)), mgpu.c(2, index))
    return arith.addi(first, mgpu.c(number // 2 * BOX + number % 2, index))


def _columns(array: mgpu.FragmentedArray) -> list[list[ir.Value]]:
    """A thread's elements, from the first row to the last, of each of its columns."""
    halves: dict[tuple[int, int, int], list[ir.Value]] = {}
    for at, value in elements(array):
        halves.setdefault((at[1], at[0], at[4]), []).append(value)  # two: what a thread has of a row of an eight
    columns: dict[tuple[int, int], list[ir.Value]] = {}
    for (eight, *_), two in sorted(halves.items(), key=lambda half: half[0]):
        for i, value in enumerate(two):
            columns.setdefault((eight, i), []).append(value)
    return [columns[place] for place in sorted(columns)]
