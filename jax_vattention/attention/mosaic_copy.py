"""Copies of K and V from memory to shared memory: Hopper and Blackwell GPUs.

A copy of several runs of tokens has as many dimensions as the instruction takes, and Pallas makes one more of the head.
And the instruction takes a cache policy, which tells L2 how long to keep what it reads, that Pallas does not pass on.
So here copies are made once more, after Pallas has made them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
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
_RUNS = 4
"""Dimensions of a tile of several runs."""


@dataclasses.dataclass(frozen=True)
class _Lines(mgpu.launch_context.MemRefTransform):
    """`[runs, columns, 8, heads, head_dim]` as `[runs, columns, lines of all heads, 8, elements of a line]`.

    A line is what is swizzled together of a row. As the lines of one head are neighbours, and so are those of the next
    one, a head needs no dimension of its own.
    """

    elements: int
    """Of a line."""
    lines: int
    """Of a head."""

    def apply(self, ref: ir.Value) -> ir.Value:
        """Of a reference to memory."""
        lines = mgpu.utils.memref_fold(mgpu.utils.memref_unfold(ref, 4, (None, self.elements)), 3, 2)
        return mgpu.utils.memref_transpose(lines, (0, 1, 3, 2, 4))

    def transform_index(self, idx: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """Of the first element of a head."""
        run, column, row, head, dim = idx
        lines = mgpu.c(self.lines, ir.IndexType.get())
        return run, column, arith.muli(head, lines), row, dim

    def transform_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a part."""
        run, column, row, head, dim = shape
        return run, column, head * dim // self.elements, row, self.elements

    transform_gmem_shape = transform_shape


def copy(
    source, target, ready, *, interpreted: bool, policy: int | None = None, together: int | None = None,
    collective_axes: str | None = None,
) -> None:  # fmt: skip
    """`plgpu.copy_gmem_to_smem` of what `tokens_of` returns, with a policy for L2.

    Args:
      target, together: see `operand`.
    """
    plgpu.copy_gmem_to_smem(source, target, ready, collective_axes=collective_axes)
    if interpreted or (policy is None and len(target.shape) < _RUNS):
        return
    kind = operand(target, together)
    tiling, swizzle = kind.transforms

    @plgpu.inline_mgpu(arg_types=(kind,))
    def make_again(context, target):
        block = ir.InsertionPoint.current.block
        load = _last(block.owner.operation.block, _LOAD)
        if load is not None:  # which becomes a copy later on, out of reach: it is made here
            _make(context, load, target, tiling.tiling, swizzle.swizzle)
        if policy is not None:
            _give(_last(block, *_GIVE), policy)

    make_again(target)


def _last(block: ir.Block, *names: str) -> Any:
    """Operation of one of these names in a block, or None."""
    return next((op for op in reversed(list(block.operations)) if op.operation.name in names), None)


def _make(context: Any, load: Any, target: ir.Value, tiling: tuple[int, ...], swizzle: int) -> None:
    """Makes the copy that a `mosaic_gpu.async_load` stands for, and removes that."""

    def index(value):
        return arith.index_cast(ir.IndexType.get(), value)

    with ir.InsertionPoint(load):  # what is made around here may not refer to a barrier, but to its address
        barrier = mgpu.utils.DialectBarrierRef.from_barrier_memref(load.barrier).barrier_ref
    parts: tuple[Any, ...] = tuple(
        index(first) if size < 0 else mgpu.ds(index(first), size)
        for first, size in zip(load.indices, load.slice_lengths, strict=True)
    )
    transform: Any = mgpu.TileTransform(tiling)
    if len(tiling) >= _RUNS:
        *rest, head, dims = parts
        parts, transform = (*rest, mgpu.ds(head, 1), dims), _Lines(tiling[-1], dims.length // tiling[-1])
        target = mgpu.utils.memref_reshape(target, transform.transform_shape([each.length for each in parts]))
    context.async_copy(
        src_ref=load.source,
        dst_ref=target,
        gmem_slice=parts,
        gmem_transform=transform,
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
