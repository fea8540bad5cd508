"""`qtool deploy --to ray`, from a configuration to a running application: look, start, wait.

Without --address a cluster of one node is started here and ends with this command. With it the
application is left running on that cluster, and Ray's own commands (`serve status`, `serve
shutdown`) look after it.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from qtool.errors import QtoolError, UsageError
from qtool.progress import bar
from qtool.runtime.deploy.deployment import Deployment
from qtool.runtime.deploy.ports import check_free, check_reachable
from qtool.runtime.deploy.ray.config import ENGINE, SERVER
from qtool.runtime.deploy.ray.keys import check_keys, digest_of_key, digests_there

GCS_PORT = 6379
OBJECT_STORE_BYTES = 100_000_000  # the least that Ray takes is 75 MB; tokens are small
BUSY = (
    "it gives itself half a minute: try again when the machine is less busy, or start it with "
    "`ray start --head` and pass --address auto"
)
NO_RAY = (
    "Ray is not installed",
    "pip install 'qtool[ray]', or print the configuration for a cluster with --dry-run",
)


def run_on_ray(deployment: Deployment, config: Mapping[str, Any], address: str | None) -> None:
    (application,) = config["applications"]
    options = {entry["name"]: _options(entry) for entry in application["deployments"]}
    http = config["http_options"]
    if http["port"] == 0:
        raise UsageError("--port 0: Ray's proxies take no port by themselves", "name one")
    if address is None:
        check_free(http["host"], http["port"])
    elif address != "auto":
        check_reachable(address.removeprefix("ray://"), GCS_PORT)
    most = deployment.scale.most or deployment.scale.replicas
    with _connected(address, _needed(deployment), most * deployment.resources.cpus + 1):
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from qtool.runtime.deploy.ray.app import application as built

        # A file of keys is read where a replica runs.
        if address is not None and "api_key_file" not in deployment.flags:
            here = digest_of_key()
            check_keys(here, {} if here is None else digests_there())
        app = built(application["args"], options)  # refuses what cannot work, before any weight
        try:
            serve.start(proxy_location=config["proxy_location"], http_options=dict(http))
        except RayError as error:
            raise QtoolError(
                f"Ray could not start its proxies: {_first_line(error)}", BUSY
            ) from None
        try:
            with bar(f"Starting {deployment.scale.replicas} x {deployment.facts.name}"):
                serve.run(app, name=application["name"], route_prefix="/")
        except (RuntimeError, RayServeException) as error:
            reason = _reason(serve, application["name"], error)
            serve.delete(application["name"])
            raise QtoolError(
                f"the application did not start: {reason}",
                "the replicas' logs are in /tmp/ray/session_latest/logs/serve",
            ) from None
        host = "127.0.0.1" if http["host"] in ("0.0.0.0", "::") else http["host"]
        url = f"http{'s' if 'ssl_certfile' in http else ''}://{host}:{http['port']}"
        click.echo(f"Serving {deployment.served_name} at {url}/v1")
        if address is not None:
            click.echo(
                f"on the cluster at {address}, as application {application['name']}; where Serve "
                "ran there before, at its port. See `serve status`; `serve shutdown` ends it.",
                err=True,
            )
            return
        _wait_for_signal()
        # First the application, whose replicas let their answers finish; with it gone the proxies
        # have nothing left to send, and can be ended.
        serve.delete(application["name"])
        serve.shutdown()


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "name"}


def _needed(deployment: Deployment) -> Mapping[str, float]:
    """What the least number of replicas takes of a cluster, and the server beside them."""
    resources, replicas = deployment.resources, deployment.scale.replicas
    return {
        "CPU": replicas * resources.cpus + 1,
        "GPU": replicas * resources.gpus,
        "memory": replicas * resources.memory_bytes,
    }


@contextmanager
def _connected(address: str | None, needed: Mapping[str, float], num_cpus: int) -> Iterator[None]:
    """In a cluster that has what is needed; one that was started here is ended.

    num_cpus  of a cluster that is started here: Ray's unit of placement, and no limit
    """
    try:
        import ray
    except ImportError:
        raise QtoolError(*NO_RAY) from None
    try:
        if address is None:
            ray.init(
                address="local",  # or Ray would join a cluster of this machine that is running
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise QtoolError(
            f"no Ray cluster at {address}: {_first_line(error)}",
            "start one with `ray start --head`, or leave --address out to start one here; where a "
            "cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ) from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise QtoolError(
            f"the cluster at {address} and this machine differ: {' '.join(str(error).split())}",
            "use the cluster's versions of Ray and Python here: pip install 'ray[serve]==VERSION'",
        ) from None
    except Exception as error:
        # Ray's own word for "the processes of a new cluster were not up in time".
        if address is not None or "startup" not in str(error):
            raise
        ray.shutdown()
        raise QtoolError(f"Ray could not start here: {_first_line(error)}", BUSY) from None
    try:
        check_resources(needed, ray.cluster_resources(), address)
        yield
    finally:
        ray.shutdown()


def check_resources(
    needed: Mapping[str, float], there: Mapping[str, float], address: str | None
) -> None:
    """Raise UsageError where the replicas would wait for ever for what no node has."""
    flags = {"CPU": "--cpus", "GPU": "--gpus", "memory": "--memory"}
    for name, amount in needed.items():
        found = there.get(name, 0.0)
        if amount > found:
            where = "this machine has" if address is None else f"the cluster at {address} has"
            raise UsageError(
                f"the replicas need {_amount(name, amount)}, and {where} {_amount(name, found)}",
                f"lower {flags[name]} or --replicas",
            )


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:.1f} GB of memory" if name == "memory" else f"{amount:g} {name}s"


def _reason(serve: Any, name: str, error: Exception) -> str:
    """What Ray knows of a failed start: the message of the deployment that is in the way."""
    application = serve.status().applications.get(name)
    for deployment in (ENGINE, SERVER):
        status = application and application.deployments.get(deployment)
        if status and status.message:
            message = str(status.message)
            lines = [line.strip() for line in message.splitlines() if line.strip()]
            named = [line for line in lines if "rror" in line]
            return re.sub(r"^qtool\.errors\.\w+: ", "", (named or lines)[-1])
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C; after the first of them Ctrl-C ends everything at once."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
