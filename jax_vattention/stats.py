"""What a cache manager says of itself: counts and times."""

from __future__ import annotations

import dataclasses


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
    """Most that was ever granted at once."""
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
    """Times that a call waited for the mapper; `sync` and `close` do not count."""
    wait_seconds: float
    """How long, together."""
    mapper_seconds: float
    """How long the mapper has been at work."""
    background_failures: int
    """Times that background work failed and was undone."""

    @property
    def pages_available(self) -> int:
        """What slots can still be granted: free pages, and those that are attached but granted to nobody."""
        return self.pages_free + self.pages_retained

    @property
    def bytes_by_state(self) -> dict[str, int]:
        """The pool: free, mapped, retained and retired bytes, which add up to all of it."""
        pages = {
            "free": self.pages_free,
            "mapped": self.pages_mapped,
            "retained": self.pages_retained,
            "retired": self.pages_retired,
        }
        return {state: count * self.page_bytes for state, count in pages.items()}

    @property
    def waste(self) -> float:
        """Internal fragmentation: what live slots have been granted and do not fill, as a share of what they fill."""
        return (self.mapped_bytes - self.needed_bytes) / self.needed_bytes if self.needed_bytes else 0.0

    @property
    def fragmentation(self) -> float:
        """External fragmentation: the share of the pool's free bytes that cannot be given as pages of the largest size
        unless idle smaller pages are released for them. 0 with one size of pages."""
        largest = max(self.pages_by_size)
        unmade = self.pages_total * self.page_bytes - sum(size * made for size, (made, _) in self.pages_by_size.items())
        free = unmade + sum(size * idle for size, (_, idle) in self.pages_by_size.items())
        ready = self.pages_by_size[largest][1] * largest + unmade // largest * largest
        return 1 - ready / free if free else 0.0
