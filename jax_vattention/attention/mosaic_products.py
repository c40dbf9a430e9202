"""Products on tensor cores of Hopper GPUs whose instructions, fences and waits a kernel orders itself.

`plgpu.wgmma` adds to an accumulator that something has set before, and fences it each time: 64 moves that zero the
scores, between the turn of a warpgroup and its first product. Here the first step of a product may replace what the
registers hold, and who begins products passes their registers on, untouched, until `settle` has waited for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, memref, nvvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_view import operand

_WGMMA = plgpu.Layout.WGMMA
_SWIZZLE = 128
_TURN = 8
"""The first named barrier of the turns: 0 is that of a block, those from 1 on are of its warpgroups."""


def _array(shape, dtype) -> Any:
    return plgpu.ShapeDtypeStruct(tuple(shape), dtype, _WGMMA)


def begin_scores(q, k, acc, weights, *, interpreted: bool):
    """Begins `q @ k.T`; returns `(scores, acc, weights)`, the latter as `begin_sum` may take them next."""
    shape = q.shape[0], k.shape[0]
    if interpreted:
        return _product(q, k.transpose((1, 0)), shape), acc, weights

    @plgpu.inline_mgpu(
        arg_types=(operand(q), operand(k), _WGMMA, _WGMMA),
        return_type=(_array(shape, jnp.float32), _array(acc.shape, acc.dtype), _array(weights.shape, weights.dtype)),
    )
    def begin(_, q, k, acc, weights):
        acc, weights = fragments.optimization_barrier(acc, weights)
        issue("wgmma.fence.sync.aligned;")
        zero = mgpu.FragmentedArray.splat(mgpu.c(0.0, ir.F32Type.get()), shape, fragments.WGMMA_LAYOUT)
        zeros = mgpu.WGMMAAccumulator.from_registers(zero, sync=False)
        scores = mgpu.wgmma(zeros, q, mgpu.memref_transpose(k, (1, 0, 3, 2)), swizzle=_SWIZZLE)
        _replace(zeros)
        issue("wgmma.commit_group.sync.aligned;")
        return scores.value, acc, weights

    return begin(q, k, acc, weights)


def _replace(zeros: mgpu.WGMMAAccumulator) -> None:
    """Makes the first step of a product replace the accumulator: then nothing has to zero it."""
    i32, descriptor = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    (step,) = {use.owner for use in zeros._value.registers.flat[0].uses}
    # Behind the descriptors of what is multiplied comes whether to add.
    adds = 1 + max(number for number, each in enumerate(step.operands) if each.type == descriptor)
    constant = step.operands[adds].owner
    if "wgmma.mma_async" not in str(step.attributes["asm_string"]) or str(constant.attributes["value"]) != "1 : i32":
        raise NotImplementedError(f"jax multiplies by other instructions than expected: {step}")
    with ir.InsertionPoint(step):
        step.operands[adds] = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result


def begin_sum(acc, weights, v, *, interpreted: bool):
    """Begins `acc + weights @ v` and returns that; both as `begin_scores` returned them."""
    if interpreted:
        return acc + _product(weights, v, acc.shape)

    @plgpu.inline_mgpu(arg_types=(_WGMMA, _WGMMA, operand(v)), return_type=_array(acc.shape, acc.dtype))
    def begin(_, acc, weights, v):
        sums = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
        sums = mgpu.wgmma(sums, weights, v, swizzle=_SWIZZLE)
        issue("wgmma.commit_group.sync.aligned;")
        return sums.value

    return begin(acc, weights, v)


def _product(left, right, shape):
    def multiply(ref):
        plgpu.wgmma(ref, left, right)
        return ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def issue(instruction: str, *operands: ir.Value, constraint: str = "r") -> None:
    """An instruction that gives nothing back, in its place among others."""
    constraints = ",".join(constraint for _ in operands)
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, instruction, constraints, has_side_effects=True)


def assembled(asm: str, constraints: str, *operands: ir.Value, results: int) -> list[ir.Value]:
    """Inline assembly that gives so many registers of 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    if results == 1:
        return [llvm.inline_asm(i32, operands, asm, constraints, has_side_effects=True)]  # type: ignore[list-item]
    several = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * results)})>")
    found: Any = llvm.inline_asm(several, operands, asm, constraints, has_side_effects=True)
    return [llvm.extractvalue(i32, found, ir.DenseI64ArrayAttr.get([i])) for i in range(results)]


def settle(in_flight: int, *arrays, interpreted: bool) -> tuple:
    """Waits until so many products are in flight; returns `arrays`, results of products that are over then."""
    if interpreted:
        return arrays

    @plgpu.inline_mgpu(
        arg_types=tuple(_WGMMA for _ in arrays), return_type=tuple(_array(each.shape, each.dtype) for each in arrays)
    )
    def wait(_, *arrays):
        issue(f"wgmma.wait_group.sync.aligned {in_flight};")
        return (
            (fragments.optimization_barrier(*arrays),) if len(arrays) == 1 else fragments.optimization_barrier(*arrays)
        )

    return wait(*arrays)


def pin(sums, *, interpreted: bool) -> None:
    """Makes what comes next wait until these sums, none of which is less than 0, are there.

    Compilers move a wait for products up, to before the work that should hide it, but not to before a store. This one
    is for a sum of -1: it never happens.
    """
    if interpreted:
        return

    @plgpu.inline_mgpu(arg_types=(_WGMMA,))
    def store(_, sums):
        every = functools.reduce(arith.addf, _scalars(sums))
        test = ".reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.eq.f32 p, $0, 0fBF800000;"
        issue(f"{{ {test} @p st.volatile.shared.f32 [a], $0; }}", every, constraint="f")

    store(sums)


def elements(array: mgpu.FragmentedArray) -> list[tuple[tuple[int, ...], ir.Value]]:
    """A thread's elements, and of each where its register is."""
    return [(at, value) for at, register in np.ndenumerate(array.registers) for value in unpacked(register)]


def unpacked(vectored: ir.Value) -> list[ir.Value]:
    """The numbers of a vector."""
    return [
        vector.extract(vectored, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(ir.VectorType(vectored.type).shape[0])
    ]


def packed(of: ir.VectorType, values: Sequence[ir.Value]) -> ir.Value:
    """A vector of these."""
    vectored = llvm.mlir_undef(of)
    for i, value in enumerate(values):
        vectored = vector.insert(value, vectored, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
    return vectored


def _scalars(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's elements."""
    return [value for _, value in elements(array)]


def wait_turn(warpgroup) -> None:
    """Waits for this warpgroup's turn, of two."""
    _turn(warpgroup, "sync")


def give_turn(warpgroup) -> None:
    """The turn is now that one's."""
    _turn(warpgroup, "arrive")


def _turn(warpgroup, what: str) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()),))
    def turn(_, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        number = arith.addi(warpgroup.registers.item(), mgpu.c(_TURN, i32))
        # It orders products only: what they read and write has barriers of its own.
        issue(f"bar.{what} $0, 256;", number)

    turn(warpgroup)


def sums_of_columns(weights, *, interpreted: bool):
    """`[rows, 8]`: sums of every eighth column, each of values of one thread."""
    rows, columns = weights.shape
    if interpreted:
        return weights.reshape(rows, columns // 8, 8).sum(axis=1)

    @plgpu.inline_mgpu(arg_types=(_WGMMA,), return_type=_array((rows, 8), weights.dtype))
    def add(_, weights):
        total = weights[:, :8]
        for column in range(8, columns, 8):
            total += weights[:, column : column + 8]
        return total

    return add(weights)


def report_overflow(totals, sums, low, high, limit: float, flag, *, interpreted: bool) -> None:
    """Sets `flag` to 1 if a row `low .. high - 1` has a total that is not below the limit, or a sum that is not finite.

    Args:
      totals: `[rows]`, not less than 0.
      sums: `[rows, columns]`.
      flag: int32 in shared memory.
    """
    rows = totals.shape[0]
    if interpreted:
        row = jnp.arange(rows, dtype=jnp.int32)
        bad = jnp.logical_not(totals + (sums * 0).sum(axis=1) < limit) & (row >= low) & (row < high)
        flag[...] = jnp.where(bad.any(), 1, flag[...])
        return
    layout = _WGMMA.reduce(1)
    row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)
    own = jnp.where((row >= low) & (row < high), jnp.int32(1), jnp.int32(0))

    @plgpu.inline_mgpu(arg_types=(layout, _WGMMA, layout, plgpu.RefType()))
    def report(_, totals, sums, own, flag):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        zero = mgpu.c(0.0, f32)
        for r, (total, mine) in enumerate(zip(_scalars(totals), _scalars(own), strict=True)):
            # 0 times what is not finite is NaN, which is not below anything.
            own_elements = (value for at, value in elements(sums) if at[4] == r)
            value = functools.reduce(lambda found, each: arith.addf(found, arith.mulf(each, zero)), own_elements, total)
            bad = arith.cmpf(arith.CmpFPredicate.UGE, value, mgpu.c(limit, f32))
            bad = arith.andi(bad, arith.cmpi(arith.CmpIPredicate.ne, mine, mgpu.c(0, i32)))
            with mgpu.when(bad):
                memref.store(mgpu.c(1, i32), flag, [])

    report(totals, sums, own, flag)


def number_of_block():
    """Among the blocks of a grid of one dimension; those of a cluster follow each other."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def read(_):
        number = arith.index_cast(ir.IntegerType.get_signless(32), gpu.block_id(gpu.Dimension.x))
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    return read()


def any_of_cluster(flags, blocks: int):
    """Whether any of these int32 in shared memory is not 0, in any of so many blocks of the cluster.

    Who writes one has to commit it, then arrive at a barrier of the cluster; the others wait for that.
    """
    splat = plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=splat)
    def read(_, flags):
        i32 = ir.IntegerType.get_signless(32)

        def load(block, i):
            text = f"mapa.shared::cluster.u32 a, $1, {block}; ld.shared::cluster.b32 $0, [a + {4 * i}];"
            address = [mgpu.utils.memref_ptr(flags)]
            return llvm.inline_asm(i32, address, f"{{ .reg .b32 a; {text} }}", "=r,r", has_side_effects=True)

        found = (load(*at) for at in np.ndindex(blocks, ir.MemRefType(flags.type).shape[0]))
        some = arith.cmpi(arith.CmpIPredicate.ne, functools.reduce(arith.ori, found), mgpu.c(0, i32))
        # All threads have found the same: unless compilers see it, loops that depend on it have no uniform registers.
        some = nvvm.vote_sync(mgpu.c(-1, i32), some, "any")
        return mgpu.FragmentedArray.splat(some, (), is_signed=False)

    return read(flags)
