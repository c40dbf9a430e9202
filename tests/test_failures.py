"""Every driver call of every operation fails once: the state is as before, the error names the call, nothing leaks."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_manager import conserved

from jax_vattention import KVCacheManager, KVCacheSpec, errors
from jax_vattention.memory import Mapper, PagedBuffer, PagePool, open_memory
from jax_vattention.spec import LayerGroup

INJECTED = "(an injected failure)"


# Memory, byte for byte


@functools.cache
def _cuda() -> Any:
    """The driver API, with the device's primary context current on this thread."""
    from cuda.bindings import driver

    for result in (driver.cuInit(0), context := driver.cuDevicePrimaryCtxRetain(0), driver.cuCtxSetCurrent(context[1])):
        assert int(result[0]) == 0
    return driver


def poke(device: jax.Device, address: int, data: bytes) -> None:
    if device.platform == "cpu":
        ctypes.memmove(address, data, len(data))
    else:
        assert int(_cuda().cuMemcpyHtoD(address, data, len(data))[0]) == 0


def peek(device: jax.Device, address: int, count: int) -> bytes:
    if device.platform == "cpu":
        return ctypes.string_at(address, count)
    data = bytearray(count)
    assert int(_cuda().cuMemcpyDtoH(data, address, count)[0]) == 0
    return bytes(data)


class Ink:
    """Marks on pages: what is written on a page stays there, and a page that is new to its owner holds zeros."""

    def __init__(self, device: jax.Device, page_bytes: int):
        self._device, self._page_bytes = device, page_bytes
        self._marks: dict[tuple[int, Any], bytes] = {}  # by address and owner
        self._next = itertools.count(1)

    def write(self, pages: dict[int, Any]) -> None:
        """Marks the pages that are new; the others still bear their mark."""
        self.check(pages)
        for address, owner in pages.items():
            if (address, owner) not in self._marks:
                assert not any(peek(self._device, address, self._page_bytes)), "a page with somebody's data on it"
                mark = next(self._next).to_bytes(8, "little")
                poke(self._device, address, mark)
                poke(self._device, address + self._page_bytes - 8, mark)
                self._marks[address, owner] = mark

    def check(self, pages: dict[int, Any]) -> None:
        """Forgets pages that are not among these; all others bear their mark."""
        self._marks = {key: mark for key, mark in self._marks.items() if pages.get(key[0]) == key[1]}
        for (address, _), mark in self._marks.items():
            for at in (address, address + self._page_bytes - 8):
                assert peek(self._device, at, 8) == mark


def held(device: jax.Device) -> tuple[int, int]:
    """What a process could leak: file descriptors and mappings on the host, bytes of a GPU."""
    gc.collect()
    if device.platform != "cpu":
        if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
            pytest.fail("what other processes take of the GPU shows too: run this file without -n")
        return 0, open_memory(device).info()[0]
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("memfd:jax_vattention" in line for line in maps)


def pages_in_memory(device: jax.Device) -> int:
    """Blocks behind all page files of this process; none are left when all pages are released."""
    if device.platform != "cpu":
        return 0
    blocks = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:jax_vattention" in os.readlink(f"/proc/self/fd/{name}"):
                blocks += os.fstat(int(name)).st_blocks
        except FileNotFoundError:
            pass  # the listing's own
    return blocks


def disarm(memory) -> None:
    memory.inject_failure(0, False, 0)


def verb(text: str) -> str:
    """What the call that failed was doing: creating, mapping, unmapping, zeroing, reserving, releasing or asking."""
    return re.search(r"\(code \d+\): (\w+)", text)[1]


def names_call_and_code(text: str, device: jax.Device, out_of_memory: bool) -> None:
    """An injected failure looks like one of the backend's own."""
    if device.platform == "cpu":
        calls, names = "fallocate|mmap|memset|sysinfo", (r"EIO \(code 5\)", r"ENOMEM \(code 12\)")
    else:
        calls = r"cuMem\w+|cuStreamSynchronize"
        names = r"CUDA_ERROR_UNKNOWN \(code 999\)", r"CUDA_ERROR_OUT_OF_MEMORY \(code 2\)"
    assert re.search(rf"\b({calls}) failed with {names[out_of_memory]}: .*{re.escape(INJECTED)}", text)


def carries_call_and_code(error: errors.DriverError, out_of_memory: bool) -> None:
    """What the message says is there to be read by programs too."""
    assert error.out_of_memory is out_of_memory
    assert str(error).startswith(f"{error.call} failed with {error.name} (code {error.code}): {error.state}")


# Buffers and pools


PAGES = 16


class Buffers:
    """Two buffers on one pool with pages of two sizes, some mapped and marked."""

    def __init__(self, device: jax.Device, page_bytes: int, strict: bool):
        self.page_bytes = page_bytes
        self.memory = open_memory(device, strict=strict)
        self.pool = PagePool(self.memory, [page_bytes, 2 * page_bytes], 12 * page_bytes)
        self.first, self.second = (PagedBuffer(self.pool, PAGES * page_bytes) for _ in range(2))
        self.mapper = Mapper()
        self.ink = Ink(device, page_bytes)
        self.first.map([(0, 3, 1), (4, 1, 2)])
        self.second.map([(1, 2, 1)])
        self.mapped = {(self.first, page) for page in (0, 1, 2, 4, 5)} | {(self.second, page) for page in (1, 2)}
        self.unsure: set[tuple[PagedBuffer, int]] = set()  # of which the bytes are of no value
        self.ink.write(self.addresses())

    def addresses(self) -> dict[int, int]:
        return {buffer.address + page * self.page_bytes: 0 for buffer, page in self.mapped - self.unsure}

    def check(self, *, mended: bool = True) -> None:
        """Both the counts and the bytes are as they are believed to be."""
        for buffer in (self.first, self.second):
            assert buffer.mapped_pages == sum(owner is buffer for owner, _ in self.mapped)
        if mended:
            assert self.pool.total_pages - self.pool.free_pages == len(self.mapped)
            self.ink.check(self.addresses())
        assert self.pool.created_pages <= self.pool.total_pages
        assert self.pool.created_pages == sum(
            size // self.page_bytes * created for size, (created, _) in self.pool.counts().items()
        )

    def mend(self) -> None:
        """Any work makes a buffer put right what could not be undone."""
        for buffer in (self.first, self.second):
            buffer.zero([])

    def run(self, job: Callable[..., int], *args: Any, **options: Any) -> None:
        """Has the mapper do it, and waits."""
        ticket = job(*args, **options)
        self.mapper.wait(ticket)
        self.mapper.raise_if_failed(ticket)


def map_one(own: Buffers) -> None:
    own.first.map([(8, 1, 2), (12, 2, 1)])
    own.mapped |= {(own.first, page) for page in (8, 9, 12, 13)}


def map_in_other_sizes(own: Buffers) -> None:
    """The budget is used up: idle pages of one size make room for the other."""
    small = {(own.first, page) for page in (0, 1, 2)}
    if small <= own.mapped:
        own.first.unmap([(0, 3, 1)])
        own.mapped -= small
    own.second.map([(4, 4, 2)])
    own.mapped |= {(own.second, page) for page in range(4, 12)}


def unmap_one(own: Buffers) -> None:
    own.first.unmap([(1, 2, 1), (4, 1, 2)])
    own.mapped -= {(own.first, page) for page in (1, 2, 4, 5)}


def zero_one(own: Buffers) -> None:
    own.unsure |= {(own.second, page) for page in (1, 2)}
    own.second.zero([(1, 1, 1), (2, 1, 1)])


def map_both(own: Buffers) -> None:
    own.run(own.mapper.map, [(own.first, [(8, 2, 1)]), (own.second, [(8, 1, 2)])], zero=True)
    own.mapped |= {(buffer, page) for buffer in (own.first, own.second) for page in (8, 9)}


def unmap_both(own: Buffers) -> None:
    own.run(own.mapper.unmap, [(own.first, [(4, 1, 2), (0, 2, 1)]), (own.second, [(2, 1, 1)])])
    own.mapped -= {(own.first, page) for page in (0, 1, 4, 5)} | {(own.second, 2)}


def zero_both(own: Buffers) -> None:
    own.unsure |= {(own.first, 0), (own.second, 2)}
    own.run(own.mapper.zero, [(own.first, [(0, 1, 1)]), (own.second, [(2, 1, 1)])])


# What the calls of each were doing.
OPERATIONS = {
    map_one: {"creating", "mapping", "zeroing"},
    map_in_other_sizes: {"unmapping", "releasing", "creating", "mapping", "zeroing"},
    unmap_one: {"unmapping"},
    zero_one: {"zeroing"},
    map_both: {"creating", "mapping", "zeroing"},
    unmap_both: {"unmapping"},
    zero_both: {"zeroing"},
}


@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize("operate", OPERATIONS, ids=lambda operate: operate.__name__)
def test_buffers_and_pools(device, page_bytes, strict, operate, out_of_memory, capfd):
    Buffers(device, page_bytes, strict)  # what is opened once stays open
    before = held(device)
    found = set()
    for calls in itertools.count():
        assert calls < 100
        own = Buffers(device, page_bytes, strict)
        own.memory.inject_failure(calls, out_of_memory)
        failed = None
        try:
            operate(own)
        except errors.DriverError as error:
            names_call_and_code(str(error), device, out_of_memory)
            carries_call_and_code(error, out_of_memory)
            failed = verb(str(error))
        disarm(own.memory)
        logged = capfd.readouterr().err
        if failed is None and logged:  # of a release: nobody to raise it to
            assert logged.count("\n") == 1
            assert INJECTED in logged
            failed = verb(logged)
        found.add(failed)
        own.check()
        if failed not in (None, "releasing"):
            operate(own)
            own.check()
        own.ink.write(own.addresses())
        fired = own.memory.injected
        del own
        assert capfd.readouterr().err == ""
        if not fired:
            break
    found.discard(None)
    # A full device is no failure while idle pages can be given up.
    absorbed = {"creating"} if out_of_memory and operate is map_in_other_sizes else set()
    assert found | absorbed == OPERATIONS[operate]
    assert (pages_in_memory(device), held(device)) == (0, before)


@pytest.mark.parametrize("times", [2, 3, 4, 1000])
@pytest.mark.parametrize("operate", [map_one, unmap_one, map_both, unmap_both], ids=lambda operate: operate.__name__)
def test_a_driver_that_refuses_the_undoing_too(device, page_bytes, strict, operate, times, capfd):
    """That cannot be hidden. But nothing gets lost, and the next work on the buffer puts it right."""
    Buffers(device, page_bytes, strict)
    before = held(device)
    seen = ""
    for calls in itertools.count():
        own = Buffers(device, page_bytes, strict)
        own.memory.inject_failure(calls, False, times)
        try:
            operate(own)
        except errors.DriverError:
            own.check(mended=False)
        fired = own.memory.injected
        disarm(own.memory)
        if not fired:
            del own
            break
        own.mend()
        own.check()
        operate(own)
        own.check()
        own.ink.write(own.addresses())
        del own
        seen += capfd.readouterr().err
    assert ("tried again" in seen) or calls == 0
    assert (pages_in_memory(device), held(device)) == (0, before)


# The manager


class Serving:
    """A manager, and requests that mark every page that they are granted."""

    def __init__(self, device: jax.Device, page_bytes: int, strict: bool, case: Case):
        spec = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "num_slots": 4, "dtype": jnp.float32}
        # A token of a layer is 128 bytes.
        spec |= {"max_seq_len": 6 * page_bytes // 128, "page_bytes": page_bytes} | case.spec(page_bytes)
        options: dict[str, Any] = {"lookahead_steps": 0, "reclaim_below": 0.0} | case.options
        options.setdefault("pool_bytes", case.pages * page_bytes)
        self.device = device
        self.manager = KVCacheManager(KVCacheSpec(**spec), device=device, strict=strict, **options)
        self.memory = self.manager._memory
        self.page = page_bytes // 128  # tokens
        self.ink = Ink(device, page_bytes)
        self.requests: dict[int, int] = {}  # by slot
        self.lengths: dict[int, int] = {}
        self.count = 0

    def begin(self, expected: int | None = None) -> int:
        slot = self.manager.allocate(expected)
        self.count += 1
        self.requests[slot], self.lengths[slot] = self.count, 0
        return slot

    def step(self, lengths: dict[int, int], **options: Any) -> None:
        cache = self.manager.step(lengths, **options)
        self.lengths |= lengths
        self.ink.write(self.granted())
        self.manager.finish(cache)

    def end(self, slot: int) -> None:
        self.manager.free(slot)
        del self.requests[slot], self.lengths[slot]

    def end_all(self) -> None:
        """After which all pages are free or retained."""
        for slot in list(self.requests):
            self.end(slot)
        self.step({})
        self.manager.sync()
        self.manager.sync()  # after a failure the first one stops

    def granted(self) -> dict[int, tuple[int, int]]:
        """Addresses of all pages that programs are told of, and whose they are."""
        slots, found = self.manager._slots, {}
        for slot, request in self.requests.items():
            for g, group in enumerate(slots.groups):
                end = group.pages_for(int(slots.granted[slot]))
                for plane, page in itertools.product(range(group.planes), range(slots.extents[slot][g].first, end)):
                    at = (plane * group.plane_pages + slot * group.slot_pages + page) * group.page_bytes
                    found[self.manager._buffers[g].address + at] = slot, request
        return found

    def mend(self) -> None:
        """Any work makes a buffer put right what could not be undone."""
        for buffer in self.manager._buffers:
            buffer.zero([])

    def state(self) -> tuple[Any, ...]:
        """All that a call which raises leaves as it was, checked to be sound. Spare pages may have become free."""
        stats = conserved(self.manager)
        self.ink.check(self.granted())
        names = "pages_mapped", "pages_retired", "mapped_bytes", "needed_bytes", "slots_live", "slots_retired"
        spare = stats.pages_free + stats.pages_retained
        slots = self.manager._slots
        return spare, slots.lens.tolist(), slots.granted.tolist(), *(getattr(stats, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation of the manager, and how a failure of what its driver calls were doing shows."""

    prepare: Callable[[Serving], Any]
    operate: Callable[[Serving, Any], None]
    raised: tuple[str, ...] = ()
    """By the operation."""
    counted: tuple[str, ...] = ()
    """As a background failure."""
    logged: tuple[str, ...] = ()
    """Only to stderr."""
    depend: Callable[[Serving, Any], None] | None = None
    """What needs the work that was done in the background: it raises what failed there."""
    pages: int = 20
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spec: Callable[[int], dict[str, Any]] = lambda page_bytes: {}


def one_page(own: Serving) -> tuple[int, int]:
    """Two slots, the first with a page."""
    first, second = own.begin(), own.begin()
    own.step({first: own.page})
    return first, second


def grow(own: Serving, slots: Any) -> None:
    own.step({slots[0]: 3 * own.page, slots[1]: 2 * own.page})


def look_ahead(own: Serving, slots: Any) -> None:
    own.step({}, next_lengths={slots[0]: 3 * own.page, slots[1]: 2 * own.page})


def parked(own: Serving) -> tuple[int, int]:
    """Two slots with no pages while all pages but one are in two parked ones."""
    slots = [own.begin() for _ in range(4)]
    own.step(dict.fromkeys(slots[:2], 2 * own.page))
    for slot in slots[:2]:
        own.end(slot)
    own.manager.sync()
    return slots[2], slots[3]


def end_first(own: Serving, slots: Any) -> None:
    if slots[0] in own.requests:
        own.end(slots[0])
    own.step({})


def two_groups(page_bytes: int) -> dict[str, Any]:
    """Windows of a page and a half, and none; tokens of both are 128 bytes."""
    groups = LayerGroup((0,), window=page_bytes * 3 // 256), LayerGroup((1,))
    return {"num_layers": 2, "groups": groups}


def long_request(own: Serving) -> tuple[int]:
    slot = own.begin()
    own.step({slot: 4 * own.page})
    return (slot,)


def pass_window(own: Serving, slots: Any) -> None:
    seen = {slots[0]: 4 * own.page}
    own.step({}, seq_lens=seen)
    own.step({}, seq_lens=seen)  # the program that may have read them is over


def behind_window(own: Serving) -> tuple[int]:
    slots = long_request(own)
    pass_window(own, slots)
    return slots


def small_pages_idle(own: Serving) -> tuple[int]:
    """Half of the pool is made of small pages, in a parked slot that the next request takes."""
    slot = own.begin()
    own.step({slot: 4 * own.page})
    own.end(slot)
    own.manager.sync()
    own.begin()
    return (own.begin(),)


def prompt(own: Serving, slots: Any) -> None:
    own.step({slots[0]: 8 * own.page})


MAP = ("creating", "mapping", "zeroing")
CASES = {
    "a step that maps": Case(one_page, grow, raised=MAP),
    "a step that maps, without background": Case(one_page, grow, raised=MAP, options={"background": False}),
    "a step that maps ahead": Case(one_page, look_ahead, counted=MAP, depend=grow, options={"lookahead_steps": 2}),
    "a step that reclaims": Case(parked, grow, raised=("unmapping", *MAP), pages=5),
    "reclaiming ahead": Case(
        parked, lambda own, slots: own.step({}), counted=("unmapping",), pages=5, options={"reclaim_below": 0.6}
    ),
    "parking": Case(one_page, end_first, counted=("zeroing",)),
    "freeing, without background": Case(one_page, end_first, counted=("unmapping",), options={"background": False}),
    "making slots ready": Case(
        lambda own: None,
        lambda own, _: own.step({}),
        counted=MAP,
        options={"eager_slots": 2, "eager_tokens": 40},
    ),
    "leaving pages behind a window": Case(long_request, pass_window, counted=("unmapping",), spec=two_groups),
    "freeing a slot behind a window": Case(behind_window, end_first, counted=("unmapping", "zeroing"), spec=two_groups),
    "pages of another size": Case(
        small_pages_idle,
        prompt,
        raised=("unmapping", *MAP),
        logged=("releasing",),
        pages=8,
        spec=lambda page_bytes: {"large_page_bytes": (8 * page_bytes,), "max_seq_len": 8 * page_bytes // 128},
    ),
    "many planes": Case(
        one_page, grow, raised=MAP, pages=80, spec=lambda page_bytes: {"num_layers": 4, "layout": "layer_major"}
    ),
    "two groups": Case(one_page, grow, raised=MAP, spec=two_groups),
}


@dataclasses.dataclass
class Outcome:
    """What became of one injected failure."""

    how: str = ""
    """raised, counted or logged; "" if it did not matter, or there was none."""
    text: str = ""
    error: Exception | None = None


def run_failing(own: Serving, operate: Callable[[], None], calls: int, out_of_memory: bool, capfd, caplog) -> Outcome:
    """One operation, whose driver call number `calls` fails."""
    caplog.clear()
    failures = own.manager.stats().background_failures
    own.memory.inject_failure(calls, out_of_memory)
    raised = None
    try:
        operate()
    except (errors.DriverError, errors.OutOfPagesError) as error:
        # Without its frames: they would keep the manager alive.
        raised = error.with_traceback(None)
        raised.__context__ = None
        if raised.__cause__ is not None:
            raised.__cause__.with_traceback(None)
    own.manager.sync()
    disarm(own.memory)
    failures = own.manager.stats().background_failures - failures
    logged = capfd.readouterr().err
    assert own.memory.injected == (raised is not None) + failures + logged.count("\n") or out_of_memory
    assert own.memory.injected <= 1
    if raised is not None:
        return Outcome("raised", str(raised), raised)
    if failures:
        (record,) = caplog.records
        return Outcome("counted", record.getMessage())
    return Outcome("logged", logged) if logged else Outcome()


def fail_each_call(device, page_bytes, strict, case, out_of_memory, capfd, caplog) -> tuple[dict[str, set[str]], Any]:
    """Each driver call of an operation fails once. Returns how that showed, and what was held after the first time."""
    found: dict[str, set[str]] = {"raised": set(), "counted": set(), "logged": set()}
    before = None
    for calls in itertools.count():
        assert calls < 200
        own = Serving(device, page_bytes, strict, case)
        slots = case.prepare(own)
        state = own.state()
        outcome = run_failing(own, lambda: case.operate(own, slots), calls, out_of_memory, capfd, caplog)  # noqa: B023, F821
        if outcome.how:
            found[outcome.how].add(verb(outcome.text))
            names_call_and_code(outcome.text, device, out_of_memory)
        if outcome.error is not None:
            memory = out_of_memory and verb(outcome.text) in MAP
            assert isinstance(outcome.error, errors.OutOfPagesError if memory else errors.DriverError)
            carries_call_and_code(outcome.error.__cause__ or outcome.error, out_of_memory)
            assert own.state() == state
            case.operate(own, slots)
        if case.depend:
            state = own.state()
            if outcome.how == "counted" and not out_of_memory:
                with pytest.raises(errors.DriverError, match=r"injected failure") as raised:
                    case.depend(own, slots)
                assert outcome.text.endswith(str(raised.value))
                del raised  # and with it the frames
                assert own.state() == state
            case.depend(own, slots)
        own.state()
        own.end_all()
        stats = conserved(own.manager)
        assert (stats.pages_mapped, stats.pages_retired, stats.slots_live, stats.slots_retired) == (0, 0, 0, 0)
        # Nobody finds what others wrote, whatever failed.
        with contextlib.suppress(errors.OutOfPagesError):  # a large page may be all there is
            for slot in [own.begin() for _ in range(4)]:
                own.step({slot: own.page})
        fired = own.memory.injected
        own.manager.close()
        assert pages_in_memory(device) == 0
        del own
        assert capfd.readouterr().err == ""
        if before is None:
            before = held(device)  # what is opened once stays open
        if not fired:
            break
    return found, before


@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_manager(device, page_bytes, strict, name, out_of_memory, capfd, caplog):
    case = CASES[name]
    caplog.set_level(logging.WARNING, "jax_vattention.manager")
    found, before = fail_each_call(device, page_bytes, strict, case, out_of_memory, capfd, caplog)
    if held(device) != before:  # the driver may have opened something late, once; a leak comes again
        found, before = fail_each_call(device, page_bytes, strict, case, out_of_memory, capfd, caplog)
    assert held(device) == before
    expected = {"raised": set(case.raised), "counted": set(case.counted), "logged": set(case.logged)}
    if out_of_memory:
        # A full device is no failure while there are other pages to take.
        assert all(found[how] <= expected[how] for how in found)
        assert any(found.values())
    else:
        assert found == expected


@pytest.mark.parametrize("out_of_memory", [False, True])
@pytest.mark.parametrize("name", ["a step that maps", "a step that maps ahead", "a step that reclaims"])
def test_an_error_keeps_no_cache_alive(device, page_bytes, strict, name, out_of_memory, monkeypatch):
    """Once it is handled the manager can be closed, without waiting for the garbage collector."""
    monkeypatch.setattr("jax_vattention.manager._CLOSE_SECONDS", 0.05)
    case = CASES[name]
    own = Serving(device, page_bytes, strict, case)
    slots = case.prepare(own)

    def serve():
        cache = own.manager.step({})
        for operate in (case.operate, case.depend or case.operate):
            own.memory.inject_failure(0, out_of_memory)
            operate(own, slots)
            own.manager.sync()
        del cache

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(errors.DriverError, errors.OutOfPagesError):
            serve()
        disarm(own.memory)
        assert own.memory.injected
        own.manager.close()
    finally:
        gc.enable()


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_making_a_manager(device, page_bytes, strict, out_of_memory, monkeypatch):
    opened = []

    def armed(*args, **options):
        memory = open_memory(*args, **options)
        memory.inject_failure(calls, out_of_memory)
        opened.append(memory)
        return memory

    case = Case(one_page, grow, spec=two_groups, options={"pool_bytes": None, "pool_share": 0.0001})
    Serving(device, page_bytes, strict, case).manager.close()
    before = held(device)
    monkeypatch.setattr("jax_vattention.manager.open_memory", armed)
    found = set()
    for calls in itertools.count():  # noqa: B007
        try:
            Serving(device, page_bytes, strict, case).manager.close()
        except errors.DriverError as error:
            names_call_and_code(str(error), device, out_of_memory)
            carries_call_and_code(error, out_of_memory)
            found.add(verb(str(error)))
        if not opened.pop().injected:
            break
        assert held(device) == before
    assert found == {"asking", "reserving"}
    assert held(device) == before


def fail_each_call_of_close(device, page_bytes, strict, capfd, before=None):
    """Which calls failed. After each, as much is held as `before`, if that is given."""
    found = set()
    for calls in itertools.count():
        own = Serving(device, page_bytes, strict, CASES["two groups"])
        slots = one_page(own)
        grow(own, slots)
        memory = own.memory
        memory.inject_failure(calls, False)
        own.manager.close()
        disarm(memory)
        with pytest.raises(errors.ClosedError):
            own.manager.stats()
        logged = capfd.readouterr().err
        assert logged.count("\n") == memory.injected
        if logged:
            found.add(verb(logged))
        assert pages_in_memory(device) == 0
        fired = memory.injected
        del own, memory
        if before is not None:
            assert held(device) == before
        if not fired:
            return found


def test_closing(device, page_bytes, strict, capfd):
    """What fails then is logged; nobody could do anything about it."""
    fail_each_call_of_close(device, page_bytes, strict, capfd)  # what is opened once, maybe late, stays open
    found = fail_each_call_of_close(device, page_bytes, strict, capfd, before=held(device))
    assert found == {"unmapping", "releasing"}


@pytest.mark.parametrize("name", CASES)
def test_a_driver_that_fails_for_good(device, page_bytes, strict, name, capfd):
    """Every call ends, raises what it needed and could not get, and all is well once the driver is."""
    case = CASES[name]
    for calls in range(6):
        own = Serving(device, page_bytes, strict, case)
        slots = case.prepare(own)
        conserved(own.manager)
        own.memory.inject_failure(calls, False, 10**6)
        for _ in range(3):
            try:
                case.operate(own, slots)
            except errors.DriverError as error:
                assert INJECTED in str(error)
            own.manager.sync()
            conserved(own.manager, sync=False)
            own.ink.check(own.granted())
        disarm(own.memory)
        own.mend()
        for _ in range(2):
            try:
                case.operate(own, slots)
                break
            except errors.DriverError as error:
                assert INJECTED in str(error)  # of the background
        own.end_all()
        own.end_all()
        stats = conserved(own.manager)
        assert (stats.pages_mapped, stats.pages_retired) == (0, 0)
        capfd.readouterr()
        own.manager.close()
        assert capfd.readouterr().err == ""
