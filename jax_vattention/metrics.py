"""Prometheus metrics of cache managers, for a scraper. Needs the extra `metrics`.

```python
import prometheus_client
from jax_vattention.metrics import KVCacheCollector

prometheus_client.REGISTRY.register(KVCacheCollector({"llama": manager}))
prometheus_client.start_http_server(9000)
```

All names begin with `jax_vattention_kv_`, and every series has the label `cache`, the manager's name. Gauges:

| name | unit | labels | meaning |
| --- | --- | --- | --- |
| `pool_bytes` | bytes | `state`: free, mapped, retained, retired | the pool; they add up to all of it |
| `spare_bytes` | bytes | | of `retained`, what live slots have beyond what they were granted |
| `needed_bytes` | bytes | | of `mapped`, what live tokens fill |
| `mapped_peak_bytes` | bytes | | the most that ever was `mapped` at once |
| `device_bytes` | bytes | | pages that exist, in use or idle: what the pool takes of the device |
| `virtual_bytes` | bytes | | address space of all views |
| `waste_ratio` | ratio | | `mapped` without `needed`, as a share of `needed` |
| `fragmentation_ratio` | ratio | | share of `free` that cannot be given as largest pages at once |
| `slots` | slots | `state`: idle, live, retired, parked | they add up to `num_slots` |
| `tokens` | tokens | | that the last `step` of each live slot asked for |
| `pages` | pages | `page_bytes`; `state`: in_use, idle | that exist, each counted once in its own size |

Counters:

| name | unit | labels | meaning |
| --- | --- | --- | --- |
| `mapped_bytes_total` | bytes | `cause`: needed, ahead, eager | mapped because a step needed it, or before one did |
| `unmapped_bytes_total` | bytes | | unmapped |
| `zeroed_bytes_total` | bytes | | of parked slots, zeroed for the next request |
| `reclaims_total` | times | | spare or parked pages were taken away |
| `adoptions_total` | requests | | that took over a parked slot |
| `waits_total` | times | | a call waited for the mapper |
| `wait_seconds_total` | seconds | | how long, together |
| `mapper_seconds_total` | seconds | | how long the mapper has been at work |
| `background_failures_total` | times | | background work failed and was undone |
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping

from jax_vattention.errors import ClosedError
from jax_vattention.manager import KVCacheManager
from jax_vattention.stats import CacheStats

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "prometheus_client":
        raise
    raise ImportError(
        "metrics need the package 'prometheus-client', which is not installed: pip install 'jax_vattention[metrics]'",
        name=error.name,
    ) from error

_PREFIX = "jax_vattention_kv_"
_Family = GaugeMetricFamily | CounterMetricFamily
_Samples = dict[tuple[str, ...], float]


@dataclasses.dataclass(frozen=True)
class _Metric:
    """One metric: what `read` returns has the values of `labels` for keys, or `()` where there are none."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    text: str
    read: Callable[[CacheStats], _Samples]
    labels: tuple[str, ...] = ()

    def family(self) -> _Family:
        return self.kind(_PREFIX + self.name, self.text, labels=("cache", *self.labels))


def _gauge(name: str, text: str, read: Callable[[CacheStats], float]) -> _Metric:
    return _Metric(GaugeMetricFamily, name, text, lambda stats: {(): read(stats)})


def _counter(name: str, text: str, read: Callable[[CacheStats], float]) -> _Metric:
    return _Metric(CounterMetricFamily, name, text, lambda stats: {(): read(stats)})


def _pool_bytes(stats: CacheStats) -> _Samples:
    return {(state,): count for state, count in stats.bytes_by_state.items()}


def _slots(stats: CacheStats) -> _Samples:
    return {
        ("idle",): stats.slots_total - stats.slots_live - stats.slots_retired - stats.slots_parked,
        ("live",): stats.slots_live,
        ("retired",): stats.slots_retired,
        ("parked",): stats.slots_parked,
    }


def _pages(stats: CacheStats) -> _Samples:
    found: _Samples = {}
    for size, (created, idle) in stats.pages_by_size.items():
        found[str(size), "in_use"] = created - idle
        found[str(size), "idle"] = idle
    return found


def _mapped_bytes(stats: CacheStats) -> _Samples:
    pages = {"needed": stats.maps_needed, "ahead": stats.maps_ahead, "eager": stats.maps_eager}
    return {(cause,): count * stats.page_bytes for cause, count in pages.items()}


_METRICS = (
    _Metric(GaugeMetricFamily, "pool_bytes", "Physical memory of the pool by state.", _pool_bytes, ("state",)),
    _gauge(
        "spare_bytes",
        "Of the retained bytes, what live slots have beyond what they were granted.",
        lambda stats: stats.pages_retained_live * stats.page_bytes,
    ),
    _gauge("needed_bytes", "Of the mapped bytes, what live tokens fill.", lambda stats: stats.needed_bytes),
    _gauge("mapped_peak_bytes", "Most bytes ever mapped at once.", lambda stats: stats.mapped_bytes_peak),
    _gauge(
        "device_bytes",
        "Pages that exist, in use or idle: what the pool takes of the device.",
        lambda stats: stats.pages_created * stats.page_bytes,
    ),
    _gauge("virtual_bytes", "Address space of all views.", lambda stats: stats.virtual_bytes),
    _gauge("waste_ratio", "Mapped bytes that live tokens do not fill, by those they fill.", lambda stats: stats.waste),
    _gauge(
        "fragmentation_ratio",
        "Share of the free bytes that cannot be given as pages of the largest size at once.",
        lambda stats: stats.fragmentation,
    ),
    _Metric(GaugeMetricFamily, "slots", "Slots by state.", _slots, ("state",)),
    _gauge("tokens", "Tokens that the last step of each live slot asked for.", lambda stats: stats.tokens_live),
    _Metric(GaugeMetricFamily, "pages", "Pages that exist, in their own size.", _pages, ("page_bytes", "state")),
    _Metric(CounterMetricFamily, "mapped_bytes_total", "Memory mapped, by cause.", _mapped_bytes, ("cause",)),
    _counter("unmapped_bytes_total", "Memory unmapped.", lambda stats: stats.unmaps * stats.page_bytes),
    _counter(
        "zeroed_bytes_total",
        "Memory of parked slots zeroed for the next request.",
        lambda stats: stats.zeroed_pages * stats.page_bytes,
    ),
    _counter("reclaims_total", "Times that spare or parked pages were taken away.", lambda stats: stats.reclaims),
    _counter("adoptions_total", "Requests that took over a parked slot.", lambda stats: stats.adoptions),
    _counter("waits_total", "Times that a call waited for the mapper.", lambda stats: stats.waits),
    _counter("wait_seconds_total", "Time that calls waited for the mapper.", lambda stats: stats.wait_seconds),
    _counter("mapper_seconds_total", "Time the mapper has been at work.", lambda stats: stats.mapper_seconds),
    _counter(
        "background_failures_total",
        "Times that background work failed and was undone.",
        lambda stats: stats.background_failures,
    ),
)


class KVCacheCollector(Collector):
    """Reads the stats of one or several managers, once each a scrape.

    `registry.register(collector)` starts it and `registry.unregister(collector)` ends it. A registry takes one: give it
    all managers, or `add` them later. It holds them weakly and keeps no memory alive; a manager that is closed or gone
    has no series.

    A scrape takes the manager's lock: while a `step` waits for the mapper, so does the scrape.

    Args:
      managers: by name, which becomes the label `cache`.
    """

    def __init__(self, managers: Mapping[str, KVCacheManager] | None = None):
        self._managers: dict[str, weakref.ref[KVCacheManager]] = {}
        for name, manager in (managers or {}).items():
            self.add(name, manager)

    def add(self, name: str, manager: KVCacheManager) -> None:
        """Takes a manager in, in the place of one that had this name."""
        self._managers[name] = weakref.ref(manager)

    def describe(self) -> Iterator[_Family]:
        """All metrics without values: registering reads nothing."""
        return (metric.family() for metric in _METRICS)

    def collect(self) -> Iterator[_Family]:
        """All metrics that have a value."""
        found = self._stats()
        for metric in _METRICS if found else ():
            family = metric.family()
            for name, stats in found.items():
                for labels, value in metric.read(stats).items():
                    family.add_metric((name, *labels), value)
            yield family

    def _stats(self) -> dict[str, CacheStats]:
        found = {}
        for name, reference in self._managers.copy().items():
            manager = reference()
            if manager is None:
                continue
            with contextlib.suppress(ClosedError):
                found[name] = manager.stats()
        return found
