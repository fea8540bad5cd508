"""`--to k8s`: a StatefulSet with its Service, caches, probes and, where asked for, autoscaling.

Why a StatefulSet: every replica gets a volume of its own for downloads and compiled kernels, which
any storage class can give; a claim shared by replicas on several nodes would need ReadWriteMany.
Objects are checked against Kubernetes' OpenAPI schema in the tests.
"""

from __future__ import annotations

from typing import Any

import yaml

from qtool.errors import UsageError
from qtool.runtime.deploy.containers import (
    CACHE,
    PORT,
    USER_ID,
    Inside,
    environment,
    image_name,
    inside,
)
from qtool.runtime.deploy.deployment import GIB, Deployment
from qtool.runtime.deploy.files import SECRET, File
from qtool.runtime.deploy.grafana import dashboard
from qtool.runtime.deploy.prometheus import SCRAPE_SECONDS, alert_rules, to_yaml

KEYS_FOLDER = "/run/secrets/qtool"
# Half an hour of 10 s: a download of tens of gigabytes is part of the first start.
STARTUP_PROBES = 180
# What waits in a replica before another one is started, as the name prometheus-adapter gives it.
QUEUE_METRIC = "vllm_num_requests_waiting"
TARGET_WAITING = 4
# Between a pod's removal from the Service and SIGTERM: proxies need a moment to hear of it.
LEAVE_SECONDS = 5


def kubernetes_files(
    deployment: Deployment,
    image: str | None,
    *,
    model_claim: str | None = None,
    service_monitor: bool = False,
) -> dict[str, File]:
    """
    image            one that the cluster can pull; None: this version's, built by its users
    model_claim      a PersistentVolumeClaim that holds the model's folder; None: a folder of this
                     machine is expected at the same path of every node
    service_monitor  write the Prometheus operator's objects
    """
    if model_claim is not None and deployment.facts.kind not in ("folder", "gguf"):
        raise UsageError(
            f"--model-claim {model_claim}: {deployment.facts.name} is not a folder",
            "leave it out: the model is downloaded to a volume of each replica",
        )
    keys = deployment.asked.server.api_keys
    other = {"api_key_file": f"{KEYS_FOLDER}/api-keys"} if keys else {}
    run = inside(deployment, "k8s", **other)
    _refuse_local_files(run)
    objects = [
        _service(deployment, headless=False),
        _service(deployment, headless=True),
        _stateful_set(deployment, image, run, model_claim),
    ]
    if deployment.scale.replicas > 1 or deployment.scale.most is not None:
        objects.append(_disruption_budget(deployment))
    files: dict[str, File] = {}
    if keys:
        secret = _object("v1", "Secret", deployment, name=f"{deployment.name}-api-keys")
        secret |= {"type": "Opaque", "stringData": {"api-keys": "\n".join(keys) + "\n"}}
        files["secret.yaml"] = File(to_yaml(secret), SECRET)
    if deployment.scale.most is not None:
        objects.append(_autoscaler(deployment))
        files["prometheus-adapter-values.yaml"] = File(to_yaml(ADAPTER_VALUES))
    if service_monitor:
        files["monitoring.yaml"] = File(_documents(_operator_objects(deployment)))
    files["qtool.yaml"] = File(_documents(objects))
    files["grafana-dashboard.yaml"] = File(to_yaml(_dashboard_map(deployment)))
    return files


def _documents(objects: list[dict[str, Any]]) -> str:
    text: str = yaml.safe_dump_all(objects, sort_keys=False, width=100, allow_unicode=True)
    return text


def _refuse_local_files(run: Inside) -> None:
    for mount in run.mounts:
        if mount.name != "model":
            raise UsageError(
                f"--to k8s cannot take {mount.source} of this machine to the cluster",
                "put it into the model's folder, or name an adapter by its Hub id",
            )


def _labels(deployment: Deployment) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "qtool",
        "app.kubernetes.io/instance": deployment.name,
    }


def _object(version: str, kind: str, deployment: Deployment, name: str = "") -> dict[str, Any]:
    metadata = {"name": name or deployment.name, "labels": _labels(deployment)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _service(deployment: Deployment, *, headless: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "selector": _labels(deployment),
        "ports": [{"name": "http", "port": deployment.port, "targetPort": "http"}],
    }
    if headless:
        spec |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    name = f"{deployment.name}-pods" if headless else deployment.name
    found = _object("v1", "Service", deployment, name)
    if not headless:
        # What the ServiceMonitor selects: the pods once, not once by each of the two services.
        found["metadata"]["labels"] = {**_labels(deployment), "qtool/scrape": "true"}
    return found | {"spec": spec}


def _stateful_set(
    deployment: Deployment, image: str | None, run: Inside, model_claim: str | None
) -> dict[str, Any]:
    scrape = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(PORT),
        "prometheus.io/path": "/metrics",
    }
    pod: dict[str, Any] = {
        "metadata": {"labels": _labels(deployment), "annotations": scrape},
        "spec": {
            "terminationGracePeriodSeconds": int(
                deployment.asked.server.shutdown_timeout + LEAVE_SECONDS + 10
            ),
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(deployment, image, run)],
            "volumes": _volumes(deployment, run, model_claim),
        },
    }
    if deployment.resources.gpus:
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    cache = {
        "metadata": {"name": "cache"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{_cache_gib(deployment)}Gi"}},
        },
    }
    spec: dict[str, Any] = {
        "replicas": deployment.initial_replicas or deployment.scale.replicas,
        "serviceName": f"{deployment.name}-pods",
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": _labels(deployment)},
        "template": pod,
        "volumeClaimTemplates": [cache],
    }
    if deployment.scale.most is not None:
        del spec["replicas"]  # the autoscaler's; applying the file again must not undo it
    return _object("apps/v1", "StatefulSet", deployment) | {"spec": spec}


def _container(deployment: Deployment, image: str | None, run: Inside) -> dict[str, Any]:
    resources = deployment.resources
    memory = f"{resources.memory_gib}Gi"
    limits: dict[str, Any] = {"memory": memory}
    if resources.gpus:
        limits["nvidia.com/gpu"] = str(resources.gpus)
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    mounts: list[dict[str, Any]] = [
        {"name": "cache", "mountPath": CACHE},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    mounts += [
        {"name": mount.name, "mountPath": mount.target, "readOnly": True} for mount in run.mounts
    ]
    if deployment.asked.server.api_keys:
        mounts.append({"name": "api-keys", "mountPath": KEYS_FOLDER, "readOnly": True})
    token = {"name": "hub-token", "key": "token", "optional": True}
    variables = [{"name": name, "value": value} for name, value in environment(deployment).items()]
    return {
        "name": "qtool",
        "image": image or image_name(bool(resources.gpus)),
        # $(NAME) would be replaced; $$(NAME) is the text itself.
        "args": [argument.replace("$(", "$$(") for argument in run.arguments],
        "env": [*variables, {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {
            "requests": {"cpu": str(resources.cpus), "memory": memory},
            "limits": limits,
        },
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": STARTUP_PROBES},
        "readinessProbe": {**health, "periodSeconds": 5, "failureThreshold": 2},
        # An engine that has failed answers 503; so does one that drains, but then no more probes
        # are sent.
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_SECONDS)]}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _volumes(deployment: Deployment, run: Inside, model_claim: str | None) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    for mount in run.mounts:
        if model_claim is not None:
            claim = {"claimName": model_claim, "readOnly": True}
            volumes.append({"name": mount.name, "persistentVolumeClaim": claim})
            continue
        kind = "File" if mount.source.is_file() else "Directory"
        path = {"path": str(mount.source), "type": kind}
        volumes.append({"name": mount.name, "hostPath": path})
    if deployment.asked.server.api_keys:
        secret = {"secretName": f"{deployment.name}-api-keys", "defaultMode": 0o440}
        volumes.append({"name": "api-keys", "secret": secret})
    return volumes


def _cache_gib(deployment: Deployment) -> int:
    """Room for the download twice (a new revision beside the old one) and compiled code."""
    facts = deployment.facts
    if facts.kind != "hub":
        return 1
    return 2 + (100 if facts.weight_bytes is None else -(-2 * facts.weight_bytes // GIB))


def _disruption_budget(deployment: Deployment) -> dict[str, Any]:
    return _object("policy/v1", "PodDisruptionBudget", deployment) | {
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(deployment)}}
    }


def _autoscaler(deployment: Deployment) -> dict[str, Any]:
    target = {"kind": "StatefulSet", "name": deployment.name, "apiVersion": "apps/v1"}
    metric = {
        "type": "Pods",
        "pods": {
            "metric": {"name": QUEUE_METRIC},
            "target": {"type": "AverageValue", "averageValue": str(TARGET_WAITING)},
        },
    }
    return _object("autoscaling/v2", "HorizontalPodAutoscaler", deployment) | {
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": deployment.scale.replicas,
            "maxReplicas": deployment.scale.most,
            "metrics": [metric],
            "behavior": {
                # A replica has to load a model: do not give one up for a quiet minute.
                "scaleDown": {
                    "stabilizationWindowSeconds": 600,
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}],
                },
                "scaleUp": {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}]},
            },
        }
    }


ADAPTER_VALUES = {
    "rules": {
        "custom": [
            {
                "seriesQuery": 'vllm:num_requests_waiting{namespace!="",pod!=""}',
                "resources": {
                    "overrides": {
                        "namespace": {"resource": "namespace"},
                        "pod": {"resource": "pod"},
                    }
                },
                "name": {"as": QUEUE_METRIC},
                "metricsQuery": "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
            }
        ]
    }
}
"""For the Helm chart prometheus-adapter: Kubernetes takes no colon in the name of a metric."""


def _operator_objects(deployment: Deployment) -> list[dict[str, Any]]:
    monitor = _object("monitoring.coreos.com/v1", "ServiceMonitor", deployment) | {
        "spec": {
            "jobLabel": "app.kubernetes.io/name",
            "selector": {"matchLabels": {**_labels(deployment), "qtool/scrape": "true"}},
            "endpoints": [{"port": "http", "path": "/metrics", "interval": f"{SCRAPE_SECONDS}s"}],
        }
    }
    rules = _object("monitoring.coreos.com/v1", "PrometheusRule", deployment)
    return [monitor, rules | {"spec": alert_rules()}]


def _dashboard_map(deployment: Deployment) -> dict[str, Any]:
    found = _object("v1", "ConfigMap", deployment, name=f"{deployment.name}-dashboard")
    found["metadata"]["labels"] = {**_labels(deployment), "grafana_dashboard": "1"}
    return found | {"data": {f"{deployment.name}.json": dashboard(deployment.name)}}
