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
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import Piece
from jax_vattention.attention.mosaic_compute import (
    LOG2_E,
    Computing,
    Parts,
    State,
    clear_unseen,
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
    return {
        "weights": swizzled((streams, shape.rows, shape.tiling.block_k), dtype),
        "partial": plgpu.SMEM((streams, _WARPS, shape.rows), jnp.float32),
    }


class Columns(Computing):
    """See `Computing`. Scores are `[block_k, queries]`, results `[head_dim, queries]`."""

    def __init__(self, shape: Shape, local, work, refs, *, weights, partial, **memory) -> None:
        super().__init__(shape, local, work, refs, **memory)
        self.weights, self.partial = weights.at[local], partial.at[local]

    def prepare(self) -> None:
        """Nothing: there are no columns but those of the query tile, all of which is copied."""

    def nothing(self, tiles) -> State:
        """See `Computing`."""
        queries = self.shape.rows
        return State(
            tiles,
            plgpu.layout_cast(jnp.full((queries,), -jnp.inf, jnp.float32), _OF_COLUMNS),
            plgpu.layout_cast(jnp.zeros((ROWS, queries), jnp.float32), _WGMMA),
            (plgpu.layout_cast(jnp.zeros((self.shape.head_dim, queries), jnp.float32), _WGMMA),),
        )

    def tile(self, piece: Piece, q, scale, whole, tile, state: State, *, masked: bool) -> State:
        """See `Computing`."""
        shape = self.shape
        stage = lax.rem(state.tiles, shape.stages)
        barrier = self.local * shape.stages + stage
        k, v = (as_rows(each.at[stage]) for each in (self.k, self.v))
        first = piece.first + tile * shape.tile_tokens
        wait(*self.k_ready, barrier, tile >= whole, masked)
        scores = self._product(k, q.transpose((1, 0)))
        plgpu.barrier_arrive(self.k_free.at[barrier])
        maximum, shrink, total, weights = self._weighed(piece, first, scores, scale, state, masked)
        store_transposed(weights.astype(v.dtype), self.weights, interpreted=shape.interpreted)
        plgpu.commit_smem()  # where all warps meet, too: they are done with what `_across` has read
        wait(*self.v_ready, barrier, tile >= whole, masked)
        if masked:
            clear_unseen(shape, v, piece, first)
        (acc,) = state.acc
        acc = self._product(v.transpose((1, 0)), self.weights.transpose((1, 0)), _times(acc, shrink))
        plgpu.barrier_arrive(self.v_free.at[barrier])
        return State(state.tiles + 1, maximum, total, (acc,))

    def _product(self, left, right, begin: jax.Array | None = None) -> jax.Array:
        """`left @ right`, float32, and what it begins with."""
        interpreted = self.shape.interpreted  # which has no accumulators that begin with a value

        def product(ref):
            if begin is not None and not interpreted:
                ref[...] = begin
            plgpu.wgmma(ref, left, right)
            return ref[...] + begin if begin is not None and interpreted else ref[...]

        return pl.run_scoped(product, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

    def _weighed(
        self, piece: Piece, first, scores: jax.Array, scale, state: State, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """A step of the online softmax, as `mosaic_rows` has it."""
        shape = self.shape
        scores = scores * scale
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
        return tuple(_times(part, factor) for part in acc)

    def write(self, result: Parts, ref, token, head, low, high, group: int, rows) -> None:
        """See `Computing`."""
        (part,) = result
        if self.shape.interpreted:
            rows[: part.shape[1], :] = part.T.astype(ref.dtype)
            copy_rows(self.shape, ref, token, head, low, high, group, rows)
            return
        store_columns(part.astype(ref.dtype), ref, token, head, low, high, group=group)

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


def store_columns(result, out_ref, token, head, low, high, *, group: int) -> None:
    """Writes columns `low .. high - 1` of an array, as `mosaic_view.store_rows` writes rows."""

    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR, _SCALAR))
    def store(_, result, out, *scalars):
        index = ir.IndexType.get()
        token, head, low, high = (arith.index_cast(index, each.registers.item()) for each in scalars)
        warp, lane = _warp_and_lane(index)
        row = arith.addi(arith.muli(warp, mgpu.c(2 * BOX, index)), arith.divui(lane, mgpu.c(_LANES, index)))
        size = mgpu.c(group, index)
        for number, values in enumerate(_columns(result)):
            column = _column(lane, number, index)
            is_inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, column, low), arith.cmpi(arith.CmpIPredicate.slt, column, high)
            )
            with mgpu.when(is_inside):
                place = arith.subi(column, low)
                to_token = arith.addi(token, arith.divui(place, size))
                to_head = arith.addi(head, arith.remui(place, size))
                for i, value in enumerate(values):
                    to = arith.addi(row, mgpu.c(i // 2 * ROWS + i % 2 * BOX, index))
                    memref.store(value, out, [to_token, to_head, to])

    store(result, out_ref, token, head, low, high)


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
