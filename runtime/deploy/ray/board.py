"""What all engines of a deployment have counted, as one engine's statistics.

A handle to a Ray deployment cannot ask one replica, so that each engine says by itself, once a
second, what it has counted. Counters of an engine that is gone stay in the sum: a counter that goes
down would look like a restart to Prometheus, and hide or invent traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

from qtool.runtime.engine.client import EngineStats

REPORT_SECONDS = 1.0
# An engine that has said nothing for so long is gone, or cannot be relied on.
SILENT_SECONDS = 15.0

# Of one instant, not counted since the start.
ADDED_GAUGES = ("num_requests_running", "num_requests_waiting")
MEAN_GAUGES = ("kv_cache_usage",)
NAMES = ("running_lora_adapters", "waiting_lora_adapters")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """num_engines: those that are heard of; stats: counters of all that ever were."""

    num_engines: int = 0
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass(slots=True)
class Board:
    """The latest that each engine said. clock: seconds, which never go back."""

    clock: Callable[[], float]
    _latest: dict[str, tuple[float, EngineStats]] = field(default_factory=dict)

    def report(self, engine: str, stats: EngineStats) -> None:
        self._latest[engine] = (self.clock(), stats)

    def snapshot(self) -> Snapshot:
        oldest = self.clock() - SILENT_SECONDS
        living = [stats for when, stats in self._latest.values() if when >= oldest]
        return Snapshot(len(living), added_up((s for _, s in self._latest.values()), living))


def added_up(ever: Iterable[EngineStats], living: list[EngineStats]) -> EngineStats:
    """Counters of `ever`, gauges of `living`."""
    everyone = list(ever)
    values: dict[str, Any] = {}
    for entry in fields(EngineStats):
        name = entry.name
        if name in MEAN_GAUGES:
            values[name] = sum(getattr(s, name) for s in living) / max(len(living), 1)
            continue
        if name in NAMES:
            values[name] = tuple(dict.fromkeys(each for s in living for each in getattr(s, name)))
            continue
        found = [getattr(s, name) for s in (living if name in ADDED_GAUGES else everyone)]
        values[name] = _by_position(found) if isinstance(entry.default, tuple) else sum(found)
    return EngineStats(**values)


def _by_position(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip_longest(*rows, fillvalue=0))
