"""Decode attention through Pallas' Mosaic GPU backend: Blackwell datacentre GPUs (compute capability 10.0).

The kernel of `mosaic_decode`, whose products are computed by `tcgen05.mma` in the tensor cores' own memory (TMEM), and
read from there into the same registers in which a Hopper GPU computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention import mosaic_decode, mosaic_rows
from jax_vattention.attention.decode_shape import Shape, Tiling
from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_compute import Parts
from jax_vattention.attention.mosaic_decode import refusal as refusal
from jax_vattention.attention.mosaic_view import ROWS, swizzled
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

BLOCKS = 148
"""Multiprocessors of a B200; a block fills one."""


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    tiling: Tiling | None = None,
    interpret: Any = False,
    interpret_tables: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    return mosaic_decode.run(
        q,
        view,
        order,
        batch,
        features,
        scale=scale,
        tiling=default_tiling(q.shape[2]) if tiling is None else tiling,
        products=Tcgen05,
        interpret=interpret,
        interpret_tables=interpret_tables,
    )


def default_tiling(head_dim: int) -> Tiling:
    """Two tiles of K and V have to fit for each stream, and large ones cost less for a key.

    Memory delivers a tile of 64 columns before one stream is done with the last.
    """
    block_k, streams = 128 if head_dim <= 128 else 64, 2 if head_dim <= 64 else 1
    return Tiling(block_k=block_k, streams=streams, blocks=BLOCKS, together=1)


class Tcgen05(mosaic_rows.Products):
    """Those of a Blackwell GPU, whose tensor cores add up in TMEM, and take both operands from shared memory.

    A product's 64 rows lie in all 128 lanes of TMEM, one half of its columns beside the other, and what is swizzled
    together may not be in both halves; both operands are swizzled alike.
    """

    def __init__(
        self, shape: Shape, local: jax.Array, *, weights_smem, scores_tmem, sums_tmem, multiplied, **_
    ) -> None:
        del shape
        self._weights, self._multiplied = weights_smem.at[local], multiplied.at[local]
        self._scores = scores_tmem.at[local]
        self._sums = [sums_tmem.at[local, number] for number in range(sums_tmem.shape[1])]

    @staticmethod
    def scratch(shape: Shape, dtype: Any) -> dict[str, Any]:
        """K and V, in shared memory that it can read, and what it computes."""
        streams, block_k, head_dim = shape.tiling.streams, shape.tiling.block_k, shape.head_dim
        width = Tcgen05.width(shape)
        of_scores, of_sums = Tcgen05._together(shape)
        k, v = ("k_wide", "v_wide") if shape.quantized else ("k_smem", "v_smem")
        stages, tile = ((), (block_k, head_dim)) if shape.quantized else ((shape.stages,), shape.tile)
        return {
            "q_smem": swizzled((streams, 2, ROWS, head_dim), dtype, of_scores),
            k: swizzled((streams, *stages, *tile), dtype, of_scores, rank=len(tile)),
            "weights_smem": swizzled((streams, ROWS, block_k), dtype, of_sums),
            v: swizzled((streams, *stages, *tile), dtype, of_sums, rank=len(tile)),
            "scores_tmem": plgpu.TMEM((streams, ROWS, block_k), jnp.float32),
            "sums_tmem": plgpu.TMEM((streams, head_dim // width, ROWS, width), jnp.float32),
            "multiplied": plgpu.Barrier(num_barriers=streams, orders_tensor_core=True),
        }

    @staticmethod
    def together(shape: Shape) -> tuple[int | None, int | None]:
        """See `Products`."""
        return (None, None) if shape.quantized else Tcgen05._together(shape)

    @staticmethod
    def _together(shape: Shape) -> tuple[int, int]:
        block_k = shape.tiling.block_k
        return math.gcd(block_k // 2, shape.head_dim), math.gcd(Tcgen05.width(shape) // 2, block_k)

    @staticmethod
    def width(shape: Shape) -> int:
        """As many as a thread has registers for beside those of all others."""
        return shape.head_dim if shape.head_dim <= 128 else math.gcd(shape.head_dim, 128)

    def scores(self, q, k, meanwhile: Callable[[], None]) -> jax.Array:
        """See `Products`."""
        plgpu.tcgen05_mma(self._scores, q, k.transpose((1, 0)), self._multiplied, accumulate=False)
        meanwhile()
        plgpu.barrier_wait(self._multiplied)
        scores = plgpu.async_load_tmem(self._scores, layout=plgpu.Layout.WGMMA)
        plgpu.wait_load_tmem()
        return scores

    def add(self, acc: Parts, shrunk: Callable[[jax.Array], jax.Array], weights: jax.Array, v) -> Parts:
        """See `Products`."""
        self._weights[...] = weights
        plgpu.commit_smem()
        for number, part in enumerate(acc):
            columns = pl.ds(number * part.shape[1], part.shape[1])
            plgpu.tcgen05_mma(self._sums[number], self._weights, v.at[:, columns], accumulate=False)
        plgpu.tcgen05_commit_arrive(self._multiplied)
        acc = tuple(shrunk(part) for part in acc)  # meanwhile
        plgpu.barrier_wait(self._multiplied)
        acc = tuple(
            part + plgpu.async_load_tmem(self._sums[number], layout=plgpu.Layout.WGMMA)
            for number, part in enumerate(acc)
        )
        plgpu.wait_load_tmem()
        return acc
