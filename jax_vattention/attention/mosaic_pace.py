"""How the streams of a decode kernel are kept at one pace: Hopper GPUs.

A GPU does not serve its multiprocessors equally while memory is busy, and a kernel is over when its slowest stream is.
Shares cannot follow that, for results are to depend on the batch alone. So streams count together the marks that they
come to, and who is behind most of the others has more copies under way from then on. Nobody waits. Were all to have as
many, all would be slower.

They count in a row of `Split.streams`, as `mosaic_join` does and on the same terms: before a kernel and after it the
counter is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.decode_shape import Shape
from jax_vattention.attention.decode_split import PROGRESS
from jax_vattention.attention.mosaic_products import assembled
from jax_vattention.attention.mosaic_view import THREADS

_OVER = 2**22
"""What a stream counts in the end: more than all marks."""
_SCALAR = plgpu.Layout.WG_SPLAT(())


def depth(shape: Shape, streams, before: jax.Array, after: jax.Array, now: jax.Array) -> jax.Array:
    """How many tiles a stream may have under way that had copied `before` keys, and now `after`.

    To be called by all threads of the warpgroup that copies.

    Args:
      streams: see `Split.streams`.
      now: what it was before.
    """
    tiling = shape.tiling
    step = tiling.mark * shape.tile_tokens
    mark = lax.div(after, step)
    is_mark = lax.div(before, step) < mark
    if shape.interpreted:  # which knows no counters: behind at every other mark
        behind = lax.rem(mark, 2) == 1
    else:
        found = _count(streams, is_mark.astype(jnp.int32))
        behind = found >= (mark - 1) * shape.streams + int(tiling.after * shape.streams)
    return jnp.where(is_mark, tiling.stages + tiling.behind * behind.astype(jnp.int32), now)


def _count(streams, is_mark: jax.Array) -> jax.Array:
    """Counts 1 at a mark, and returns what all streams have counted; not exactly, for nothing is waited for.

    Warps may find different numbers, and so take different numbers of tiles for their limit. Each waits for itself, and
    what counts is the one that issues the copies.
    """
    found = plgpu.ShapeDtypeStruct((), jnp.int32, _SCALAR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR), return_type=found)
    def count(_, streams, is_mark):
        asm = """{ .reg .pred p, q;
            mov.s32 $0, 0;
            setp.ne.s32 p, $2, 0;
            setp.eq.and.s32 q, $3, 0, p;
            @q red.relaxed.gpu.global.add.s32 [$1], 1;
            @p ld.relaxed.gpu.global.s32 $0, [$1]; }"""
        operands = _counter(streams), is_mark.registers.item(), _thread()
        (counted,) = assembled(asm, "=&r,l,r,r", *operands, results=1)
        return mgpu.FragmentedArray.splat(counted, (), is_signed=True)

    return count(streams, is_mark)


def end(shape: Shape, streams) -> None:
    """Counts a stream as done; the last one leaves the counter at 0, for the next kernel."""
    if shape.interpreted:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add(_, streams):
        asm = f"""{{ .reg .pred p, q; .reg .s32 before;
            mov.s32 $0, 0;
            mov.s32 before, 0;
            setp.eq.s32 p, $2, 0;
            @p atom.relaxed.gpu.global.add.s32 before, [$1], {_OVER};
            setp.ge.and.s32 q, before, {(shape.streams - 1) * _OVER}, p;
            @q st.relaxed.gpu.global.s32 [$1], 0; }}"""
        assembled(asm, "=&r,l,r", _counter(streams), _thread(), results=1)

    add(streams)


def _counter(streams) -> ir.Value:
    return mgpu.utils.memref_ptr(mgpu.memref_slice(streams, (0, PROGRESS)))


def _thread() -> ir.Value:
    """Its number in the warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.remui(mgpu.thread_idx(), mgpu.c(THREADS, i32))
