"""Decode attention with queries as the columns of products: Hopper GPUs.

The rows of a `wgmma` are 64, its columns as many as one likes, in eights. As the query heads of a KV head are few, most
rows would be idle (see `mosaic_rows`), in the softmax too. Here rows are keys and then dimensions of V, all of them in
use: an eighth of the products, and an eighth of the softmax. But a query's scores are in all warps, so its maximum goes
through shared memory, and so do the weights, to where the second product reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import float8_queries
from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece
from jax_vattention.attention.mosaic_compute import (
    LOG2_E,
    Computing,
    Parts,
    State,
    clear_unseen,
    inside,
    copy_rows,
    visible,
    wait,
)
from jax_vattention.attention.mosaic_products import elements, issue, packed
from jax_vattention.attention.mosaic_view import BOX, ROWS, THREADS, as_rows, operand, swizzled

_WGMMA = plgpu.Layout.WGMMA
_OF_COLUMNS = _WGMMA.reduce(0)
_SCALAR = plgpu.Layout.WG_SPLAT(())
_WARPS = THREADS // 32
_LANES = 4
"""Of a warp: so many have all columns of an eight, each two of them."""
_LINE, _CHUNK = 128, 16
"""Bytes of a row of a swizzled tile, and of what is swizzled."""


def scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Shared memory that it needs besides, for each stream; `dtype` is that of the weights."""
    streams = shape.tiling.streams
    dtype = jnp.float16 if shape.quantized else dtype
    return {
        "weights": swizzled((streams, shape.rows, shape.tiling.block_k), dtype),
        "partial": plgpu.SMEM((streams, _WARPS, shape.rows), jnp.float32),
        **({"factors": plgpu.SMEM((streams, ROWS), jnp.float32)} if shape.quantized else {}),
    }


class Columns(Computing):
    """See `Computing`. Scores are `[block_k, queries]`, results `[head_dim, queries]`."""

    def __init__(self, shape: Shape, local, work, refs, *, weights, partial, factors=None, **memory) -> None:
        super().__init__(shape, local, work, refs, **memory)
        self.weights, self.partial = weights.at[local], partial.at[local]
        self.factors = None if factors is None else factors.at[local]

    def prepare(self) -> None:
        """Nothing: there are no columns but those of the query tile, all of which is copied."""

    def begin(self, piece: Piece) -> tuple[Any, Any]:
        """See `Computing`."""
        shape = self.shape
        q, scale = super().begin(piece)
        if not shape.quantized:
            return q, scale
        self.factors[...] = float8_queries.split(q, self.query_parts, interpreted=shape.interpreted)
        plgpu.commit_smem()
        columns = pl.ds(0, shape.product_rows)
        factors = plgpu.load(self.factors.at[columns], layout=_OF_COLUMNS)  # type: ignore[call-arg]  # jax 0.10
        return self.query_parts.at[columns], factors * (scale * self.refs.scales[self.refs.first_scale + piece.head])

    def nothing(self, tiles) -> State:
        """See `Computing`."""
        queries, head_dim = self.shape.rows, self.shape.head_dim
        rows = ROWS if self.shape.quantized else head_dim
        return State(
            tiles,
            plgpu.layout_cast(jnp.full((queries,), -jnp.inf, jnp.float32), _OF_COLUMNS),
            plgpu.layout_cast(jnp.zeros((ROWS, queries), jnp.float32), _WGMMA),
            tuple(plgpu.layout_cast(jnp.zeros((rows, queries), jnp.float32), _WGMMA) for _ in range(0, head_dim, rows)),
        )

    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool) -> State:
        """See `Computing`."""
        shape = self.shape
        stage = lax.rem(state.tiles, shape.stages)
        barrier = self.local * shape.stages + stage
        k, v = (as_rows(each.at[stage]) for each in (self.k, self.v))
        first = piece.first + tile * shape.tile_tokens
        wait(*self.k_ready, barrier, tile >= whole, masked)

        def values() -> Parts:
            """V, as left operands of products: float8 is widened in registers on the way."""
            wait(*self.v_ready, barrier, tile >= whole, masked)
            if not shape.quantized:
                if masked:
                    clear_unseen(shape, v, piece, first)
                return (v.transpose((1, 0)),)
            wide = widened(v, interpreted=shape.interpreted)
            if not masked:
                return wide
            own = inside(shape, piece, first, wide[0].shape, _WGMMA, keys_axis=1)
            return tuple(jnp.where(own, part, jnp.zeros_like(part)) for part in wide)

        early = values if shape.quantized else lambda: ()
        (scores,), wide = self._products((k,), q.transpose((1, 0)), meanwhile=early)
        plgpu.barrier_arrive(self.k_free.at[barrier])
        maximum, shrink, total, weights = self._weighed(piece, first, self._scaled(scores, scale), state, masked)
        store_transposed(weights.astype(self.weights.dtype), self.weights, interpreted=shape.interpreted)
        plgpu.commit_smem()  # where all warps meet, too: they are done with what `_across` has read
        if shape.quantized:
            plgpu.barrier_arrive(self.v_free.at[barrier])
        begin = tuple(_times(part, shrink) for part in state.acc)
        acc, _ = self._products(wide or values(), self.weights.transpose((1, 0)), begin)
        if not shape.quantized:
            plgpu.barrier_arrive(self.v_free.at[barrier])
        return State(state.tiles + 1, maximum, total, acc)

    def _products(
        self, lefts: Parts, right, begin: Parts = (), meanwhile: Callable[[], Parts] = lambda: ()
    ) -> tuple[Parts, Parts]:
        """`left @ right` of each, float32, and what it begins with; and what `meanwhile` gives."""
        interpreted = self.shape.interpreted  # which has no accumulators that begin with a value

        def product(*refs):
            if not interpreted:
                for ref, part in zip(refs, begin, strict=False):
                    ref[...] = part
            for ref, left in zip(refs, lefts, strict=True):
                plgpu.wgmma(ref, left, right)
            found = meanwhile()
            sums = tuple(ref[...] for ref in refs)
            if interpreted and begin:
                sums = tuple(part + each for part, each in zip(begin, sums, strict=True))
            return sums, found

        accumulators = (plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32) for left in lefts)
        return pl.run_scoped(product, *accumulators)

    def _scaled(self, scores: jax.Array, scale) -> jax.Array:
        if not self.shape.quantized:
            return scores * scale
        return add_second_eights(_times(scores, scale), 1 / float8_queries.LOST, interpreted=self.shape.interpreted)

    def _weighed(
        self, piece: Piece, first, scores: jax.Array, state: State, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A step of the online softmax, as `mosaic_rows` has it."""
        shape = self.shape
        if shape.soft_cap is not None:
            scores = jnp.tanh(scores) * (shape.soft_cap * LOG2_E)
        if masked:
            scores = jnp.where(visible(shape, piece, first, scores.shape, 0), scores, -jnp.inf)
        maximum = self._across(arith.maximumf, jnp.max, state.maximum, scores)
        base = maximum
        if not shape.all_see_keys:
            base = jnp.where(maximum == -jnp.inf, jnp.zeros_like(maximum), maximum)
        shrink = jnp.exp2(state.maximum - base)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(base, scores.shape, [1]))
        total = _times(state.total, shrink) + sums_of_rows(weights, interpreted=shape.interpreted)
        return maximum, shrink, total, weights

    def total(self, state: State) -> jax.Array:
        """See `Computing`."""
        nothing = plgpu.layout_cast(jnp.zeros(state.maximum.shape, jnp.float32), _OF_COLUMNS)
        total = self._across(arith.addf, jnp.sum, nothing, state.total)
        plgpu.commit_smem()  # before the next piece writes what was read here
        return total

    def _across(self, combine: Callable[..., Any], of_jax: Callable[..., Any], begin: jax.Array, array: jax.Array):
        """See `across`; `of_jax` combines the rows of an array."""
        if self.shape.interpreted:
            return of_jax(jnp.concatenate([begin[None], array]), axis=0)
        return across(combine, begin, array, self.partial)

    def result(self, piece: Piece, acc: Parts, factor: jax.Array) -> Parts:
        """See `Computing`."""
        if self.shape.quantized:
            factor *= self.refs.scales[self.refs.first_scale + self.shape.num_kv_heads + piece.head]
        return tuple(_times(part, factor) for part in acc)

    def write(self, result: Parts, ref, token, head, low, high, group: int, rows) -> None:
        """See `Computing`."""
        if self.shape.interpreted:
            whole = jnp.concatenate(result)
            rows[: whole.shape[1], :] = whole.T.astype(ref.dtype)
            copy_rows(self.shape, ref, token, head, low, high, group, rows)
            return
        result = tuple(part.astype(ref.dtype) for part in result)
        store_columns(result, ref, token, head, low, high, group=group, in_fours=self.shape.quantized)

    def write_lse(self, segment, lse: jax.Array) -> None:
        """See `Computing`."""
        if self.shape.interpreted:
            self.refs.lse[segment, pl.ds(0, self.shape.rows)] = lse
            return
        store_line(lse, self.refs.lse, segment)


def _times(array: jax.Array, factor: jax.Array) -> jax.Array:
    """By one for each column."""
    return array * lax.broadcast_in_dim(factor, array.shape, [1])


def across(combine: Callable[..., Any], begin: jax.Array, array: jax.Array, memory) -> jax.Array:
    """`[columns]`: `begin`, combined with all that there is in each column of an array.

    All threads of the warpgroup have to meet once more before the memory is written again.

    Args:
      combine: of two numbers.
      memory: float32 `[4, columns]` in shared memory, for what each warp has found.
    """
    of = plgpu.ShapeDtypeStruct(begin.shape, begin.dtype, _OF_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(_OF_COLUMNS, _WGMMA, plgpu.RefType()), return_type=of)
    def combined(_, begin, array, memory):
        index, pair = ir.IndexType.get(), ir.VectorType.get((2,), ir.F32Type.get())
        warp, lane = _warp_and_lane(index)
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
            for other in range(_WARPS):
                two = vector.load(pair, memory, [mgpu.c(other, index), place])
                for i in (0, 1):
                    one = vector.extract(two, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
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


def widened(tile, *, interpreted: bool) -> Parts:
    """Columns of a float8 matrix in shared memory as rows of float16 ones, of 64 each, left operands of products.

    A thread has four columns that follow each other as its rows, two of one part and two of the next: it reads them at
    once. Which rows these are only `store_columns` has to know.
    """
    keys, columns = tile.shape
    if interpreted:
        wide = tile[...].astype(jnp.float16).T
        return tuple(wide[row : row + ROWS] for row in range(0, columns, ROWS))
    of = plgpu.ShapeDtypeStruct((ROWS, keys), jnp.float16, _WGMMA)

    @plgpu.inline_mgpu(arg_types=(operand(tile),), return_type=(of,) * (columns // ROWS))
    def widen(_, tile):
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = _warp_and_lane(i32)
        four, two, eight = (mgpu.c(number, i32) for number in (4, 2, BOX))
        place, row = arith.divui(lane, four), arith.muli(arith.remui(lane, four), two)
        chunk = arith.addi(arith.muli(warp, two), arith.divui(place, four))
        begin = arith.addi(llvm.ptrtoint(i32, mgpu.utils.memref_ptr(tile)), arith.muli(arith.remui(place, four), four))

        def address(row: ir.Value) -> ir.Value:
            parts = (row, _LINE), (arith.xori(chunk, row), _CHUNK)
            return functools.reduce(arith.addi, (arith.muli(each, mgpu.c(size, i32)) for each, size in parts), begin)

        rows = address(row), address(arith.addi(row, mgpu.c(1, i32)))
        lines = columns // _LINE
        parts = [
            np.empty(fragments.WGMMA_LAYOUT.registers_shape((ROWS, keys)), dtype=object) for _ in range(columns // ROWS)
        ]
        for line in range(lines):
            for number in range(keys // BOX):
                four_rows = _widen(*rows, (number * lines + line) * BOX * _LINE)
                for i, pair in enumerate(four_rows):
                    at = [0] * parts[0].ndim
                    at[1], at[4] = number, i % 2
                    parts[2 * line + i // 2][tuple(at)] = pair
        return tuple(
            mgpu.FragmentedArray(_registers=part, _layout=fragments.WGMMA_LAYOUT, _is_signed=None) for part in parts
        )

    return widen(tile)


def _widen(first: ir.Value, second: ir.Value, offset: int) -> list[ir.Value]:
    """Of four float8 numbers so many bytes behind each of two places, those that belong together, as float16."""
    i32 = ir.IntegerType.get_signless(32)
    asm = f"""{{ .reg .b32 a, b, c; .reg .b16 l, h;
        ld.shared.b32 a, [$4 + {offset}];
        ld.shared.b32 b, [$5 + {offset}];
        prmt.b32 c, a, b, 0x5140;
        mov.b32 {{l, h}}, c;
        cvt.rn.f16x2.e4m3x2 $0, l;
        cvt.rn.f16x2.e4m3x2 $1, h;
        prmt.b32 c, a, b, 0x7362;
        mov.b32 {{l, h}}, c;
        cvt.rn.f16x2.e4m3x2 $2, l;
        cvt.rn.f16x2.e4m3x2 $3, h; }}"""
    four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    found = llvm.inline_asm(four, [first, second], asm, "=r,=r,=r,=r,r,r", has_side_effects=True)
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    words = (llvm.extractvalue(i32, found, ir.DenseI64ArrayAttr.get([i])) for i in range(4))
    return [vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), i32), word)) for word in words]


def store_transposed(array: jax.Array, target, *, interpreted: bool) -> None:
    """Writes `[rows, columns]` of 16 bits to `[columns, rows]` in shared memory, as `swizzled` makes it."""
    if interpreted:
        target[...] = array.T
        return

    @plgpu.inline_mgpu(arg_types=(_WGMMA, operand(target)))
    def store(_, array, target):
        i32 = ir.IntegerType.get_signless(32)
        warp, lane = _warp_and_lane(i32)
        # A lane says where a row of eight keys of one of two matrices goes, whoever holds it: a warp has 16 keys.
        eight = mgpu.c(BOX, i32)
        row, half = arith.remui(lane, eight), arith.remui(arith.divui(lane, eight), mgpu.c(2, i32))
        chunk = arith.xori(arith.addi(arith.muli(warp, mgpu.c(2, i32)), half), row)
        begin = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(target))
        for offset, size in ((row, _LINE), (chunk, _CHUNK)):
            begin = arith.addi(begin, arith.muli(offset, mgpu.c(size, i32)))
        tiles = array.shape[0] // ROWS
        halves: dict[int, list[ir.Value]] = {}
        for at, register in np.ndenumerate(array.registers):
            halves.setdefault(at[1] * tiles + at[0], []).append(_bits(register))
        for tile, registers in halves.items():
            address = arith.addi(begin, mgpu.c(tile * BOX * _LINE, i32))
            issue("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};", address, *registers)

    store(array, target)


def _bits(register: ir.Value) -> ir.Value:
    """Two numbers of 16 bits as one of 32."""
    whole = vector.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), register)
    return vector.extract(whole, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def store_columns(result: Parts, out_ref, token, head, low, high, *, group: int, in_fours: bool = False) -> None:
    """Writes columns `low .. high - 1` of an array, as `mosaic_view.store_rows` writes rows.

    Args:
      in_fours: rows are those of parts of `widened`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(_SCALAR,) * 4, *(_WGMMA for _ in result)))
    def store(_, out, *arguments):
        index = ir.IndexType.get()
        scalars, parts = arguments[:4], arguments[4:]
        token, head, low, high = (arith.index_cast(index, each.registers.item()) for each in scalars)
        warp, lane = _warp_and_lane(index)
        place = arith.divui(lane, mgpu.c(_LANES, index))
        size = mgpu.c(group, index)
        columns = [sum(each, []) for each in zip(*map(_columns, parts), strict=True)]
        if in_fours:
            of_warp, place, offsets = (
                4 * BOX,
                arith.muli(place, mgpu.c(4, index)),
                [i // 4 * 2 * ROWS for i in range(0, len(columns[0]), 4)],
            )
            four = ir.VectorType.get((4,), ir.MemRefType(out.type).element_type)
            columns = [[packed(four, each[i : i + 4]) for i in range(0, len(each), 4)] for each in columns]
        else:
            of_warp, offsets = 2 * BOX, [i // 2 * ROWS + i % 2 * BOX for i in range(len(columns[0]))]
        row = arith.addi(arith.muli(warp, mgpu.c(of_warp, index)), place)
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

    @plgpu.inline_mgpu(arg_types=(_OF_COLUMNS, plgpu.RefType(), _SCALAR))
    def store(_, line, out, row):
        index = ir.IndexType.get()
        warp, lane = _warp_and_lane(index)
        to = arith.index_cast(index, row.registers.item())
        thread = arith.addi(arith.muli(warp, mgpu.c(32, index)), lane)
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, thread, mgpu.c(_LANES, index))):
            for number, (_, value) in enumerate(elements(line)):
                memref.store(value, out, [to, _column(lane, number, index)])

    store(line, out_ref, row)


def _warp_and_lane(of: ir.Type) -> tuple[ir.Value, ir.Value]:
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
