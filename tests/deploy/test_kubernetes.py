"""`qtool deploy --to k8s`, by Kubernetes' OpenAPI schema and by how its objects point at each
other.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from qtool.errors import QtoolError

MODEL = "builtin:books-7m"

Objects = dict[str, dict[str, Any]]
OPERATOR = "monitoring.coreos.com/v1"


@pytest.fixture
def objects(written: Callable[[str, Path], dict[str, str]]) -> Callable[[str, Path], Objects]:
    """Every written object by "Kind/name", valid by the schema of its kind."""

    def run(line: str, folder: Path) -> Objects:
        found: Objects = {}
        for name, text in written(line, folder).items():
            if name == "prometheus-adapter-values.yaml":
                continue
            for document in yaml.safe_load_all(text):
                if document["apiVersion"] != OPERATOR:  # not Kubernetes' own
                    version = kubernetes_validate.latest_version()
                    kubernetes_validate.validate(document, version, strict=True)
                found[f"{document['kind']}/{document['metadata']['name']}"] = document
        return found

    return run


def container(found: Objects, name: str = "books-7m") -> dict[str, Any]:
    (one,) = found[f"StatefulSet/{name}"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one


def test_the_schema_sees_a_wrong_field() -> None:
    wrong = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_services_select_the_pods(tmp_path: Path, objects: Callable[[str, Path], Objects]) -> None:
    found = objects(f"--to k8s {MODEL} --port 9000", tmp_path)
    stateful = found["StatefulSet/books-7m"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    for name in ("Service/books-7m", "Service/books-7m-pods"):
        assert found[name]["spec"]["selector"].items() <= labels.items()
        assert found[name]["spec"]["ports"][0]["port"] == 9000
    assert stateful["selector"]["matchLabels"].items() <= labels.items()
    assert stateful["serviceName"] == "books-7m-pods"
    assert found["Service/books-7m-pods"]["spec"]["clusterIP"] == "None"


def test_pods_have_probes_limits_and_a_volume_of_their_own(
    tmp_path: Path, objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {MODEL} --cpus 3 --memory 6Gi --replicas 2", tmp_path)
    one = container(found)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert one[probe]["httpGet"]["path"] == "/health"
    assert one["resources"]["requests"] == {"cpu": "3", "memory": "6Gi"}
    assert one["resources"]["limits"] == {"memory": "6Gi"}
    stateful = found["StatefulSet/books-7m"]["spec"]
    assert stateful["replicas"] == 2
    (claim,) = stateful["volumeClaimTemplates"]
    mounted = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    assert mounted[claim["metadata"]["name"]] == "/cache"
    home = {entry["name"]: entry.get("value") for entry in one["env"]}
    assert home["HF_HOME"] == "/cache/huggingface"
    assert found["PodDisruptionBudget/books-7m"]["spec"]["maxUnavailable"] == 1


def test_answers_get_their_time_before_a_pod_is_killed(
    tmp_path: Path, objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {MODEL} --shutdown-timeout 90", tmp_path)
    pod = found["StatefulSet/books-7m"]["spec"]["template"]["spec"]
    leave = int(container(found)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > 90 + leave


def test_every_mount_has_its_volume(
    tmp_path: Path, folder_of: Callable[..., Path], objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {folder_of('m')} --api-key k --name m", tmp_path / "out")
    stateful = found["StatefulSet/m"]["spec"]
    volumes = {volume["name"] for volume in stateful["template"]["spec"]["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
    assert {mount["name"] for mount in container(found, "m")["volumeMounts"]} == volumes


def test_the_queue_drives_the_autoscaler(
    tmp_path: Path, objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {MODEL} --autoscale 2:8", tmp_path)
    scaler = found["HorizontalPodAutoscaler/books-7m"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 8)
    assert scaler["scaleTargetRef"]["kind"] == "StatefulSet"
    # Or applying the file a second time would undo what the autoscaler did.
    assert "replicas" not in found["StatefulSet/books-7m"]["spec"]
    values = yaml.safe_load((tmp_path / "prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    (metric,) = scaler["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting")


def test_keys_are_a_secret_and_nowhere_else(
    tmp_path: Path, objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {MODEL} --api-key one --api-key two", tmp_path)
    assert found["Secret/books-7m-api-keys"]["stringData"]["api-keys"] == "one\ntwo\n"
    assert stat.S_IMODE((tmp_path / "secret.yaml").stat().st_mode) == 0o600
    arguments = container(found)["args"]
    assert "--api-key" not in arguments
    path = Path(arguments[arguments.index("--api-key-file") + 1])
    mounts = {mount["mountPath"] for mount in container(found)["volumeMounts"]}
    assert str(path.parent) in mounts
    assert "one" not in (tmp_path / "qtool.yaml").read_text().split()


def test_a_folder_comes_from_the_nodes_or_from_a_claim(
    tmp_path: Path,
    folder_of: Callable[..., Path],
    refusal: Callable[[str], QtoolError],
    objects: Callable[[str, Path], Objects],
) -> None:
    folder = folder_of("m")

    def model_volume(line: str, out: str) -> dict[str, Any]:
        pod = objects(line, tmp_path / out)["StatefulSet/m"]["spec"]["template"]["spec"]
        return next(volume for volume in pod["volumes"] if volume["name"] == "model")

    on_node = model_volume(f"--to k8s {folder} --name m", "a")
    assert on_node["hostPath"]["path"] == str(folder)
    claimed = model_volume(f"--to k8s {folder} --name m --model-claim models", "b")
    assert claimed["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert "not a folder" in refusal(f"--to k8s {MODEL} --model-claim models").message


def test_gpus_are_asked_for(tmp_path: Path, objects: Callable[[str, Path], Objects]) -> None:
    found = objects(f"--to k8s {MODEL} --gpus 2", tmp_path)
    assert container(found)["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert container(found)["image"].endswith("-cuda")


def test_the_operator_selects_one_service(
    tmp_path: Path, objects: Callable[[str, Path], Objects]
) -> None:
    found = objects(f"--to k8s {MODEL} --service-monitor", tmp_path)
    wanted = found["ServiceMonitor/books-7m"]["spec"]["selector"]["matchLabels"].items()
    services = [name for name in found if name.startswith("Service/")]
    selected = [name for name in services if wanted <= found[name]["metadata"]["labels"].items()]
    assert selected == ["Service/books-7m"]
    assert found["PrometheusRule/books-7m"]["spec"]["groups"]


def test_files_of_this_machine_stay_here(
    tmp_path: Path, refusal: Callable[[str], QtoolError]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    error = refusal(f"--to k8s {MODEL} --chat-template {template}")
    assert str(template) in error.message
