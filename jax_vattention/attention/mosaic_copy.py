"""Copies from memory to shared memory that tell L2 how long to keep what they read: Hopper and Blackwell GPUs.

The instruction takes a cache policy that Pallas' copy does not pass on: here it is given one after it was made.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.mosaic_view import operand

READ_ONCE, READ_AGAIN = 0x12F0000000000000, 0x14F0000000000000
"""Policies, as `createpolicy.fractional.L2::evict_first` and `evict_last` make them for all of what is read."""
_LOAD = "mosaic_gpu.async_load"


def copy(source, target, ready, *, policy: int | None, interpreted: bool, collective_axes: str | None = None) -> None:
    """`plgpu.copy_gmem_to_smem`, with a policy for L2.

    Args:
      target: see `operand`.
    """
    plgpu.copy_gmem_to_smem(source, target, ready, collective_axes=collective_axes)
    if policy is None or interpreted:
        return
    kind = operand(target)
    tiling, swizzle = kind.transforms

    @plgpu.inline_mgpu(arg_types=(kind,))
    def give_policy(context, target):
        block = ir.InsertionPoint.current.block
        load = _last(block.owner.operation.block, _LOAD)
        if load is not None:  # which becomes a copy later on, out of reach: it is made here
            _make(context, load, target, tiling.tiling, swizzle.swizzle)
        _give(_last(block, *_GIVE), policy)

    give_policy(target)


def _last(block: ir.Block, *names: str) -> Any:
    """Operation of one of these names in a block, or None."""
    return next((op for op in reversed(list(block.operations)) if op.operation.name in names), None)


def _make(context: Any, load: Any, target: ir.Value, tiling: tuple[int, ...], swizzle: int) -> None:
    """Makes the copy that a `mosaic_gpu.async_load` stands for, and removes that."""

    def index(value):
        return arith.index_cast(ir.IndexType.get(), value)

    with ir.InsertionPoint(load):  # what is made around here may not refer to a barrier, but to its address
        barrier = mgpu.utils.DialectBarrierRef.from_barrier_memref(load.barrier).barrier_ref
    context.async_copy(
        src_ref=load.source,
        dst_ref=target,
        gmem_slice=tuple(
            index(first) if size < 0 else mgpu.ds(index(first), size)
            for first, size in zip(load.indices, load.slice_lengths, strict=True)
        ),
        gmem_transform=mgpu.TileTransform(tiling),
        barrier=barrier,
        collective=tuple(gpu.Dimension(ir.IntegerAttr(axis).value) for axis in load.collective or ()),
        arrive=False,
        swizzle=swizzle,
    )
    load.operation.erase()


def _give(copy: Any, policy: int) -> None:
    """Makes a copy once more, with a policy; if jax makes copies in a way that is not known, leaves it as it is."""
    given = None
    if copy is not None:
        i64 = ir.IntegerType.get_signless(64)
        with ir.InsertionPoint(copy):
            hint = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, policy)).result
            given = _GIVE[copy.operation.name](copy, hint)
    if given is None:
        _say_that_nothing_was_given()
    else:
        copy.operation.erase()


@functools.cache
def _say_that_nothing_was_given() -> None:
    warnings.warn(
        f"jax {jax.__version__} copies in a way that is not known here: L2 is not told how long to keep K and V, "
        "which makes some kernels up to 3% slower",
        stacklevel=2,
    )


def _give_operation(copy: Any, hint: ir.Value) -> Any:
    """As jax 0.11 makes it."""
    operands, parts = list(copy.operands), []
    for size in copy.attributes["operandSegmentSizes"]:
        parts.append(operands[:size])
        operands = operands[size:]
    (target,), (descriptor,), coordinates, (barrier,), offsets, mask, _, predicate = parts
    return nvvm.cp_async_bulk_tensor_shared_cluster_global(
        target,
        descriptor,
        coordinates,
        barrier,
        offsets,
        multicast_mask=mask[0] if mask else None,
        l2_cache_hint=hint,
        predicate=predicate[0] if predicate else None,
    )


def _give_text(copy: Any, hint: ir.Value) -> Any:
    """As jax 0.12 makes it: `@$0 cp.async.bulk.tensor... [$1], [$2, {...}], [$3], ...;`."""
    text, constraints = (ir.StringAttr(copy.attributes[name]).value for name in ("asm_string", "constraints"))
    what, memory, end = text.partition(" [$1]")
    if "cp.async.bulk.tensor" not in what or not end.endswith(";"):
        return None
    text = f"{what}.L2::cache_hint{memory}{end[:-1]}, ${len(copy.operands)};"
    operands = [*copy.operands, hint]
    return llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, f"{constraints},l", has_side_effects=True)


_GIVE: dict[str, Callable[[Any, ir.Value], Any]] = {
    "nvvm.cp.async.bulk.tensor.shared.cluster.global": _give_operation,
    "llvm.inline_asm": _give_text,
}
"""How a copy of this name is made once more; None if it is something else."""
