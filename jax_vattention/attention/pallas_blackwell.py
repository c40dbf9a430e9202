"""Attention through Pallas' Mosaic GPU backend: Blackwell datacentre GPUs (compute capability 10.0).

No GPU of this kind has run it: it is interpreted and compiled in tests, and is taken only if it is named.
"""

from __future__ import annotations

import jax

from jax_vattention.attention import blackwell_decode, blackwell_prefill, pallas_mosaic, target
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_KERNELS = pallas_mosaic.Kernels(blackwell_decode, blackwell_prefill, None)


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    if target.capability() != "10.0":
        return "GPUs other than Blackwell's for datacentres (compute capability 10.0)"
    return _KERNELS.refusal(q, view, batch, features)


run = _KERNELS.run
"""See `attention`; returns `(out, order)`."""
