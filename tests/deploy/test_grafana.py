"""The dashboard and the alerts ask for what /metrics of a real engine says, in valid PromQL."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import promql_parser
import pytest

from qtool.runtime.config import EngineConfig
from qtool.runtime.deploy.grafana import GRID_COLUMNS, dashboard
from qtool.runtime.deploy.prometheus import ALERTS
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.server.metrics import Metrics

WINDOW = "$__rate_interval"


@pytest.fixture(scope="module")
def served_names() -> set[str]:
    """Every name that a sample of /metrics may have."""

    async def exposition() -> str:
        engine = AsyncEngine(EngineConfig("builtin:books-7m", kv_cache_memory_bytes=10_000_000))
        await engine.start()
        try:
            return Metrics(engine.info, "m", engine.stats).expose("").body.decode()
        finally:
            await engine.stop()

    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", asyncio.run(exposition()), re.M):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {f"{name}{end}" for end in ends}
    return names


def panels() -> list[dict[str, Any]]:
    found = json.loads(dashboard("t"))["panels"]
    assert isinstance(found, list)
    return found


def expressions() -> list[str]:
    queries = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    return [*queries, *(expression for _, expression, _, _ in ALERTS)]


def test_every_query_is_promql_over_names_that_are_served(served_names: set[str]) -> None:
    assert len(expressions()) > 20
    for expression in expressions():
        promql_parser.parse(expression.replace(WINDOW, "5m"))
        asked = set(re.findall(r"\b(?:vllm:|http_)\w+", expression))
        assert asked <= served_names, asked - served_names
        assert asked or "up{" in expression


def test_panels_have_places_and_numbers_of_their_own() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= GRID_COLUMNS
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
