"""`--to compose`: the server, Prometheus and Grafana with the dashboard, on one machine.

The format: github.com/compose-spec/compose-spec, checked against its JSON schema in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import UsageError
from qtool.runtime.deploy.containers import (
    CACHE,
    PORT,
    PROBE,
    SOURCE_REPOSITORY,
    environment,
    image_name,
    inside,
)
from qtool.runtime.deploy.deployment import Deployment
from qtool.runtime.deploy.files import SECRET, File
from qtool.runtime.deploy.grafana import dashboard
from qtool.runtime.deploy.prometheus import alert_rules, scrape_config, static_targets, to_yaml

PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:12.1.0"
# A download of tens of gigabytes is part of the first start.
START_PERIOD = "30m"


def compose_files(deployment: Deployment, image: str | None) -> dict[str, File]:
    """image: one that is there already; None: build it from the project's repository."""
    if deployment.scale.replicas > 1 or deployment.scale.most is not None:
        raise UsageError(
            f"--to compose runs one replica on one machine, not {deployment.scale.replicas}"
            + ("" if deployment.scale.most is None else f" to {deployment.scale.most}"),
            "for several use --to ray or --to k8s",
        )
    keys = deployment.asked.server.api_keys
    if len(keys) > 1:
        raise UsageError(
            f"{len(keys)} API keys: a container takes one, from its environment",
            "pass one --api-key, or use --to k8s, where they are a file",
        )
    document = {
        "name": deployment.name,
        "services": {
            "qtool": _server(deployment, image),
            "prometheus": {
                "image": PROMETHEUS_IMAGE,
                "restart": "unless-stopped",
                "volumes": [
                    "./prometheus.yml:/etc/prometheus/prometheus.yml:ro",
                    "./alerts.yml:/etc/prometheus/alerts.yml:ro",
                    "prometheus:/prometheus",
                ],
                "ports": ["127.0.0.1:9090:9090"],
            },
            "grafana": {
                "image": GRAFANA_IMAGE,
                "restart": "unless-stopped",
                "environment": {
                    "GF_AUTH_ANONYMOUS_ENABLED": "true",
                    "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                    "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/dashboards/qtool.json",
                },
                "volumes": [
                    "./grafana:/etc/grafana/provisioning:ro",
                    "./dashboards:/dashboards:ro",
                    "grafana:/var/lib/grafana",
                ],
                "ports": ["127.0.0.1:3000:3000"],
                "depends_on": ["prometheus"],
            },
        },
        "volumes": {"cache": {}, "prometheus": {}, "grafana": {}},
    }
    variables = "" if not keys else f"QTOOL_API_KEY={_quoted(keys[0])}\n"
    return {
        "compose.yaml": File(to_yaml(document)),
        "qtool.env": File(f"# HF_TOKEN=  for gated models\n{variables}", SECRET),
        "prometheus.yml": File(scrape_config(static_targets([f"qtool:{PORT}"]))),
        "alerts.yml": File(to_yaml(alert_rules())),
        "dashboards/qtool.json": File(dashboard(deployment.name)),
        "grafana/datasources/prometheus.yml": File(to_yaml(DATASOURCE)),
        "grafana/dashboards/qtool.yml": File(to_yaml(DASHBOARDS)),
    }


def _server(deployment: Deployment, image: str | None) -> dict[str, Any]:
    resources = deployment.resources
    is_gpu = bool(resources.gpus)
    run = inside(deployment, "compose")
    volumes: list[Any] = [f"cache:{CACHE}"]
    for mount in run.mounts:
        volumes.append(
            {
                "type": "bind",
                "source": _literal(str(mount.source)),
                "target": _literal(mount.target),
                "read_only": True,
            }
        )
    limits = {"cpus": str(resources.cpus), "memory": f"{resources.memory_gib}G"}
    wanted: dict[str, Any] = {"limits": limits}
    if is_gpu:
        device = {"driver": "nvidia", "count": resources.gpus, "capabilities": ["gpu"]}
        wanted["reservations"] = {"devices": [device]}
    build: Mapping[str, Any] = (
        {"build": {"context": SOURCE_REPOSITORY, "target": "cuda" if is_gpu else "cpu"}}
        if image is None
        else {}
    )
    return {
        "image": image or image_name(is_gpu),
        **build,
        "command": [_literal(argument) for argument in run.arguments],
        "environment": dict(environment(deployment)),
        "env_file": ["./qtool.env"],
        "ports": [f"{deployment.asked.options.host}:{deployment.port}:{PORT}"],
        "volumes": volumes,
        "healthcheck": {
            "test": ["CMD", *PROBE],
            "interval": "10s",
            "timeout": "6s",
            "retries": 6,
            "start_period": START_PERIOD,
            "start_interval": "2s",
        },
        "stop_grace_period": f"{deployment.asked.server.shutdown_timeout + 10:g}s",
        "restart": "unless-stopped",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "deploy": {"resources": wanted},
    }


def _quoted(key: str) -> str:
    """A key as an env_file has it: without quotes compose would replace $NAME, often by nothing,
    and end the key at " #".
    """
    if any(character in "'\\" or not character.isprintable() for character in key):
        raise UsageError(
            "the API key has a quote, a backslash or a control character",
            "use another key: openssl rand -hex 32",
        )
    return f"'{key}'"


def _literal(text: str) -> str:
    """compose replaces $NAME; $$ is a dollar."""
    return text.replace("$", "$$")


DATASOURCE = {
    "apiVersion": 1,
    "datasources": [
        {
            "name": "Prometheus",
            "type": "prometheus",
            "access": "proxy",
            "url": "http://prometheus:9090",
            "isDefault": True,
        }
    ],
}
DASHBOARDS = {
    "apiVersion": 1,
    "providers": [{"name": "qtool", "type": "file", "options": {"path": "/dashboards"}}],
}
