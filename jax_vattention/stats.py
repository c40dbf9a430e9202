"""What a cache manager says of itself: counts and times, and a picture of its slots."""

from __future__ import annotations

import dataclasses
import json

from jax_vattention.slots import SlotState, SlotTable


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment, and what was done so far.

    Pages are counted in smallest pages. `free + mapped + retained + retired == total`, always.
    """

    page_bytes: int
    """Of a smallest page."""
    virtual_bytes: int
    """Address space of all views."""
    mapped_bytes: int
    """Physical memory granted to live slots."""
    mapped_bytes_peak: int
    needed_bytes: int
    """Of `mapped_bytes`, what live tokens fill; the rest is the unused part of last pages."""
    pages_total: int
    pages_free: int
    """Can be mapped now; pages that were not made yet count."""
    pages_mapped: int
    """Granted to live slots."""
    pages_retained: int
    """Attached, but granted to nobody: those of parked slots, and spare ones of live slots."""
    pages_retained_live: int
    """Of those, the spare ones of live slots: mapped ahead, or left by the request before."""
    pages_retired: int
    """Waiting for a program that may still use them, or for being unmapped."""
    pages_peak: int
    """Most pages that were ever granted to live slots at once."""
    pages_created: int
    """Pages that take up device memory."""
    pages_by_size: dict[int, tuple[int, int]]
    """For each size in bytes: pages of that size that exist, and how many of those are idle."""
    slots_live: int
    slots_parked: int
    slots_retired: int
    slots_total: int
    tokens_live: int
    """Tokens that the last `step` of each live slot asked for."""
    maps_needed: int
    """Pages mapped because the coming program needed them: `step` waited."""
    maps_ahead: int
    """Pages mapped in the background for later programs of live slots."""
    maps_eager: int
    """Pages mapped in the background for slots without a request."""
    unmaps: int
    """Pages unmapped."""
    reclaims: int
    """Times that spare or parked pages were taken away."""
    zeroed_pages: int
    """Pages of parked slots that were zeroed for the next request."""
    adoptions: int
    """Requests that took over a parked slot."""
    waits: int
    """Times that `step` waited for the mapper."""
    wait_seconds: float
    mapper_seconds: float
    """How long the mapper has been at work."""
    background_failures: int

    @property
    def pages_available(self) -> int:
        """What slots can still be granted: free pages, and those that are attached but granted to nobody."""
        return self.pages_free + self.pages_retained

    @property
    def waste(self) -> float:
        """What live slots have been granted and do not fill, as a share of what they fill."""
        return (self.mapped_bytes - self.needed_bytes) / self.needed_bytes if self.needed_bytes else 0.0


@dataclasses.dataclass(frozen=True)
class SlotSnapshot:
    """One slot at one moment; pages are smallest pages of all planes and groups."""

    slot: int
    state: str
    """idle, live, retired or parked."""
    tokens: int
    """That the last `step` asked for."""
    pages: int
    """Attached."""
    pages_granted: int
    page_sizes: dict[int, int]
    """How many pages of which size in bytes are attached."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All slots that are not idle and empty, and the counts, at one moment. `jax-vattention draw` makes a picture."""

    stats: CacheStats
    slots: tuple[SlotSnapshot, ...]

    def to_json(self) -> str:
        """As one JSON object; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Reads what `to_json` wrote.

        Raises:
          ValueError: it is something else.
        """
        try:
            values = json.loads(text)
            stats = values["stats"]
            stats["pages_by_size"] = {int(size): tuple(counts) for size, counts in stats["pages_by_size"].items()}
            slots = (
                {**slot, "page_sizes": {int(size): count for size, count in slot["page_sizes"].items()}}
                for slot in values["slots"]
            )
            return cls(CacheStats(**stats), tuple(SlotSnapshot(**slot) for slot in slots))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a snapshot as Snapshot.to_json() writes it: {error!r} is missing") from error


def slot_snapshots(table: SlotTable) -> tuple[SlotSnapshot, ...]:
    """Of all slots that have a request or a page."""
    found = []
    for slot in range(table.spec.num_slots):
        state = SlotState(int(table.state[slot]))
        if state is SlotState.IDLE and not table.pages[slot]:
            continue
        sizes: dict[int, int] = {}
        for extent, group in zip(table.extents[slot], table.groups, strict=True):
            for span, count in extent.spans():
                size = span * table.spec.page_bytes
                sizes[size] = sizes.get(size, 0) + count * group.planes
        found.append(
            SlotSnapshot(
                slot,
                state.name.lower(),
                int(table.lens[slot]),
                int(table.pages[slot]),
                int(table.pages_granted[slot]),
                sizes,
            )
        )
    return tuple(found)
