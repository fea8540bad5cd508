"""What compose and Kubernetes have in common: the image, and a model and files inside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qtool import __version__
from qtool.errors import UsageError
from qtool.runtime.deploy.deployment import Deployment
from qtool.runtime.deploy.facts import parts_of

PORT = 8000
CACHE = "/cache"
SOURCE_REPOSITORY = "https://github.com/qtool/qtool.git"
USER_ID = 10001  # the Dockerfile's
REFUSED = {
    "uds": "containers are reached by their port",
    "ssl_certfile": "put the proxy that has the certificate before it",
    "ssl_keyfile": "put the proxy that has the certificate before it",
}
# The image has Python and no curl.
PROBE = (
    "python",
    "-c",
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)",
)


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of this machine under a path of the container, read-only."""

    name: str
    source: Path
    target: str


@dataclass(frozen=True, slots=True)
class Inside:
    """The command line in the container, and what it needs there."""

    arguments: tuple[str, ...]
    mounts: tuple[Mount, ...]


def image_name(device_is_gpu: bool) -> str:
    """What `docker build --target cpu|cuda` of this version is called."""
    return f"qtool:{__version__}-{'cuda' if device_is_gpu else 'cpu'}"


def inside(deployment: Deployment, target: str, **other: Any) -> Inside:
    """The deployment's command line as a container runs it.

    Paths of this machine become mounts; keys are left out, they never stand on a command line.
    other  flags of `qtool serve` to set beside
    """
    deployment.refuse(target, REFUSED)
    _refuse_local_models(deployment, target)
    model, mounts = _model(deployment)
    values: dict[str, Any] = {
        "host": "0.0.0.0",
        "port": PORT,
        "served_model_name": deployment.asked.server.served_model_names,
    }
    if not deployment.resources.gpus and "threads" not in deployment.flags:
        # A limit on CPU time does not change how many cores a process sees.
        values["threads"] = deployment.resources.cpus
    if deployment.resources.gpus:
        values["device"] = "cuda"
    template = deployment.flags.get("chat_template")
    if template is not None and Path(template).is_file():
        path = "/etc/qtool/chat_template.jinja"
        mounts.append(Mount("chat-template", Path(template).resolve(), path))
        values["chat_template"] = path
    if deployment.asked.engine.lora_modules:
        modules = []
        for index, (name, folder) in enumerate(deployment.asked.engine.lora_modules):
            if Path(folder).is_dir():
                path = f"/adapters/{PurePosixPath(name).name}"
                mounts.append(Mount(f"adapter-{index}", Path(folder).resolve(), path))
                folder = path
            modules.append(f"{name}={folder}")
        values["lora_modules"] = modules
    arguments = deployment.arguments(
        model, without=("api_key", "api_key_file"), **{**values, **other}
    )
    return Inside(("serve", *arguments), tuple(mounts))


def _model(deployment: Deployment) -> tuple[str, list[Mount]]:
    facts = deployment.facts
    if facts.kind in ("builtin", "hub") or facts.path is None:
        return deployment.asked.engine.model, []
    if len(parts_of(facts.path)) > 1:
        folder = facts.path.parent
        inner = f"/models/{folder.name}"
        return f"{inner}/{facts.path.name}", [Mount("model", folder, inner)]
    path = f"/models/{facts.path.name}"
    return path, [Mount("model", facts.path, path)]


def _refuse_local_models(deployment: Deployment, target: str) -> None:
    speculation = deployment.asked.engine.speculative_config
    draft = None if speculation is None else speculation.model
    others = [*deployment.asked.server.also_served, *([draft] if draft else [])]
    for name in others:
        if Path(name).exists():
            raise UsageError(
                f"--to {target} mounts one model, and {name} is a second one of this machine",
                "name it by its Hub id",
            )


def environment(deployment: Deployment) -> Mapping[str, str]:
    """Of every container; caches lie on the volume, so that a restart downloads nothing."""
    variables = {"HF_HOME": f"{CACHE}/huggingface", "XDG_CACHE_HOME": CACHE}
    if deployment.facts.kind != "hub":
        variables["HF_HUB_OFFLINE"] = "1"
    return variables
