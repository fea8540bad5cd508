"""The written configuration by Ray's own schema, and what Ray's side refuses before it starts.

Needs the extra `ray`, and starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

from ray.serve.schema import ServeDeploySchema  # noqa: E402

from qtool import __version__  # noqa: E402
from qtool.errors import QtoolError, UsageError  # noqa: E402
from qtool.runtime.deploy.ray import app, run  # noqa: E402

MODEL = "builtin:books-7m"
ARGS: Mapping[str, Any] = {"arguments": [MODEL], "qtool_version": __version__, "router": "auto"}


@pytest.mark.parametrize(
    "flags",
    ["", "--replicas 3", "--autoscale 1:8 --max-num-seqs 8", "--gpus 2 --root-path /x"],
)
def test_rays_schema_takes_it(flags: str, deploy: Callable[[str], str]) -> None:
    document = yaml.safe_load(deploy(f"--to ray {MODEL} {flags} --dry-run"))
    parsed = ServeDeploySchema.model_validate(document)
    (application,) = parsed.applications
    assert [entry.name for entry in application.deployments] == ["Server", "Engine"]
    document["applications"][0]["deployments"][1]["max_ongoing_requests"] = -1
    with pytest.raises(ValueError, match="max_ongoing_requests"):
        ServeDeploySchema.model_validate(document)


def test_the_import_path_builds_the_application() -> None:
    assert isinstance(app.build(ARGS), ray.serve.Application)


def test_another_version_of_qtool_is_named() -> None:
    with pytest.raises(UsageError, match=rf"qtool 9\.9, and the cluster has {__version__}"):
        app.build({**ARGS, "qtool_version": "9.9"})


def test_a_mistake_in_the_flags_is_found_once_and_not_by_every_replica() -> None:
    with pytest.raises(UsageError, match="no-such"):
        app.build({**ARGS, "arguments": [MODEL, "--tool-call-parser", "no-such"]})


def test_this_ray_has_its_router_by_prefix() -> None:
    found = app.prefix_router()
    assert found is not None
    asked = app.asked_of([MODEL])
    assert app.router_config("auto", asked).request_router_class != (
        app.router_config("load", asked).request_router_class
    )
    uncached = app.asked_of([MODEL, "--no-enable-prefix-caching"])
    load = app.router_config("load", asked).request_router_class
    assert app.router_config("auto", uncached).request_router_class == load


def test_a_cluster_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        # As ray._private.utils.check_version_info says it.
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9.0\n"
            "This process on node x was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
        )

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(QtoolError, match=r"Ray: 2\.9\.0") as caught, run._connected("auto", {}, 1):
        pass
    assert "pip install" in (caught.value.hint or "")


def test_no_cluster_on_this_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(QtoolError, match="no Ray cluster at auto"), run._connected("auto", {}, 1):
        pass
