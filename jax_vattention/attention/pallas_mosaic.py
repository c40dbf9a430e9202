"""Attention through Pallas' Mosaic GPU backend: Hopper GPUs. Which kernel serves what, and what neither does.

The kernel for decode is bound by memory and serves requests of few queries, the one for prefill by the tensor cores. A
batch of both kinds is split between them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from jax_vattention.attention import mosaic_decode, mosaic_mixed, mosaic_prefill, mosaic_view
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    if jax.__version_info__[:2] != (0, 11):
        return f"jax {jax.__version__}: this backend changes, 0.11 is what was tried"
    if target() != "9.0":
        return "GPUs other than Hopper (compute capability 9.0)"
    if (refused := mosaic_view.refusal(q, view)) is not None:
        return refused
    if _few_queries(q, view, batch):
        return mosaic_decode.refusal(q, view, batch, features)
    # Requests of one query in such a batch go to the other kernel.
    one_query = dataclasses.replace(batch, max_q_len=1)
    return mosaic_prefill.refusal(q, view, batch, features) or mosaic_decode.refusal(q, view, one_query, features)


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
    if _few_queries(q, view, batch):
        return mosaic_decode.run(q, view, order, batch, features, scale=scale, **options)
    if batch.num_requests == 1:
        return mosaic_prefill.run(q, view, order, batch, features, scale=scale, **options)
    decodes, first, chunks = mosaic_mixed.parted(q, batch)
    one = dataclasses.replace(features, prefix_lens=None)  # which change nothing for a request's last token
    decoded, order = mosaic_decode.run(q[first], view, order, decodes, one, scale=scale, **options)
    out, order = mosaic_prefill.run(q, view, order, chunks, features, scale=scale, **options)
    return mosaic_mixed.placed(decoded, out, batch), order


def _few_queries(q: jax.Array, view: LayerView, batch: RaggedBatch) -> bool:
    """Whether every request's queries fit in the rows of one product of the decode kernel."""
    return batch.max_q_len * (q.shape[1] // view.num_kv_heads) <= mosaic_view.ROWS
