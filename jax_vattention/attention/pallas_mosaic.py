"""Attention through Pallas' Mosaic GPU backend: Hopper GPUs. Which kernel serves what, and what neither does.

The kernel for decode is bound by memory and serves requests of few queries, the one for prefill by the tensor cores. A
batch that may have both kinds goes to a third, in which every block does both at once, or to one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from types import ModuleType
from typing import NamedTuple

import jax

from jax_vattention.attention import mosaic_decode, mosaic_mixed, mosaic_prefill, mosaic_view, target
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.cache import LayerView

_log = logging.getLogger(__package__)


class Kernels(NamedTuple):
    """Of one generation of GPUs: modules with `refusal` and `run`."""

    decode: ModuleType
    prefill: ModuleType
    mixed: ModuleType | None
    """Serves what both others serve, but for what its `refusal` says; None: there is none."""

    def refusal(self, q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
        """What they do not serve of these arguments; None if they serve them."""
        if jax.__version_info__[:2] not in ((0, 11), (0, 12)):
            return f"jax {jax.__version__}: this backend changes, 0.11 and 0.12 are what was tried"
        if (refused := mosaic_view.refusal(q, view)) is not None:
            return refused
        if _few_queries(q, view, batch):
            return self.decode.refusal(q, view, batch, features)
        # Requests of one query in such a batch go to the other kernel.
        one_query = dataclasses.replace(batch, max_q_len=1)
        return self.prefill.refusal(q, view, batch, features) or self.decode.refusal(q, view, one_query, features)

    def run(
        self,
        q: jax.Array,
        view: LayerView,
        order: jax.Array,
        batch: RaggedBatch,
        features: Features,
        *,
        scale: float,
    ) -> tuple[jax.Array, jax.Array]:
        """See `attention`; returns `(out, order)`."""
        if _few_queries(q, view, batch):
            return self.decode.run(q, view, order, batch, features, scale=scale)
        if batch.num_requests * min(batch.max_q_len, q.shape[0]) <= q.shape[0]:
            # There is room for as many queries of each request as any has: most likely none is a decode. If one is, the
            # result is the same.
            return self.prefill.run(q, view, order, batch, features, scale=scale)
        if self.mixed is not None:
            refused = self.mixed.refusal(q, view, batch, features)
            if refused is None:
                return self.mixed.run(q, view, order, batch, features, scale=scale)
            _say_that_there_are_two(refused)
        return self.run_both(q, view, order, batch, features, scale=scale)

    def run_both(
        self,
        q: jax.Array,
        view: LayerView,
        order: jax.Array,
        batch: RaggedBatch,
        features: Features,
        *,
        scale: float,
    ) -> tuple[jax.Array, jax.Array]:
        """Requests of one query through the kernel for decode, then all others through the one for prefill."""
        decodes, first, chunks = mosaic_mixed.parted(q, batch)
        one = dataclasses.replace(features, prefix_lens=None)  # which change nothing for a request's last token
        decoded, order = self.decode.run(q[first], view, order, decodes, one, scale=scale)
        out, order = self.prefill.run(q, view, order, chunks, features, scale=scale)
        return mosaic_mixed.placed(decoded, out, batch), order


HOPPER = Kernels(mosaic_decode, mosaic_prefill, mosaic_mixed)


def refusal(q: jax.Array, view: LayerView, batch: RaggedBatch, features: Features) -> str | None:
    """What it does not serve of these arguments; None if it serves them."""
    if target.capability() != "9.0":
        return "GPUs other than Hopper (compute capability 9.0)"
    return HOPPER.refusal(q, view, batch, features)


run = HOPPER.run
"""See `attention`; returns `(out, order)`."""


@functools.cache
def _say_that_there_are_two(why: str) -> None:
    _log.info("decodes and chunks of prompts in two kernels, not in one: it does not serve %s", why)


def _few_queries(q: jax.Array, view: LayerView, batch: RaggedBatch) -> bool:
    """Whether every request's queries fit in the rows of one product of the decode kernel."""
    return batch.max_q_len * (q.shape[1] // view.num_kv_heads) <= mosaic_view.ROWS
