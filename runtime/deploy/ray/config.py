"""`--to ray`: the configuration of a Ray Serve application, as a value; Ray is not needed for it.

    proxy (Ray's) -> Server: the HTTP app -> Engine, Engine, ...: one engine each
                             Board: what the engines say of themselves, for /metrics and /health

The same mapping is what `--dry-run` prints as YAML for `serve deploy`, what runs here, and what is
read on the cluster: `arguments` are a command line of `qtool serve`, so nothing is said twice.
Schema: docs.ray.io, "Serve Config Files" (ServeDeploySchema).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from qtool import __version__
from qtool.errors import UnknownName
from qtool.runtime.deploy.deployment import Deployment

IMPORT_PATH = "qtool.runtime.deploy.ray.app:build"
SERVER, ENGINE, BOARD = "Server", "Engine", "Board"
Router = Literal["auto", "prefix", "load"]
# Above what an engine runs at once, so that its scheduler always has the next ones at hand.
ONGOING_PER_RUNNING = 2
# A client that keeps its connection open costs the server next to nothing.
SERVER_ONGOING = 4096
UPSCALE_SECONDS = 10.0
# A replica has to load a model: do not give one up for a quiet minute.
DOWNSCALE_SECONDS = 600.0
HEALTH_PERIOD_SECONDS = 5.0
HEALTH_TIMEOUT_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 75  # above the 60 s of common proxies, which must close first

REFUSED = {
    "uds": "Ray's proxies listen on a port",
    "also_serve": "an application has one model; deploy the other under another --name",
    "api_key": "Ray's dashboard would show it: set QTOOL_API_KEY where the cluster is started",
    "ssl_ca_certs": "Ray's proxies ask for no certificates of clients that way; put a proxy before",
}


def serve_config(
    deployment: Deployment, *, router: str = "auto", on_cluster: bool = False
) -> dict[str, Any]:
    """ServeDeploySchema as plain values.

    on_cluster  other machines: where no host is named, its proxies listen for more than their own
    """
    deployment.refuse("ray", REFUSED)
    if router not in get_args(Router):
        raise UnknownName("router", router, get_args(Router))
    asked, resources = deployment.asked, deployment.resources
    http: dict[str, Any] = {
        "host": "0.0.0.0" if on_cluster and "host" not in deployment.flags else asked.options.host,
        "port": asked.options.port,
        "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
    }
    if asked.server.tls is not None:
        http |= {"ssl_certfile": asked.server.tls.certificate, "ssl_keyfile": asked.server.tls.key}
    without = ("host", "port", "ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "root_path")
    other: dict[str, Any] = {}
    if not resources.gpus and "threads" not in deployment.flags:
        other["threads"] = resources.cpus
    if asked.server.root_path:
        http["root_path"] = asked.server.root_path
    arguments = deployment.arguments(_model(deployment), without=without, **other)
    return {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [
            {
                "name": deployment.name,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {
                    "arguments": arguments,
                    "qtool_version": __version__,
                    "router": router,
                },
                "deployments": [
                    {
                        "name": SERVER,
                        "num_replicas": 1,
                        "max_ongoing_requests": SERVER_ONGOING,
                        "ray_actor_options": {"num_cpus": 1},
                        **_stopping(deployment),
                    },
                    {
                        "name": ENGINE,
                        **_number(deployment),
                        "max_ongoing_requests": ONGOING_PER_RUNNING * asked.engine.max_num_seqs,
                        "max_queued_requests": asked.engine.num_waiting_limit,
                        "ray_actor_options": {
                            "num_cpus": resources.cpus,
                            "num_gpus": resources.gpus,
                            "memory": resources.memory_bytes,
                        },
                        **_stopping(deployment),
                    },
                ],
            }
        ],
    }


def _model(deployment: Deployment) -> str:
    """A path must be whole: an engine starts wherever Ray puts it."""
    facts = deployment.facts
    return str(facts.path) if facts.kind in ("folder", "gguf") else deployment.asked.engine.model


def _number(deployment: Deployment) -> Mapping[str, Any]:
    scale = deployment.scale
    if scale.most is None:
        return {"num_replicas": scale.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scale.replicas,
            "max_replicas": scale.most,
            "initial_replicas": deployment.initial_replicas or scale.replicas,
            # What is above it waits: Ray counts what runs and what is queued.
            "target_ongoing_requests": deployment.asked.engine.max_num_seqs,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        }
    }


def _stopping(deployment: Deployment) -> Mapping[str, Any]:
    return {
        "graceful_shutdown_timeout_s": deployment.asked.server.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
        # The server has a log of its own, one line a request.
        "logging_config": {"enable_access_log": False},
    }
