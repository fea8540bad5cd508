"""`qtool deploy`: the same model, flags, API and metrics, past one process on one machine."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.errors import UnknownName, UsageError
from qtool.runtime.deploy.deployment import (
    Deployment,
    Resources,
    Scale,
    check_name,
    default_name,
    given_to_serve,
    meaning,
    needed_memory,
    parse_memory,
)
from qtool.runtime.deploy.facts import look_at
from qtool.runtime.deploy.files import File, shown, write_files
from qtool.runtime.deploy.sizes import check_split
from qtool.runtime.store import store
from qtool.settings import child_environment

DEFAULT_CPUS = 4
# (option, targets that it is for); what is not listed is for all of them.
ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "out": ("compose", "k8s", "systemd"),
    "force": ("compose", "k8s", "systemd"),
    "image": ("compose", "k8s"),
    "model_claim": ("k8s",),
    "service_monitor": ("k8s",),
    "vllm_python": ("vllm",),
    "address": ("ray",),
    "router": ("ray",),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What is said of the deployment and not of the server."""

    to: str
    out: Path | None
    force: bool
    dry_run: bool
    as_json: bool
    image: str | None
    model_claim: str | None
    service_monitor: bool
    vllm_python: str | None
    address: str | None
    router: str
    extra: tuple[str, ...]


# Where a context keeps what stands after "--".
EXTRA = "qtool.deploy.extra"


class DeployCommand(click.Command):
    """Takes the flags of this command; all others, and MODEL, are `qtool serve`'s; what stands
    after "--" is vLLM's.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {
            name: not parameter.is_flag
            for parameter in self.params
            if isinstance(parameter, click.Option)
            for name in parameter.opts
        }
        own |= dict.fromkeys(("--help", "-h"), False)
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[EXTRA] = tuple(args[end + 1 :])
        mine, others = split(args[:end], own)
        return super().parse_args(ctx, [*mine, "--", *others])


def split(arguments: Sequence[str], own: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """A command line in two.

    own  flags of the first part -> whether a value follows
    """
    mine: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, _ = argument.partition("=")
        if name not in own:
            others.append(argument)
            continue
        mine.append(argument)
        if own[name] and not has_value:
            value = next(rest, None)
            if value is None:
                raise UsageError(f"{name} needs a value")
            mine.append(value)
    return mine, others


@click.command(cls=DeployCommand)
@click.option(
    "--to",
    metavar="TARGET",
    required=True,
    help="ray: Ray Serve, here or on a cluster. vllm: vLLM on the same files. compose, k8s, "
    "systemd: write files.",
)
@click.option("--replicas", type=int, metavar="N", help="Engines beside each other.  [default: 1]")
@click.option(
    "--autoscale",
    metavar="LEAST:MOST",
    help="With ray and k8s: as many replicas as the queue asks for.",
)
@click.option(
    "--tensor-parallel-size",
    "-tp",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Devices that each layer is split over.  [default: 1]",
)
@click.option(
    "--pipeline-parallel-size",
    "-pp",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="With vllm: devices that the layers are spread over.  [default: 1]",
)
@click.option(
    "--cpus",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Cores of a replica.  [default: {DEFAULT_CPUS}; with ray and vllm this machine's]",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory of a replica, as 24G or 24Gi.  [default: by the model's size]",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs of a replica.  [default: none, or one for each part with --device cuda]",
)
@click.option("--name", metavar="NAME", help="Of the service.  [default: by the model's name]")
@click.option("--image", metavar="IMAGE", help="With compose, k8s: an image that exists.")
@click.option(
    "--model-claim",
    metavar="PVC",
    help="With k8s: the claim whose volume is the model's folder.  [default: the nodes' own disk]",
)
@click.option(
    "--service-monitor", is_flag=True, help="With k8s: objects for the Prometheus operator."
)
@click.option("--vllm-python", metavar="FILE", help="With vllm: the Python that has vLLM.")
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="With ray: an existing cluster; auto: the one of this machine.  [default: start one here]",
)
@click.option(
    "--router",
    metavar="WAY",
    default="auto",
    help="With ray: prefix (prompts that begin alike go to one replica), load, or auto.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--dry-run", is_flag=True, help="Print what would be written or run, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [SERVE FLAGS]")
def deploy(
    to: str,
    replicas: int | None,
    autoscale: str | None,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    cpus: int | None,
    memory: str | None,
    gpus: int | None,
    name: str | None,
    serve_arguments: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve MODEL on Ray, with vLLM, in containers or as a service.

    Every flag of `qtool serve` is taken too and means the same there; with --to vllm, what stands
    after "--" is vLLM's own. Nothing of the weights is read before all that can be checked has
    been: sizes, ports, versions, the cluster.

    \b
    Examples:
      qtool deploy --to ray Qwen/Qwen3-0.6B --replicas 2                  # on this machine
      qtool deploy --to ray Qwen/Qwen3-0.6B --autoscale 1:8 --dry-run     # for `serve deploy`
      qtool deploy --to vllm ./Qwen3-0.6B-int4 -tp 2 --max-model-len 8192 -- --enforce-eager
      qtool deploy --to compose ./Qwen3-0.6B-int4 --host 0.0.0.0 --api-key secret
      qtool deploy --to k8s Qwen/Qwen3-0.6B --device cuda --autoscale 1:8 --service-monitor
      qtool deploy --to systemd ./Qwen3-0.6B-int4 --cpus 8 --memory 16G
    """
    if to not in TARGETS:
        raise UnknownName("target", to, TARGETS)
    chosen = Options(to=to, extra=click.get_current_context().meta[EXTRA], **options)
    _check_options(chosen)
    model, flags = given_to_serve(serve_arguments)
    if (made := store().find(model)) is not None:
        raise UsageError(
            f"{model} is a name on this machine, made from {made.base}",
            f"deploy {made.base} with flags, such as --chat-template",
        )
    if to != "vllm" and tensor_parallel_size > 1:
        flags["tensor_parallel_size"] = tensor_parallel_size
    if gpus and "device" not in flags:
        flags["device"] = "cuda"
    asked = meaning(model, flags)
    facts = look_at(model, asked.engine.revision)
    check_split(facts, tensor_parallel_size, pipeline_parallel_size, evenly=to == "vllm")
    if to != "vllm" and pipeline_parallel_size > 1:
        raise UsageError(
            f"--pipeline-parallel-size {pipeline_parallel_size}: qtool's engine splits layers over "
            "devices, and does not spread them",
            f"--tensor-parallel-size {pipeline_parallel_size}, or --to vllm",
        )
    if gpus is None:
        gpus = tensor_parallel_size if asked.engine.device == "cuda" else 0
    if 0 < gpus < tensor_parallel_size:
        raise UsageError(
            f"--gpus {gpus} is less than --tensor-parallel-size {tensor_parallel_size}",
            f"a replica needs {tensor_parallel_size} of them",
        )
    bytes_needed = parse_memory(memory) if memory else needed_memory(facts, asked)
    if bytes_needed is None:
        raise UsageError(
            f"the size of {model} is not known: {facts.missing}", "pass --memory, such as 24G"
        )
    scale = Scale.parse(replicas, autoscale)
    here = DEFAULT_CPUS
    if to in ("ray", "vllm"):
        here = max((os.cpu_count() or 1) // (scale.most or scale.replicas), 1)
    deployment = Deployment(
        name=name or default_name(model),
        facts=facts,
        flags=flags,
        asked=asked,
        scale=scale,
        resources=Resources(cpus or here, bytes_needed, gpus),
        tensor_parallel=tensor_parallel_size,
        pipeline_parallel=pipeline_parallel_size,
        initial_replicas=replicas,
    )
    check_name(deployment.name)
    TARGETS[to](deployment, chosen)


def _check_options(options: Options) -> None:
    for name, targets in ONLY_FOR.items():
        value = getattr(options, name)
        if value not in (None, False, "auto") and options.to not in targets:
            raise UsageError(
                f"--{name.replace('_', '-')} is for --to {' and --to '.join(targets)}",
                f"leave it out with --to {options.to}",
            )

    if options.extra and options.to != "vllm":
        raise UsageError(
            f"what stands after -- goes to vLLM: {options.extra[0]}",
            "write flags of `qtool serve` before it",
        )


def _to_compose(deployment: Deployment, options: Options) -> None:
    from qtool.runtime.deploy.compose import compose_files

    _write(deployment, options, compose_files(deployment, options.image), "docker compose up -d")


def _to_kubernetes(deployment: Deployment, options: Options) -> None:
    from qtool.runtime.deploy.kubernetes import kubernetes_files

    files = kubernetes_files(
        deployment,
        options.image,
        model_claim=options.model_claim,
        service_monitor=options.service_monitor,
    )
    names = [name for name in files if name != "prometheus-adapter-values.yaml"]
    _write(deployment, options, files, " ".join(["kubectl apply", *(f"-f {n}" for n in names)]))


def _to_systemd(deployment: Deployment, options: Options) -> None:
    from qtool.runtime.deploy.systemd import systemd_files

    files = systemd_files(deployment, python=sys.executable, user=getpass.getuser())
    unit = f"{deployment.name}.service"
    steps = [f"sudo cp {unit} /etc/systemd/system/"]
    if f"{deployment.name}.keys" in files:
        steps.append(f"sudo install -D -m 600 -t /etc/qtool {deployment.name}.keys")
    steps.append(f"sudo systemctl daemon-reload && sudo systemctl enable --now {unit}")
    _write(deployment, options, files, " && ".join(steps))


def _write(deployment: Deployment, options: Options, files: Mapping[str, File], then: str) -> None:
    if options.dry_run:
        click.echo(shown(files), nl=False)
        return
    folder = options.out or Path(f"{deployment.name}-{options.to}")
    write_files(folder, files, force=options.force)
    if options.as_json:
        click.echo(json.dumps({"folder": str(folder), "files": list(files), "next": then}))
        return
    for name in files:
        click.echo(f"{folder / name}")
    click.echo(f"next: cd {folder} && {then}")


def _to_vllm(deployment: Deployment, options: Options) -> None:
    from qtool.runtime.deploy.ports import check_free
    from qtool.runtime.deploy.vllm import CHECKED_VERSION, check, plan
    from qtool.runtime.deploy.vllm_installed import Installed, find, interpreter

    on_path = shutil.which("vllm")
    if options.dry_run and options.vllm_python is None and on_path is None:
        is_cpu = deployment.asked.engine.device == "cpu"
        vllm = Installed("python", CHECKED_VERSION, is_cpu)
    else:
        vllm = find(interpreter(options.vllm_python, on_path))
    check(deployment, vllm)
    launch = plan(deployment, vllm, options.extra)
    for note in launch.notes:
        click.echo(note, err=True)
    if options.dry_run:
        variables, command = dict(launch.variables), list(launch.command)
        as_json = json.dumps({"command": command, "environment": variables})
        click.echo(as_json if options.as_json else launch.shown())
        return
    if not deployment.asked.options.uds:
        check_free(deployment.asked.options.host, deployment.port)
    click.echo(launch.shown(with_keys=False), err=True)
    os.execvpe(launch.command[0], launch.command, child_environment(**launch.variables))


def _to_ray(deployment: Deployment, options: Options) -> None:
    from qtool.runtime.deploy.prometheus import to_yaml
    from qtool.runtime.deploy.ray.config import serve_config

    on_cluster = options.dry_run or options.address not in (None, "auto")
    config = serve_config(deployment, router=options.router, on_cluster=on_cluster)
    if options.dry_run:
        click.echo(json.dumps(config) if options.as_json else to_yaml(config), nl=False)
        return
    from qtool.runtime.deploy.ray.run import run_on_ray

    run_on_ray(deployment, config, options.address)


TARGETS: Mapping[str, Callable[[Deployment, Options], None]] = {
    "ray": _to_ray,
    "vllm": _to_vllm,
    "compose": _to_compose,
    "k8s": _to_kubernetes,
    "systemd": _to_systemd,
}
