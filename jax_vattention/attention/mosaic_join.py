"""How the decode kernel joins what several streams found for a pair of a KV head and a request.

The last of the pair's streams does it, as in Stream-K's "fixup" (Osama et al., arXiv 2301.03598): each counts itself
when it is done, and who finds that all others are reads what they have written. No stream waits for another, so none
has to run at the same time. Where there is much to join, and in the interpreter, a kernel of its own does that instead:
`decode_split.join`.

They count in `Split.streams`, which XLA takes for a constant of all layers of a program: before a kernel and after it
the counters are 0. Two kernels with one table must not run at the same time. XLA runs them one after the other, unless
it is asked for more (`xla_gpu_command_buffer_scheduling_mode=CONCURRENT`; see `Shape.joins`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.decode_split import ARRIVED, OWNED_UNITS, OWNER, QUERY, SharedPair, out_row
from jax_vattention.attention.mosaic_view import BOX, THREADS

_SCALAR = plgpu.Layout.WG_SPLAT(())
_WIDTH = 4
"""Columns that a thread reads at once: 16 bytes."""
_AT_ONCE = 8
"""Segments whose reads are under way together."""


def arrive(streams, flags, pairs: tuple[SharedPair, ...]) -> tuple[jax.Array, ...]:
    """Counts this stream among those that are done with these pairs.

    Args:
      streams: see `Split.streams`.
      flags: int32 in shared memory, one for each pair.
      pairs: of one stream alone it is not said that it is the last.

    Returns:
      int32 of each pair: 1 if all of its streams are done, this one as the last.
    """
    arguments = [argument for pair in pairs for argument in (pair.first, pair.streams)]
    found = tuple(plgpu.ShapeDtypeStruct((), jnp.int32, _SCALAR) for _ in pairs)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *(_SCALAR for _ in arguments)), return_type=found)
    def count(_, streams, flags, *arguments):
        index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        rows = [arith.index_cast(index, each.registers.item()) for each in arguments[::2]]
        counts = [each.registers.item() for each in arguments[1::2]]
        counters = [mgpu.memref_slice(streams, (row, ARRIVED)) for row in rows]
        mgpu.warpgroup_barrier()  # behind what all threads have written
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            _fence("release")
            numbers = [_count(*each) for each in zip(counters, counts, strict=True)]
            _fence("acquire")
            for at, (counter, size, number) in enumerate(zip(counters, counts, numbers, strict=True)):
                last = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(number, mgpu.c(1, i32)), size)
                memref.store(arith.extui(i32, last), flags, [mgpu.c(at, index)])
                with mgpu.when(last):
                    memref.store(mgpu.c(0, i32), counter, [])
        mgpu.warpgroup_barrier()
        lasts = [memref.load(flags, [mgpu.c(at, index)]) for at in range(len(rows))]
        return tuple(mgpu.FragmentedArray.splat(each, (), is_signed=True) for each in lasts)

    return count(streams, flags, *arguments)


def _fence(ordering: str) -> None:
    """Of all memory of the GPU. Half of one, if there is such an instruction: that to acquire waits for nothing."""
    llvm.fence(getattr(llvm.AtomicOrdering, ordering), syncscope="device")


def _count(counter, of: ir.Value) -> Any:
    """Adds 1 to the counter of a pair of more streams than one, and returns what it was; -2 for others."""
    adds = "setp.gt.s32 p, $2, 1; mov.b32 $0, -2; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1;"
    operands = [mgpu.utils.memref_ptr(counter), of]
    asm = f"{{ .reg .pred p; {adds} }}"
    return llvm.inline_asm(of.type, operands, asm, "=&r,l,r", has_side_effects=True)


def join(parts, lse, out, *, segment, count, low, rows, token, head, group: int, first_eights: bool = False) -> None:
    """Writes the sums of what streams found for a pair, each by its share of the softmax.

    Args:
      parts, lse: see `decode_split.join`.
      out: `[tokens, num_q_heads, head_dim]`.
      segment, count: the first of them, and how many there are.
      low, rows: of a segment.
      token, head: where row `low` goes in `out`; the next ones are the other heads of a group, then those of the next
        token.
      first_eights: rows are those of the first, third, ... eight in `lse`.
    """
    scalars = segment, count, low, rows, token, head

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in range(3)), *(_SCALAR for _ in scalars)))
    def store(context, parts, lse, out, *scalars):
        del context
        index = ir.IndexType.get()
        segment, count, low, rows, token, head = (arith.index_cast(index, each.registers.item()) for each in scalars)
        of_row = mgpu.c(ir.MemRefType(parts.type).shape[2] // _WIDTH, index)
        threads, size = mgpu.c(THREADS, index), mgpu.c(group, index)
        thread = arith.remui(arith.index_cast(index, mgpu.thread_idx()), threads)
        elements = arith.muli(rows, of_row)
        rounds = arith.ceildivsi(arith.subi(elements, thread), threads)
        dtype = ir.MemRefType(out.type).element_type

        @mgpu.fori(rounds, [])
        def _(i, nothing):
            element = arith.addi(thread, arith.muli(i, threads))
            number = arith.divui(element, of_row)
            column = arith.muli(arith.remui(element, of_row), mgpu.c(_WIDTH, index))
            row = arith.addi(low, number)
            whole_eights = arith.subi(row, arith.remui(row, mgpu.c(BOX, index)))
            lse_row = arith.addi(row, whole_eights) if first_eights else row
            value = _joined(parts, lse, segment, count, (row, lse_row), column)
            value = arith.truncf(ir.VectorType.get((_WIDTH,), dtype), value)
            to_token = arith.addi(token, arith.divui(number, size))
            vector.store(value, out, [to_token, arith.addi(head, arith.remui(number, size)), column])
            return nothing

    store(parts, lse, out, *scalars)


def _joined(
    parts, lse, segment: ir.Value, count: ir.Value, rows: tuple[ir.Value, ir.Value], column: ir.Value
) -> ir.Value:
    """Of one row, `_WIDTH` columns; `rows` says where it is in `parts` and in `lse`."""
    row, lse_row = rows
    index, f32 = ir.IndexType.get(), ir.F32Type.get()
    several = ir.VectorType.get((_WIDTH,), f32)
    nothing = mgpu.c(-math.inf, f32)
    last = arith.subi(count, mgpu.c(1, index))

    def read(number: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The logarithm and the values of a segment; behind the last one once more those of the last."""
        at = arith.addi(segment, arith.minui(number, last))
        there = arith.cmpi(arith.CmpIPredicate.ule, number, last)
        found = arith.select(there, memref.load(lse, [at, lse_row]), nothing)
        return found, vector.load(several, parts, [at, row, column])

    rounds = arith.ceildivui(count, mgpu.c(_AT_ONCE, index))
    state = nothing, mgpu.c(0.0, f32), vector.broadcast(several, mgpu.c(0.0, f32))

    @mgpu.fori(rounds, state)
    def total(i, state):
        maximum, total, acc = state
        begin = arith.muli(i, mgpu.c(_AT_ONCE, index))
        found = [read(arith.addi(begin, mgpu.c(number, index))) for number in range(_AT_ONCE)]
        new = functools.reduce(arith.maximumf, (each for each, _ in found), maximum)
        # Of pieces in which a row sees no key.
        none = arith.cmpf(arith.CmpFPredicate.OEQ, new, nothing)
        base = arith.select(none, mgpu.c(0.0, f32), new)
        shrink = _exp2(arith.subf(maximum, base))
        total, acc = arith.mulf(total, shrink), arith.mulf(acc, vector.broadcast(several, shrink))
        for each, values in found:
            weight = _exp2(arith.subf(each, base))
            total = arith.addf(total, weight)
            acc = arith.addf(acc, arith.mulf(values, vector.broadcast(several, weight)))
        return new, total, acc

    _, total, acc = total.results
    none = arith.cmpf(arith.CmpFPredicate.OEQ, total, mgpu.c(0.0, f32))
    return arith.divf(acc, vector.broadcast(several, arith.select(none, mgpu.c(1.0, f32), total)))


def _exp2(x: ir.Value) -> Any:
    return llvm.inline_asm(x.type, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def fill(owners, requests, out, block, blocks: int, *, unowned: bool) -> None:
    """Writes 0 to the rows of requests without keys, which the blocks share, and `unowned` to those of no request.

    Args:
      owners, requests: see `Split`.
      out: `[tokens, num_q_heads, head_dim]`.
    """
    sizes = out.shape[1:]
    layout = plgpu.Layout.WG_STRIDED(sizes, vec_size=math.gcd(math.prod(sizes) // THREADS, 8))

    def token(i, nothing):
        number = block + i * blocks
        request, query, units = (owners[number, column] for column in (OWNER, QUERY, OWNED_UNITS))
        row = out_row(requests, request, query, number)

        @pl.when((units == 0) & (request >= (-1 if unowned else 0)))
        def _():
            out[row] = plgpu.layout_cast(jnp.zeros(sizes, out.dtype), layout)

        return nothing

    lax.fori_loop(0, lax.div(owners.shape[0] - block + blocks - 1, jnp.int32(blocks)), token, None)
