"""Many equal engines behind a router, and how many of them a load needs.

The router sends each request on as it arrives, to the one of two engines drawn at random that has
fewer requests (Ray Serve's rule; Mitzenmacher, "The power of two choices in randomized load
balancing", 2001).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qtool.errors import UsageError
from qtool.runtime.bench.timing import Spread, spread
from qtool.runtime.plan.costs import StepCosts
from qtool.runtime.plan.simulate import Engine, Life, Limits, Workload

# Requests that are simulated with one engine, and the most engines behind one router.
REQUESTS_ALONE = 600
CELL = 32
# The first half is not counted: queues have to settle. So an engine of a fleet gets several times
# what it has at once.
NOT_COUNTED = 0.5
SETTLING = 3.0
MIN_REQUESTS, MAX_REQUESTS = 32, 96
# How near the rate is found that meets the targets, and how many replicas more are tried at a time.
NEARNESS = 0.02


@dataclass(frozen=True, slots=True)
class Targets:
    """What 95 of 100 requests are to see, in seconds; inf: no matter."""

    ttft: float = math.inf
    tpot: float = math.inf

    @classmethod
    def in_milliseconds(cls, ttft: float | None, tpot: float | None) -> Targets:
        """None: no matter."""
        return cls(*(math.inf if value is None else value / 1e3 for value in (ttft, tpot)))

    def met_by(self, found: Simulated) -> bool:
        return found.ttft.p95 <= self.ttft and found.tpot.p95 <= self.tpot


@dataclass(frozen=True, slots=True)
class Simulated:
    """A workload's outcome; times in seconds.

    requests_per_second  that were answered, once the queues had settled
    mean_sequences       that a replica has at once, waiting ones among them (Little's law)
    """

    num_replicas: int
    num_requests: int
    requests_per_second: float
    tokens_per_second: float
    ttft: Spread
    tpot: Spread
    e2e: Spread
    mean_sequences: float


def simulate(
    workload: Workload,
    costs: StepCosts,
    limits: Limits,
    *,
    num_replicas: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Simulated:
    """A workload through a fleet, to the last token."""
    lives: list[Life] = []
    for cell, size in _cells(workload, num_replicas):
        engines = [Engine(costs, limits, workload.shared_prefix_len) for _ in range(size)]
        lives += drive(cell, engines)
        advance(size)
    return _summary(workload, num_replicas, lives)


def drive(workload: Workload, engines: Sequence[Engine]) -> list[Life]:
    """A workload through engines behind one router, to the last token; in order of arrival."""
    draw = random.Random(workload.seed)
    lives = []
    for arrival in workload.arrivals():
        chosen = draw.sample(engines, min(2, len(engines)))
        for engine in chosen:
            engine.advance(arrival.time)
        lives.append(min(chosen, key=lambda engine: engine.num_outstanding).add(arrival))
    for engine in engines:
        engine.advance(math.inf)
    return lives


def _cells(workload: Workload, num_replicas: int) -> Iterator[tuple[Workload, int]]:
    """A large fleet as several of at most CELL, each with its share of the load.

    Requests that are sent to one of several routers at random arrive there as they would from a
    source of their own (a Poisson process, thinned, is one), and two choices among 32 level as two
    among a thousand do. One after another they stay in the processor's caches.
    """
    num_cells = -(-num_replicas // CELL)
    left_replicas, left_requests = num_replicas, workload.num_requests
    for number in range(num_cells, 0, -1):
        size = -(-left_replicas // number)
        share = size / left_replicas
        requests = round(left_requests * share)
        rate = workload.rate * size / num_replicas
        yield (
            replace(workload, rate=rate, num_requests=requests, seed=workload.seed + number - 1),
            size,
        )
        left_replicas, left_requests = left_replicas - size, left_requests - requests


def _summary(workload: Workload, num_replicas: int, lives: Sequence[Life]) -> Simulated:
    burst = workload.rate == math.inf
    last = max(life.arrival.time for life in lives)
    # All at once is one burst: there is nothing to settle.
    begin = 0.0 if burst else last * NOT_COUNTED
    end = max(life.end for life in lives) if burst else last
    seconds = max(end - begin, 1e-9)
    counted = [life for life in lives if life.arrival.time >= begin]
    ended = [life for life in lives if begin <= life.end <= end]
    ttft = spread([life.ttft for life in counted])
    tpot = spread([life.tpot for life in counted if life.tpot is not None] or [0.0])
    e2e = spread([life.end - life.arrival.time for life in counted])
    assert ttft is not None
    assert tpot is not None
    assert e2e is not None
    return Simulated(
        num_replicas=num_replicas,
        num_requests=len(lives),
        requests_per_second=len(ended) / seconds,
        tokens_per_second=sum(life.arrival.output_len for life in ended) / seconds,
        ttft=ttft,
        tpot=tpot,
        e2e=e2e,
        mean_sequences=len(counted) / seconds * e2e.mean / num_replicas,
    )


def required_replicas(
    workload: Workload,
    costs: StepCosts,
    limits: Limits,
    targets: Targets,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Simulated:
    """The smallest fleet that answers the workload's rate within the targets, as simulated; raises
    UsageError where no number of replicas does.
    """
    _check_alone(workload, costs, limits, targets)
    one = replace(workload, num_requests=REQUESTS_ALONE)
    capacity = simulate(replace(one, rate=math.inf), costs, limits).requests_per_second
    each = _search(one, costs, limits, targets, 1, (0.0, capacity), advance)
    count = math.ceil(workload.rate / each)
    if count > 1:
        # A router that levels the load lets each take more than it could alone.
        sample, bounds = min(count, CELL), (0.9 * each, min(1.4 * each, capacity))
        each = _search(workload, costs, limits, targets, sample, bounds, advance)
        count = math.ceil(workload.rate / each)
    while True:
        found = _steady(workload, costs, limits, count, workload.rate, advance)
        if targets.met_by(found):
            return found
        count += math.ceil(NEARNESS * count)


def _check_alone(workload: Workload, costs: StepCosts, limits: Limits, targets: Targets) -> None:
    alone = simulate(replace(workload, rate=1e-6, num_requests=20), costs, limits)
    if not targets.met_by(alone):
        raise UsageError(
            f"a request that is alone waits {1e3 * alone.ttft.p95:.0f} ms for its first token and "
            f"{1e3 * alone.tpot.p95:.1f} ms for each other; the targets are "
            f"{1e3 * targets.ttft:g} and {1e3 * targets.tpot:g} ms",
            "more replicas do not help: choose a faster GPU, several for a replica "
            "(--tensor-parallel-size), fewer bits, or longer targets",
        )


def _search(
    workload: Workload,
    costs: StepCosts,
    limits: Limits,
    targets: Targets,
    num_replicas: int,
    bounds: tuple[float, float],
    advance: Callable[[int], None],
) -> float:
    """Requests a second for each of a number of engines that meet the targets, within bounds of
    which the lower one is taken to meet them if it is above 0.
    """
    low, high = bounds
    while high - low > NEARNESS * high:
        middle = (low + high) / 2
        rate = middle * num_replicas
        if targets.met_by(_steady(workload, costs, limits, num_replicas, rate, advance)):
            low = middle
        else:
            high = middle
        if high < NEARNESS * bounds[1]:
            raise UsageError(
                f"even at {high:.3g} requests a second to a replica the targets of "
                f"{1e3 * targets.ttft:g} ms to the first token and {1e3 * targets.tpot:g} ms to "
                "each other are missed by more than 5 of 100",
                "choose longer targets, or shorter prompts (a prompt that arrives delays others)",
            )
    return low


def _steady(
    workload: Workload,
    costs: StepCosts,
    limits: Limits,
    num_replicas: int,
    rate: float,
    advance: Callable[[int], None],
) -> Simulated:
    """A fleet at a rate, for as many requests as it takes to settle."""
    if num_replicas == 1:
        total = REQUESTS_ALONE
    else:
        few = replace(workload, rate=rate / num_replicas, num_requests=MAX_REQUESTS)
        at_once = rate / num_replicas * simulate(few, costs, limits).e2e.mean
        each = min(max(int(SETTLING * at_once), MIN_REQUESTS), MAX_REQUESTS)
        total = max(REQUESTS_ALONE, num_replicas * each)
    return simulate(
        replace(workload, rate=rate, num_requests=total),
        costs,
        limits,
        num_replicas=num_replicas,
        advance=advance,
    )
