"""Programs in flight while their slots are freed and their pages go to other requests.

Each round a request gets a slot and a value. A program writes the value into all of its tokens and then reads them
over and over; before it is done its slot is freed and the next request comes, in a pool too small for both to keep
their pages. Whatever a program sees besides its own value is the hazard: a page unmapped, zeroed or given away under
it. `python tests/fences.py PLATFORM --unfenced` runs the same with the fences taken out, and is expected to fail.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from jax_vattention import KVCacheManager, KVCacheSpec, RaggedBatch, attention
from jax_vattention.errors import OutOfPagesError, OutOfSlotsError

HEADS, DIM = 2, 64


# The number of reads is static: on a GPU a loop of unknown length keeps the host, and nothing would be in flight.
@functools.partial(jax.jit, static_argnames=("most", "reads", "rows"))
def write_and_read(cache, slot, tokens, value, *, most, reads, rows):
    """Fills a slot, then reads it `reads` times in `rows` rows. Returns the lowest and highest value and the order."""
    positions = jnp.arange(most, dtype=jnp.int32)
    kv = jnp.full((most, HEADS, DIM), value)
    slots = jnp.full(most, slot)
    cache = cache.append(kv, kv, layer=0, slots=slots, positions=positions, mask=positions < tokens)
    batch = RaggedBatch.decode(slots[:rows], jnp.full(rows, tokens))
    # Queries of zeros weigh all tokens the same: what comes out is the mean of the values in the cache.
    q = jnp.zeros((rows, HEADS, DIM))

    def read(_, carry):
        low, high, cache = carry
        out, cache = attention(q, cache, layer=0, batch=batch)
        return jnp.minimum(low, out.min()), jnp.maximum(high, out.max()), cache

    low, high, cache = jax.lax.fori_loop(0, reads, read, (jnp.inf, -jnp.inf, cache))
    return low, high, cache.order


def run(device, *, rounds, reads, unfenced=False, in_flight=4):
    """Returns a line for each program that saw a value that is not its own, and how many programs were in flight."""
    page_bytes = 4096 if device.platform == "cpu" else 2 << 20
    # On the host a page holds 4 tokens of this; a request has 16 pages at most.
    most = 16 * page_bytes // (2 * HEADS * DIM * 4)
    spec = KVCacheSpec(1, HEADS, DIM, 2 * in_flight, most, jnp.float32, page_bytes)
    rng = np.random.default_rng(0)
    wrong, waiting, deepest = [], [], 0
    strict = device.platform == "cpu"
    rows = 1 if device.platform == "cpu" else 64  # a GPU reads faster than programs are started
    with KVCacheManager(spec, pool_bytes=40 * page_bytes, device=device, strict=strict) as manager:

        def check(result):
            value, low, high = result
            low, high = float(low), float(high)
            if not (np.isclose(low, value, rtol=1e-4) and np.isclose(high, value, rtol=1e-4)):
                wrong.append(f"expected {value}, read {low} to {high}")

        for number in range(rounds):
            tokens = int(rng.integers(most // 4, most + 1))
            value = float(number % 1000 + 1)
            while True:
                slot = None
                try:
                    slot = manager.allocate(tokens)
                    cache = manager.step({slot: tokens})
                    break
                except (OutOfPagesError, OutOfSlotsError):
                    # Everything waits for programs in flight.
                    if slot is not None:
                        manager.free(slot)
                    check(waiting.pop(0))
            where = np.int32(slot), np.int32(tokens), np.float32(value)
            low, high, order = write_and_read(cache, *where, most=most, reads=reads, rows=rows)
            del cache
            manager.finish(order, wait=False)
            manager.free(slot)
            if unfenced:
                manager._done_epoch = manager._epoch
            waiting.append((value, low, high))
            deepest = max(deepest, sum(not low.is_ready() for _, low, _ in waiting))
            while len(waiting) > in_flight:
                check(waiting.pop(0))
        for result in waiting:
            check(result)
        manager.finish(order)
        stats = manager.stats()
        total = stats.pages_free + stats.pages_mapped + stats.pages_retained + stats.pages_retired
        if total != stats.pages_total:
            wrong.append(f"{stats.pages_total - total} pages are lost")
    return wrong, deepest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("platform", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--reads", type=int, default=200)
    parser.add_argument("--unfenced", action="store_true")
    arguments = parser.parse_args()
    device = jax.devices(arguments.platform)[0]
    with jax.default_device(device):
        wrong, deepest = run(device, rounds=arguments.rounds, reads=arguments.reads, unfenced=arguments.unfenced)
    print(f"{len(wrong)} of {arguments.rounds} programs saw another request's pages; {deepest} in flight at once")
    print("\n".join(wrong[:5]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
