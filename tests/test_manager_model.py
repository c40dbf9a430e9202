"""The manager against a simple model: random calls, late programs, driver calls that fail, every byte looked at.

The model knows which request has which slot and how many tokens, and what each program writes and reads. A program runs
some time after its step: it writes its tokens then and reads all that its cache shows it. So whatever the manager
unmaps, zeroes or gives away too early is found in the bytes.

`python tests/test_manager_model.py --steps 1000000 --processes 16` looks for longer, with `--platform gpu` on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import functools
import logging
import multiprocessing
import os
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jax_vattention import KVCacheManager, KVCacheSpec, errors
from jax_vattention.spec import LayerGroup

SLOTS, SLOT_PAGES = 5, 10
STEPS = 50  # of one machine
COUNTED = ("adoptions", "unmaps", "reclaims", "zeroed_pages", "maps_ahead", "maps_eager", "background_failures")
"""By the manager itself."""
HAPPENS = (
    "programs",
    "steps without pages",
    "steps that a driver call failed",
    "steps that failed late",
    "all slots taken",
    *COUNTED,
)

# Bytes of a device


@functools.cache
def _byte_array(count: int) -> Any:
    return ctypes.c_uint8 * count


@functools.cache
def _cuda() -> tuple[Any, np.ndarray]:
    """The driver API, current on this thread, and page-locked memory to copy through."""
    from cuda.bindings import driver

    assert int(driver.cuInit(0)[0]) == 0
    error, context = driver.cuDevicePrimaryCtxRetain(0)
    assert (int(error), int(driver.cuCtxSetCurrent(context)[0])) == (0, 0)
    error, address = driver.cuMemAllocHost(size := 64 << 20)
    assert int(error) == 0
    return driver, np.frombuffer(_byte_array(size).from_address(int(address)), np.uint8)


def read(device: jax.Device, address: int, count: int) -> np.ndarray:
    """Bytes at an address, until the next call."""
    if device.platform == "cpu":
        return np.frombuffer(_byte_array(count).from_address(address), np.uint8)
    driver, locked = _cuda()
    assert int(driver.cuMemcpyDtoH(locked.ctypes.data, address, count)[0]) == 0
    return locked[:count]


def write(device: jax.Device, address: int, data: np.ndarray) -> None:
    if device.platform == "cpu":
        ctypes.memmove(address, data.ctypes.data, data.size)
        return
    driver, locked = _cuda()
    locked[: data.size] = data
    assert int(driver.cuMemcpyHtoD(address, locked.ctypes.data, data.size)[0]) == 0


# The model


@dataclasses.dataclass(eq=False)
class Request:
    """What one request has, and what its tokens must hold."""

    number: int
    slot: int
    length: int = 0
    """Tokens asked for."""
    written: int = 0
    """Tokens that programs have written."""


@dataclasses.dataclass(eq=False)
class Program:
    """A program between its step and its end: it writes tokens `start .. end` of each request and reads all before."""

    parts: list[tuple[Request, int, int, list[int]]]
    """Request, start, end, and for each group the first token that it may read."""
    over: bool = False


class Fence:
    """An order token that is ready when the model says that its program is over."""

    def __init__(self, order: jax.Array, program: Program):
        self._order, self._program = order, program

    def is_ready(self) -> bool:
        return self._program.over

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.asarray(self._order)


class Fences(collections.deque):
    """The manager's queue of order tokens, each as a `Fence`."""

    program: Program

    def append(self, entry: tuple[int, jax.Array]) -> None:
        super().append((entry[0], Fence(entry[1], self.program)))


@dataclasses.dataclass(frozen=True)
class Config:
    """A cache and a policy."""

    pages: int
    spec: dict[str, Any]
    options: dict[str, Any]
    settled: bool
    """The mapper is waited for after each call. What fails so is easier to repeat."""
    delay_us: int


GROUPS = (LayerGroup((0,), window=14), LayerGroup((1,), num_kv_heads=2))
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_major": {"layout": "layer_major"},
    "windows": {"groups": GROUPS},
    "windows, layer_major": {"groups": GROUPS, "layout": "layer_major"},
    "one window": {"groups": (LayerGroup((0, 1), window=9),)},
    "sizes": {"sizes": (2, 4)},
    "sizes, windows": {"groups": GROUPS, "sizes": (2,)},
}
CONFIGS = st.builds(
    Config,
    pages=st.integers(4, 60),
    spec=st.sampled_from(list(SPECS)).map(SPECS.__getitem__),
    options=st.fixed_dictionaries(
        {
            "background": st.sampled_from([True, True, True, False]),
            "lookahead_steps": st.integers(0, 3),
            "reclaim_below": st.sampled_from([0.0, 0.1, 0.5]),
            "eager_slots": st.integers(0, 2),
            "eager_tokens": st.sampled_from([1, 20, 40]),
            "large_page_share": st.sampled_from([0.0, 0.02, 0.5]),
            "zero_pages": st.sampled_from([True, True, True, False]),
        }
    ),
    settled=st.booleans(),
    delay_us=st.sampled_from([0, 0, 30, 300]),
)
MAX_SEQ_LEN = SLOT_PAGES * 4096 // 384
EXPECTED = st.none() | st.integers(0, MAX_SEQ_LEN)
HINTS = st.sampled_from([None, None, 1, 12, 40])
LATE = st.sampled_from([False, False, True])
GROWTHS = st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, 5, 11, 30]), min_size=SLOTS, max_size=SLOTS)


class ManagerModel(RuleBasedStateMachine):
    """Calls in any order, and what must be true after each."""

    device: jax.Device
    seen: collections.Counter[str]
    """What happened, in all machines together."""

    @initialize(config=CONFIGS)
    def start(self, config: Config) -> None:
        scale = 1 if self.device.platform == "cpu" else 512
        page_bytes = 4096 * scale
        spec = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 24 * scale, "num_slots": SLOTS, "dtype": jnp.float32}
        given = dict(config.spec)
        sizes = tuple(size * page_bytes for size in given.pop("sizes", ()))
        # A token of a layer is 192 bytes, and most tokens lie across the end of a page sooner or later.
        self.spec = KVCacheSpec(
            **(spec | {"max_seq_len": MAX_SEQ_LEN, "page_bytes": page_bytes, "large_page_bytes": sizes} | given)
        )
        self.config = config
        self.manager = KVCacheManager(
            self.spec, pool_bytes=config.pages * page_bytes, device=self.device, **config.options
        )
        self.manager._memory.set_delay(config.delay_us)
        self.fences = self.manager._fences = Fences()
        self.live: dict[int, Request] = {}
        self.freed: list[tuple[Request, int]] = []  # and the last program that may use it
        self.programs: collections.deque[Program] = collections.deque()  # not over yet, in order
        self.begun = self.over = 0  # programs
        self.waiting: tuple[Program, jax.Array] | None = None  # stepped and not finished
        self.requests = 0
        self.failing = False  # driver calls
        self.owed = 0  # slots that background work may have failed for

    # Rules

    @rule(expected=EXPECTED)
    def allocate(self, expected: int | None) -> None:
        taken = len(self.live) + sum(last > self.over for _, last in self.freed)
        try:
            slot = self.manager.allocate(expected)
        except errors.OutOfSlotsError:
            assert taken == SLOTS or self.failing, "a slot is neither live nor in a program's reach"
            self.seen["all slots taken"] += 1
            return
        assert taken < SLOTS
        assert slot not in self.live
        self.freed = [entry for entry in self.freed if entry[0].slot != slot]
        self.requests += 1
        self.live[slot] = Request(self.requests, slot)

    @rule(which=st.integers(0, SLOTS - 1))
    def free(self, which: int) -> None:
        if not self.live:
            return
        slot = list(self.live)[which % len(self.live)]
        self.manager.free(slot)
        request = self.live.pop(slot)
        self.freed.append((request, self.begun))

    @rule(growths=GROWTHS, seen=st.booleans(), hint=HINTS, late=LATE)
    def serve(self, growths: list[int], seen: bool, hint: int | None, late: bool) -> None:
        """Requests grow, each by a number of tokens of its own."""
        self.step(growths, seen, hint, late)

    @rule(tokens=st.integers(1, 4), seen=st.booleans(), hint=HINTS, late=LATE)
    def decode(self, tokens: int, seen: bool, hint: int | None, late: bool) -> None:
        """All requests grow alike."""
        self.step([tokens] * SLOTS, seen, hint, late)

    @rule(expected=EXPECTED, tokens=st.integers(1, MAX_SEQ_LEN), hint=HINTS, late=LATE)
    def prefill(self, expected: int | None, tokens: int, hint: int | None, late: bool) -> None:
        """A request comes with a prompt."""
        self.allocate(expected)
        self.step([0] * (len(self.live) - 1) + [tokens], False, hint, late)

    def step(self, growths: list[int], seen: bool, hint: int | None, late: bool) -> None:
        """A program for all slots that grow. It runs on for a while; or not even its `finish` is called yet."""
        self.dispatch()
        most = self.spec.max_seq_len
        wanted = {r.slot: min(r.length + n, most) for r, n in zip(self.live.values(), growths, strict=False) if n}
        seq_lens = {slot: r.length for slot, r in self.live.items()} if seen else None
        hints = {slot: min(wanted.get(slot, r.length) + hint, most) for slot, r in self.live.items()} if hint else None
        before = self.books()
        granted = self.manager._slots.granted.copy()
        try:
            cache = self.manager.step(wanted, seq_lens=seq_lens, next_lengths=hints)
        except (errors.OutOfPagesError, errors.DriverError) as error:
            self.check_refusal(error, wanted, before)
            return
        bounds = [mapped.copy() for mapped in self.manager._slots.mapped]
        parts = []
        for slot, end in wanted.items():
            request = self.live[slot]
            self.check_zeros(request, int(granted[slot]))
            parts.append((request, request.length, end, [int(mapped[0, slot]) for mapped in bounds]))
            assert all(mapped[1, slot] >= end for mapped in bounds)
            assert all(
                mapped[0, slot] <= max(0, request.length - (group.window or 0) + 1)
                for mapped, group in zip(bounds, self.spec.kv_groups, strict=True)
            )
            request.length = end
        self.seen["programs"] += 1
        self.seen["programs in flight"] = max(self.seen["programs in flight"], len(self.programs) + 1)
        self.begun += 1
        self.waiting = Program(parts), cache.order
        if not late:
            self.dispatch()

    def dispatch(self) -> None:
        """`finish(wait=False)`: the program is on its way."""
        if self.waiting is None:
            return
        program, order = self.waiting
        self.waiting = None
        self.programs.append(program)
        self.fences.program = program
        self.manager.finish(order, wait=False)

    @rule(count=st.integers(1, 4))
    def run(self, count: int) -> None:
        """Programs run and end, the oldest first."""
        for _ in range(min(count, len(self.programs))):
            program = self.programs.popleft()
            for request, start, end, firsts in program.parts:
                self.write_tokens(request, start, end)
                request.written = end
                self.check_tokens(request, firsts)
            program.over = True
            self.over += 1

    @rule()
    def finish(self) -> None:
        """`finish`, which waits."""
        if self.waiting is None:
            self.step([], False, None, late=True)
        if self.waiting is None:
            return  # it was refused
        program, order = self.waiting
        self.waiting = None
        self.programs.append(program)
        self.run(len(self.programs))
        self.fences.program = program
        self.manager.finish(order)

    @rule(calls=st.integers(0, 12), times=st.sampled_from([1, 1, 1, 2, 3]), out_of_memory=st.booleans())
    def break_driver(self, calls: int, times: int, out_of_memory: bool) -> None:
        """Later driver calls fail, whoever makes them. Once they have, `mend_driver` looks at what is left."""
        if self.failing:
            return self.mend_driver()
        self.manager._memory.inject_failure(calls, out_of_memory, times)
        self.failing = True

    @rule(tokens=st.integers(1, 40), out_of_memory=st.booleans())
    def break_background(self, tokens: int, out_of_memory: bool) -> None:
        """What is mapped ahead fails. Who needs it hears of it, unless memory was short, for it may not be any more."""
        self.manager.sync()
        self.break_driver(0, 1, out_of_memory)
        self.step([], False, tokens, late=False)
        self.mend_driver()
        self.step([tokens] * SLOTS, False, None, late=False)

    @rule()
    def mend_driver(self) -> None:
        """From here on nothing fails, and nothing has been lost."""
        self.manager._memory.inject_failure(0, False, 0)
        self.manager.sync()
        self.manager.sync()  # after a failure the first one stops
        for buffer in self.manager._buffers:
            buffer.zero([])  # puts right what could not be undone
        self.failing = False
        self.owed = len(self.live)
        self.check_native()

    @rule()
    def sync(self) -> None:
        self.manager.sync()
        if not self.failing:
            self.check_native()

    # What must be true

    @invariant()
    def counted(self) -> None:
        self.seen["steps"] += 1
        if not hasattr(self, "manager"):
            return
        if self.config.settled:
            self.manager.sync()
        stats = self.manager.stats()
        assert stats.pages_free + stats.pages_mapped + stats.pages_retained + stats.pages_retired == stats.pages_total
        counts = stats.pages_free, stats.pages_mapped, stats.pages_retired, stats.pages_retained_live
        assert min(counts) >= 0, stats
        assert stats.pages_retained_live <= stats.pages_retained, stats
        assert stats.slots_live == len(self.live)
        assert stats.tokens_live == sum(request.length for request in self.live.values())
        needed = sum(self.spec.pages_for(request.length) for request in self.live.values())
        windows = any(group.window for group in self.spec.kv_groups)
        assert stats.pages_mapped == needed or (windows and stats.pages_mapped < needed)
        assert stats.needed_bytes <= stats.mapped_bytes

    @invariant()
    def contents(self) -> None:
        """Every token that a program wrote is there while its request is, or while a program may read it."""
        if not hasattr(self, "manager"):
            return
        for request in self.live.values():
            self.check_tokens(request, [int(mapped[0, request.slot]) for mapped in self.manager._slots.mapped])
        for program in self.programs:
            for request, _, _, firsts in program.parts:
                self.check_tokens(request, firsts)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.dispatch()
        self.run(len(self.programs))
        self.mend_driver()
        for slot in list(self.live):
            self.manager.free(slot)
        self.manager.sync()
        stats = self.manager.stats()
        assert (stats.pages_mapped, stats.pages_retired) == (0, 0)
        self.check_native()
        for name in COUNTED:
            self.seen[name] += getattr(stats, name)
        self.manager.close()

    # Pieces

    def books(self) -> tuple[Any, ...]:
        """What a call that raises leaves as it was."""
        slots = self.manager._slots
        return slots.lens.tolist(), slots.granted.tolist(), [mapped.tolist() for mapped in slots.mapped]

    def check_refusal(self, error: Exception, wanted: dict[int, int], before: tuple[Any, ...]) -> None:
        """A step may fail if a driver call did, or if there are not enough pages; and then nothing has changed."""
        assert self.books() == before
        if self.failing:
            self.seen["steps that a driver call failed"] += 1
            return
        if isinstance(error, errors.DriverError):
            self.seen["steps that failed late"] += 1
            self.owed -= 1
            assert self.owed >= 0, "an error that is nobody's"
            return
        self.seen["steps without pages"] += 1
        lengths = {slot: wanted.get(slot, request.length) for slot, request in self.live.items()}
        # Pages come in sizes: what a slot cannot do without ends where its last needed page ends.
        used = sum(self.reach(slot, length) for slot, length in lengths.items())
        used += sum(self.reach(request.slot, request.length) for request, last in self.freed if last > self.over)
        used += self.manager._pages_behind
        assert used > self.manager._pages_total, "there were enough pages"

    def reach(self, slot: int, tokens: int) -> int:
        """Pages that a slot of so many tokens must have, given those that it has."""
        total = 0
        for group, extent in zip(self.spec.kv_groups, self.manager._slots.extents[slot], strict=True):
            end, need = extent.first, group.pages_for(tokens)
            for span, count in extent.spans():
                end += min(count, -(-max(0, need - end) // span)) * span
            total += (max(end, need) - extent.first) * group.planes
        return total

    def check_native(self) -> None:
        """The books say what is so."""
        self.manager.sync()
        stats = self.manager.stats()
        attached = sum(buffer.mapped_pages for buffer in self.manager._buffers)
        assert attached == stats.pages_mapped + stats.pages_retained + stats.pages_retired
        assert self.manager._pool.free_pages == stats.pages_free

    def places(self, slot: int) -> list[tuple[int, int, Any, int]]:
        """For each plane: its number, the number of its group, the group, and where the slot starts."""
        found = []
        for g, group in enumerate(self.spec.kv_groups):
            start = self.manager._buffers[g].address + slot * group.slot_pages * group.page_bytes
            for plane in range(group.planes):
                found.append((len(found), g, group, start + plane * group.plane_pages * group.page_bytes))
        return found

    def token_bytes(self, request: Request, plane: int, first: int, last: int, size: int) -> np.ndarray:
        """What tokens must hold: a value of their own."""
        values = (request.number * 37 + np.arange(first, last) * 11 + plane * 5) % 255 + 1
        return np.repeat(values.astype(np.uint8), size)

    def write_tokens(self, request: Request, start: int, end: int) -> None:
        for plane, _, group, address in self.places(request.slot):
            data = self.token_bytes(request, plane, start, end, group.token_bytes)
            write(self.device, address + start * group.token_bytes, data)

    def check_tokens(self, request: Request, firsts: list[int]) -> None:
        last = request.written
        for plane, g, group, address in self.places(request.slot):
            first = firsts[g]
            if first < last:
                size = group.token_bytes
                found = read(self.device, address + first * size, (last - first) * size)
                expected = self.token_bytes(request, plane, first, last, size)
                assert np.array_equal(found, expected), f"slot {request.slot}, plane {plane}: not what was written"

    def check_zeros(self, request: Request, granted: int) -> None:
        """Pages that were just granted hold nothing of anybody."""
        if not self.config.options["zero_pages"]:
            return
        now = int(self.manager._slots.granted[request.slot])
        for plane, _, group, address in self.places(request.slot):
            start, end = (group.pages_for(tokens) * group.page_bytes for tokens in (granted, now))
            if start < end:
                assert not read(self.device, address + start, end - start).any(), f"plane {plane}: somebody's data"


def search(device: jax.Device, steps: int, seed: int) -> collections.Counter[str]:
    """Runs machines until they have taken this many steps together. Returns what happened."""
    seen: collections.Counter[str] = collections.Counter()
    while seen["steps"] < steps:
        machine = type("ManagerModel", (ManagerModel,), {"device": device, "seen": seen})
        settings = hypothesis.settings(
            max_examples=min(steps - seen["steps"], 20_000) // STEPS + 1,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
        seed += 1_000
    return seen


def test_the_manager_does_what_a_simple_model_says(device, caplog):
    caplog.set_level(logging.ERROR, "jax_vattention.manager")
    seen: collections.Counter[str] = collections.Counter()
    # On a GPU what happens depends on its speed, too: there on until everything has happened.
    for seed, steps in enumerate([10_000] if device.platform == "cpu" else [2_000] * 5, start=1):
        seen += search(device, steps, seed)
        if all(seen[name] for name in HAPPENS):
            break
    for name in HAPPENS:
        assert seen[name] > 0, f"{name}: not once in {dict(seen)}"


def _search(arguments: tuple[str, int, int]) -> collections.Counter[str]:
    logging.disable()
    platform, steps, seed = arguments
    return search(jax.devices(platform)[0], steps, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.perf_counter()
    each = -(-options.steps // options.processes)
    work = [(options.platform, each, options.seed + n) for n in range(options.processes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        seen = sum(pool.imap_unordered(_search, work), collections.Counter())
    for name, count in seen.items():
        print(f"{count:>10} {name}")
    print(f"{time.perf_counter() - start:.0f} s, seed {options.seed}: no difference")


if __name__ == "__main__":
    main()
