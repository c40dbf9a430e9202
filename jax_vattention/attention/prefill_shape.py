"""Static sizes of the prefill kernels: tiles of queries and keys, and blocks and their clusters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_vattention.attention.features import Features
from jax_vattention.attention.mosaic_view import BLOCKS, BOX, CommonShape
from jax_vattention.attention.prefill_split import Sizes
from jax_vattention.cache import LayerView

CLUSTER, PEER = "cluster", "peer"
"""Axes: of clusters, and of the blocks of one."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What may be tuned in any kernel that `copy` feeds."""

    block_k: int = 128
    """Keys of a tile."""
    stages: int = 2
    """Tiles of keys in shared memory."""
    q_stages: int = 2
    """Tiles of queries in shared memory."""
    blocks: int = BLOCKS
    keep_keys: bool = False
    """L2 is to keep K and V while others read something else."""
    cluster: int = 1
    """Blocks that read K and V together, at most: see `tiling_of`."""
    l2_bytes: int | None = None
    """K and V of a section of the schedule, which L2 is to hold; None: all are one section."""

    @property
    def grid(self) -> dict[str, Any]:
        """How blocks are launched."""
        clusters = {"cluster": (self.cluster,), "cluster_names": (PEER,)} if self.cluster > 1 else {}
        return {"grid": (self.blocks // self.cluster,), "grid_names": (CLUSTER,)} | clusters

    def barrier(self, **sizes: Any) -> plgpu.Barrier | plgpu.ClusterBarrier:
        """One at which the blocks of a cluster arrive together: who waits waits for the warpgroups of all of them."""
        return plgpu.ClusterBarrier(collective_axes=(PEER,), **sizes) if self.cluster > 1 else plgpu.Barrier(**sizes)


@dataclasses.dataclass(frozen=True)
class Shape(CommonShape):
    """Static sizes of a kernel."""

    num_q_heads: int
    tokens: int
    """Of the query array, padded."""
    key_bytes: int
    """Of K and V of a token, for a KV head."""
    block_q: int
    """Queries of a tile."""
    tiling: Tiles

    @classmethod
    def of(
        cls,
        q: jax.Array,
        view: LayerView,
        features: Features,
        *,
        block_q: int,
        scale: float,
        tiling: Tiles,
        interpret: Any,
    ) -> Shape:
        """Those of a kernel for these arguments."""
        return cls(
            **cls.common(q, view, features, scale=scale, interpret=interpret),
            num_q_heads=q.shape[1],
            # Every tile of queries lies within the array.
            tokens=max(-(-q.shape[0] // BOX) * BOX, block_q),
            key_bytes=2 * view.head_dim * view.k.dtype.itemsize,
            block_q=block_q,
            tiling=tiling,
        )

    def split_sizes(self, tokens: int) -> Sizes:
        """Those of the schedule for so many tokens."""
        limit = self.tiling.l2_bytes
        return Sizes(
            tokens,
            self.tokens,
            self.block_q,
            self.tiling.block_k,
            num_kv_heads=self.num_q_heads // self.group,
            group=self.group,
            blocks=self.tiling.blocks,
            most_keys=None if limit is None else limit // self.key_bytes,
        )

    @property
    def zero_heads(self) -> int:
        """Heads of a padding token that one copy fills with zeros."""
        return math.gcd(self.num_q_heads, 4)
