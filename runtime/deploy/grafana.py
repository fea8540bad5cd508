"""A Grafana dashboard over vLLM's metric names, made from the table `ROWS`.

The names are those that `/metrics` of `qtool serve` and of vLLM itself serve, so one dashboard fits
both, and a deployment that moves from one to the other keeps its history.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

GRID_COLUMNS = 24
PANEL_HEIGHT = 8
SELECTOR = '{model_name=~"$model_name"}'
QUANTILES = (0.5, 0.95, 0.99)


class Query(NamedTuple):
    expression: str
    legend: str


class Panel(NamedTuple):
    """unit: Grafana's name of it: s, percentunit, reqps, short, ..."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str = ""


def quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({q}, sum by (le) "
            f"(rate({histogram}_bucket{SELECTOR}[$__rate_interval])))",
            f"p{q * 100:g}",
        )
        for q in QUANTILES
    )


def total(metric: str, legend: str) -> Query:
    return Query(f"sum({metric}{SELECTOR})", legend)


def rate(counter: str, legend: str, by: str = "") -> Query:
    grouped = f" by ({by})" if by else ""
    return Query(f"sum{grouped} (rate({counter}{SELECTOR}[$__rate_interval]))", legend)


def ratio(part: str, whole: str, legend: str) -> Query:
    window = f"{SELECTOR}[$__rate_interval]"
    return Query(f"sum(rate({part}{window})) / sum(rate({whole}{window}))", legend)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "What users see",
        (
            Panel("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
            Panel("Time between tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
            Panel("Whole answers", "s", quantiles("vllm:e2e_request_latency_seconds")),
            Panel(
                "Answers by how they ended",
                "reqps",
                (rate("vllm:request_success_total", "{{finished_reason}}", "finished_reason"),),
            ),
            Panel(
                "Refused requests",
                "reqps",
                (rate("vllm:admission_rejections_total", "{{reason}}", "reason"),),
            ),
            Panel(
                "HTTP by status",
                "reqps",
                (
                    Query(
                        "sum by (status) (rate(http_requests_total[$__rate_interval]))",
                        "{{status}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Load",
        (
            Panel(
                "Sequences",
                "short",
                (
                    total("vllm:num_requests_running", "running"),
                    total("vllm:num_requests_waiting", "waiting"),
                ),
                "Waiting ones that do not go down ask for another replica.",
            ),
            Panel("Time in the queue", "s", quantiles("vllm:request_queue_time_seconds")),
            Panel(
                "Tokens a second",
                "short",
                (
                    rate("vllm:prompt_tokens_total", "prompts"),
                    rate("vllm:generation_tokens_total", "answers"),
                ),
            ),
            Panel("Computing prompts", "s", quantiles("vllm:request_prefill_time_seconds")),
            Panel("Prompt lengths", "short", quantiles("vllm:request_prompt_tokens")),
            Panel("Answer lengths", "short", quantiles("vllm:request_generation_tokens")),
        ),
    ),
    (
        "KV cache",
        (
            Panel(
                "KV cache in use",
                "percentunit",
                (Query(f"max by (instance) (vllm:kv_cache_usage_perc{SELECTOR})", "{{instance}}"),),
            ),
            Panel(
                "Prompt tokens found in the cache",
                "percentunit",
                (
                    ratio(
                        "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "found"
                    ),
                ),
            ),
            Panel(
                "Preemptions",
                "short",
                (rate("vllm:num_preemptions_total", "a second"),),
                "Sequences that gave up their blocks: the cache is too small for the load.",
            ),
            Panel(
                "Guessed tokens that were right",
                "percentunit",
                (
                    ratio(
                        "vllm:spec_decode_num_accepted_tokens_total",
                        "vllm:spec_decode_num_draft_tokens_total",
                        "accepted",
                    ),
                ),
                "Speculative decoding; empty without it.",
            ),
        ),
    ),
)


def dashboard(title: str = "qtool") -> str:
    """The dashboard as JSON, for Grafana's import page or its provisioning folder."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, entries in ROWS:
        grid = {"h": 1, "w": GRID_COLUMNS, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row, "gridPos": grid, "panels": []}
        )
        top += 1
        width = GRID_COLUMNS // 3
        for index, entry in enumerate(entries):
            line, column = divmod(index, 3)
            at = {"h": PANEL_HEIGHT, "w": width, "x": column * width, "y": top + line * 8}
            panels.append(_panel(len(panels) + 1, entry, at))
        top += PANEL_HEIGHT * -(-len(entries) // 3)
    return json.dumps(_document(title, panels), indent=2) + "\n"


def _panel(number: int, panel: Panel, grid: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": grid,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expression, "legendFormat": query.legend}
            for i, query in enumerate(panel.queries)
        ],
    }


def _document(title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "uid": "qtool-serving",
        "title": title,
        "tags": ["qtool", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model_name",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": "label_values(vllm:num_requests_running, model_name)",
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                },
            ]
        },
        "panels": panels,
    }
