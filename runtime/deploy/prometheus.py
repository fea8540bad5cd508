"""What Prometheus needs to know of a deployment: where to scrape, and when to call somebody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

SCRAPE_SECONDS = 15

ALERTS: tuple[tuple[str, str, str, str], ...] = (
    ("QtoolDown", 'up{job="qtool"} == 0', "1m", "{{ $labels.instance }} does not answer /metrics"),
    (
        "QtoolQueueGrows",
        "sum by (model_name) (vllm:num_requests_waiting)"
        " > sum by (model_name) (vllm:num_requests_running)",
        "5m",
        "More requests wait for {{ $labels.model_name }} than run: add a replica",
    ),
    (
        "QtoolRefuses",
        "sum by (model_name) (rate(vllm:admission_rejections_total[5m])) > 0",
        "5m",
        "Requests for {{ $labels.model_name }} are refused because too many wait",
    ),
)
"""(name, expression, for how long, what it means)"""


def to_yaml(document: Any) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=100, allow_unicode=True)


def scrape_config(service_discovery: Mapping[str, Any]) -> str:
    """prometheus.yml for one deployment; service_discovery says how its replicas are found."""
    return to_yaml(
        {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS}s"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {"job_name": "qtool", "metrics_path": "/metrics", **service_discovery}
            ],
        }
    )


def static_targets(addresses: Sequence[str]) -> Mapping[str, Any]:
    return {"static_configs": [{"targets": list(addresses)}]}


def alert_rules() -> dict[str, Any]:
    rules = [
        {
            "alert": name,
            "expr": expression,
            "for": duration,
            "labels": {"severity": "warning"},
            "annotations": {"summary": summary},
        }
        for name, expression, duration, summary in ALERTS
    ]
    return {"groups": [{"name": "qtool", "rules": rules}]}
