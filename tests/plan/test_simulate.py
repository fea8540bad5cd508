"""The simulator: hand-worked times, leaps that change nothing, and the engine's own steps."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qtool.errors import FormatError, UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine import engine as engine_module
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import load_model
from qtool.runtime.plan import fleet
from qtool.runtime.plan.answer import answer_load
from qtool.runtime.plan.costs import MeasuredCosts, RooflineCosts, StepCosts, StepShape
from qtool.runtime.plan.fleet import Targets, required_replicas, simulate
from qtool.runtime.plan.measure import Measurement
from qtool.runtime.plan.simulate import Arrival, Engine, Limits, Workload

COSTS = MeasuredCosts(((1, 0.010), (16, 0.016), (256, 0.256)), 0.001, 1e-6, 1e-7)
LIMITS = Limits(200, 16, 8, 128, 0.1)


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert COSTS.seconds(StepShape(1, 0)) == pytest.approx(0.010)
    assert COSTS.seconds(StepShape(6, 0)) == pytest.approx(0.012)
    assert COSTS.seconds(StepShape(376, 0)) == pytest.approx(0.376)
    assert COSTS.seconds(StepShape(16, 2, 1000, 500)) == pytest.approx(0.016 + 0.002 + 0.00105)


def test_a_roofline_by_hand() -> None:
    costs = RooflineCosts(
        dense_bytes=1e9,
        expert_bytes=1e9,
        experts=(4, 2),
        row_operations=1e9,
        head_operations=1e9,
        kv_bytes_per_token=1e3,
        attention_operations=10.0,
        bytes_per_second=1e12,
        operations_per_second=1e13,
        attention_operations_per_second=1e13,
        step_seconds=0.0,
    )
    # One row: half of the experts are read, and reading is what it waits for.
    assert costs.seconds(StepShape(1, 1, 1000)) == pytest.approx(1.5e-3 + 1e-6)
    # Many rows: all experts, and arithmetic is what it waits for.
    expected = 1e-4 * (100 + 1) + 5000 * 10 / 1e13
    assert costs.seconds(StepShape(100, 1, 0, 5000)) == pytest.approx(expected, rel=1e-6)


def test_one_request_by_hand() -> None:
    engine = Engine(MeasuredCosts(((1, 1.0),), 0.0, 0.0, 0.0), LIMITS)
    life = engine.add(Arrival(0, 5.0, 300, 4))
    engine.advance(math.inf)
    # 300 tokens in chunks of 128: three steps of a second; three more tokens after the first.
    assert (life.first_token, life.end) == (8.0, 11.0)
    assert (life.ttft, life.tpot) == (3.0, 1.0)


def random_arrivals(draw: random.Random) -> Iterator[Arrival]:
    now = 0.0
    for number in range(30):
        now += draw.choice((0.0, 0.01, 0.3, 2.0))
        yield Arrival(number, now, draw.randint(1, 400), draw.randint(1, 60))


@pytest.mark.parametrize("seed", range(12))
def test_leaps_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    arrivals = list(random_arrivals(draw))
    limits = replace(
        LIMITS, num_blocks=draw.choice((32, 60, 200)), max_num_seqs=draw.choice((2, 8))
    )

    def lives() -> list[float]:
        engine = Engine(COSTS, limits)
        found = []
        for arrival in arrivals:
            engine.advance(arrival.time)
            found.append(engine.add(arrival))
        engine.advance(math.inf)
        assert engine.num_outstanding == 0
        return [time for life in found for time in (life.first_token, life.end)]

    leaping = lives()
    monkeypatch.setattr(Engine, "_leap", lambda self, until: False)
    stepping = lives()
    # The pace remembers a little less of many equal steps than of all.
    assert leaping == pytest.approx(stepping, rel=0.02)


class Recorded:
    """Costs that keep what they are asked."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs, self.shapes = costs, list[StepShape]()

    def seconds(self, step: StepShape) -> float:
        self.shapes.append(step)
        return self.costs.seconds(step)


def test_steps_are_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine on the bundled model computes as many rows, step by step."""
    draw = random.Random(3)
    arrivals = [Arrival(n, 0.0, draw.randint(1, 90), draw.randint(2, 12)) for n in range(20)]
    config = EngineConfig(
        "builtin:books-7m",
        max_num_seqs=6,
        max_num_batched_tokens=64,
        target_itl_ms=0,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=32 * 4096 * 40,
    )
    engine = engine_module.Engine(load_model(config.model, dtype="float32"), config)
    rows: list[int] = []
    run = engine._runner.run

    def counted(batch: object) -> object:
        rows.append(len(batch.token_ids))  # type: ignore[attr-defined]
        return run(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._runner, "run", counted)
    for arrival in arrivals:
        prompt = tuple(draw.randrange(4, 4000) for _ in range(arrival.input_len))
        sampling = SamplingParams(temperature=0, max_tokens=arrival.output_len, ignore_eos=True)
        engine.add(GenerationRequest(str(arrival.number), prompt, sampling))
    while engine.has_work:
        engine.step()

    info = engine.info
    costs = Recorded(COSTS)
    limits = Limits(
        info.num_kv_blocks, info.block_size, info.max_num_seqs, info.max_num_batched_tokens, None
    )
    simulated = Engine(costs, limits)
    monkeypatch.setattr(Engine, "_leap", lambda self, until: False)
    for arrival in arrivals:
        simulated.add(arrival)
    simulated.advance(math.inf)
    assert [shape.num_rows for shape in costs.shapes] == rows


def test_a_shared_prefix_is_computed_once() -> None:
    workload = Workload(1.0, 100, (120, 120), (8, 8))
    apart = simulate(workload, COSTS, LIMITS)
    shared = simulate(replace(workload, shared_prefix_len=96), COSTS, LIMITS)
    assert shared.ttft.p50 < 0.5 * apart.ttft.p50


def test_a_fleet_in_cells_is_one_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(2.0 * 48, 48 * 40, (100, 200), (10, 30))
    cells = simulate(workload, COSTS, LIMITS, num_replicas=48)
    monkeypatch.setattr(fleet, "CELL", 48)
    whole = simulate(workload, COSTS, LIMITS, num_replicas=48)
    assert cells.num_requests == whole.num_requests
    assert cells.ttft.p95 == pytest.approx(whole.ttft.p95, rel=0.1)
    assert cells.tpot.p95 == pytest.approx(whole.tpot.p95, rel=0.05)
    assert cells.requests_per_second == pytest.approx(96, rel=0.15)


def test_the_router_levels_the_load() -> None:
    workload = Workload(20.0, 800, (100, 100), (1, 60))
    limits = replace(LIMITS, max_num_seqs=2)
    together = simulate(workload, COSTS, limits, num_replicas=8)
    # As many engines, each with a stream of its own.
    apart = simulate(replace(workload, rate=2.5, num_requests=400), COSTS, limits)
    assert together.ttft.mean < apart.ttft.mean


def test_replicas_follow_the_rate() -> None:
    workload = Workload(15.0, 0, (100, 100), (20, 20))
    targets = Targets(0.5, 0.05)
    few = required_replicas(workload, COSTS, LIMITS, targets)
    many = required_replicas(replace(workload, rate=60.0), COSTS, LIMITS, targets)
    assert targets.met_by(few)
    assert targets.met_by(many)
    assert few.num_replicas >= 2
    assert 2.5 * few.num_replicas <= many.num_replicas <= 4.2 * few.num_replicas
    # And one fewer would not do.
    fewer = fleet._steady(
        workload, COSTS, LIMITS, few.num_replicas - 1, workload.rate, lambda count: None
    )
    assert not targets.met_by(fewer)


def test_targets_that_no_fleet_meets_are_refused() -> None:
    workload = Workload(1.0, 0, (100, 100), (20, 20))
    with pytest.raises(UsageError, match="a request that is alone waits") as caught:
        required_replicas(workload, COSTS, LIMITS, Targets(0.5, 0.001))
    assert "more replicas do not help" in (caught.value.hint or "")


def test_a_request_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit into a KV cache of 3200"):
        answer_load(COSTS, LIMITS, Workload(1.0, 30, (3190, 3190), (20, 20)), Targets(), 1, print)


def test_measurements_are_kept(tmp_path: Path) -> None:
    found = Measurement("books-7m", COSTS, LIMITS, {"machine": "here"})
    path = tmp_path / "costs.json"
    found.save(path)
    assert Measurement.load(path) == found
    path.write_text('{"qtool_costs": 1, "costs": {"rows": [[2, 0.1]]}}')
    with pytest.raises(FormatError, match="missing or no number"):
        Measurement.load(path)
