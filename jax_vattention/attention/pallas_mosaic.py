"""Attention through Pallas' Mosaic GPU backend: Hopper GPUs. Which kernel serves what, and what neither does."""

from __future__ import annotations

import re
from typing import Any

import jax

from jax_vattention.attention import mosaic_decode
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    if jax.__version_info__[:2] != (0, 11):
        return f"jax {jax.__version__}: this backend changes, 0.11 is what was tried"
    if target() != "9.0":
        return "GPUs other than Hopper (compute capability 9.0)"
    return mosaic_decode.refusal(q, view, batch, features)


def target() -> str | None:
    """Compute capability of the GPU that a program is traced for; None if there is none."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return "9.0" if re.search(r"\b(H100|H200|GH200)\b", described.device_kind) else described.device_kind
    try:
        return jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None


def run(
    q: jax.Array,
    view: LayerView,
    order: jax.Array,
    batch: RaggedBatch,
    features: Features,
    *,
    scale: float,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `attention`; returns `(out, order)`."""
    return mosaic_decode.run(q, view, order, batch, features, scale=scale, **options)
