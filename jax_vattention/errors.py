"""Everything that this package raises of its own, below one base class."""

from __future__ import annotations


class VAttentionError(Exception):
    """Base class of the errors of this package."""


class DriverError(VAttentionError):
    """A call of the memory backend failed: `call`, `code`, its `name`, and the `state` it was working on."""

    def __init__(self, message: str, call: str, code: int, name: str, state: str, out_of_memory: bool):
        super().__init__(message)
        self.call = call
        self.code = code
        self.name = name
        self.state = state
        self.out_of_memory = out_of_memory


class DriverUnavailableError(VAttentionError):
    """CUDA was asked for on a machine that has no usable driver."""


class OutOfPagesError(VAttentionError, MemoryError):
    """There are not enough free pages. Nothing was mapped: free a slot, wait for a program, or enlarge the pool."""


class OutOfSlotsError(VAttentionError):
    """All slots are taken. Free one, or make the cache with more: a slot costs virtual memory only."""


class UnknownSlotError(VAttentionError, KeyError):
    """A slot that is not allocated: never taken, or freed already."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class SequenceTooLongError(VAttentionError, ValueError):
    """A length is negative, or more than `max_seq_len`."""


class DroppedWriteError(VAttentionError):
    """A program appended a token with no memory behind it. The write was dropped; the cache is as it was."""

    def __init__(self, count: int, slot: int, position: int, mapped_len: int):
        super().__init__(
            f"{count} write(s) were dropped; the first to slot {slot}, position {position}, where {mapped_len} tokens "
            "are mapped. Call step() with the length that the program will reach before running it"
        )
        self.count = count
        self.slot = slot
        self.position = position
        self.mapped_len = mapped_len


class NotDifferentiableError(VAttentionError, NotImplementedError):
    """A derivative was asked for through `attention` or `KVCache.append`."""


class ClosedError(VAttentionError):
    """The cache manager is closed, or cannot be closed because views of its memory are alive."""
