"""Repeated timings, and what is said about them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any


@dataclasses.dataclass(frozen=True)
class Timing:
    """Several measurements of one quantity, in seconds."""

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """From the measurements, in any order."""
        ordered = tuple(sorted(seconds))
        if not ordered:
            raise ValueError("Timing: expected at least one measurement, got none")
        return cls(ordered)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Seconds of the fastest."""
        return self.seconds[0]

    @property
    def worst(self) -> float:
        """Seconds of the slowest."""
        return self.seconds[-1]

    def divided(self, parts: int) -> Timing:
        """Of each of `parts` equal parts of what was measured."""
        return Timing(tuple(seconds / parts for seconds in self.seconds))

    def quantile(self, share: float) -> float:
        """Seconds that `share` of the measurements do not exceed (nearest rank)."""
        rank = max(1, -int(-share * len(self.seconds) // 1))
        return self.seconds[min(rank, len(self.seconds)) - 1]


def repeat(action: Callable[[], Any], repeats: int, *, warmup: int = 1) -> Timing:
    """Times `action` `repeats` times, after `warmup` calls that do not count."""
    for _ in range(warmup):
        action()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return Timing.of(seconds)


_SAMPLE_SECONDS = 0.04  # of one measurement of `back_to_back`: long beside the jitter of one launch and one wait


def back_to_back(
    launch: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    seconds: float,
    fewest: int = 5,
    most: int = 200,
    most_launches: int = 33,
) -> Timing:
    """Times work that a device does while the host goes on.

    A measurement is the difference between several launches with one wait and the fastest launch with one wait, divided
    by the launches more: what the host takes before the device begins and after it has ended, up to a millisecond with
    large programs, is in both. While one runs the host launches the next, so what launching takes is hidden as it is in
    a serving loop. Their number adapts to the work.

    Args:
      launch: starts the work once and returns what `wait` takes; later work starts when earlier work is over.
      wait: returns when it is over.
      seconds: to measure for, after a warm-up of a fifth of that; at least `fewest` and at most `most` measurements.
      most_launches: before a wait, at least 2: until then all their results may take memory.
    """
    wait(launch())  # compiles, and loads what is loaded late

    def elapsed(launches: int) -> float:
        start = perf_counter()
        for _ in range(launches):
            result = launch()
        wait(result)
        return perf_counter() - start

    best = elapsed(1)
    end = perf_counter() + seconds / 5
    while perf_counter() < end:
        best = min(best, elapsed(1))
    launches = max(2, min(most_launches, round(_SAMPLE_SECONDS / best)))
    count = max(fewest, min(most, round(seconds / (best * (launches + 1)))))
    single, several = zip(*((elapsed(1), elapsed(launches)) for _ in range(count)), strict=True)
    return Timing.of((each - min(best, *single)) / (launches - 1) for each in several)


def interleave(actions: Sequence[Callable[[], Any]], repeats: int, *, warmup: int = 1) -> list[list[Any]]:
    """Results of each action, called in turn (a, b, c, a, b, c, ...), so that a busy moment of the machine hits all.

    Every second round runs in reverse, so that no action always follows the same one.

    Returns:
      For each action, the results of its `repeats` calls; the `warmup` rounds before them do not count.
    """
    results: list[list[Any]] = [[] for _ in actions]
    order = list(range(len(actions)))
    for round_ in range(-warmup, repeats):
        for index in order if round_ % 2 == 0 else reversed(order):
            result = actions[index]()
            if round_ >= 0:
                results[index].append(result)
    return results
