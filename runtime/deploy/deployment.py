"""What is to be deployed: one value, checked when it is built, from which every target is written.

    qtool deploy --to TARGET MODEL [flags of this command] [flags of qtool serve]

The flags of `qtool serve` are kept as they were given, by the names of their parameters, so that a
target can leave one out, replace it or refuse it by name, and write the others down again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from qtool.errors import UsageError
from qtool.runtime.command import Asked, serve, what_to_serve
from qtool.runtime.deploy.facts import ModelFacts

GIB = 2**30
# Python, torch and transformers in memory, before any weight.
PROCESS_BYTES = 2 * GIB
# Room for the KV cache where no size is asked for, as a share of the weights and at least.
CACHE_SHARE = 0.25
LEAST_CACHE_BYTES = GIB
# Names of Kubernetes objects and of DNS: RFC 1123.
LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas: a number, or with `most` a range that the load decides within."""

    replicas: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UsageError(f"{self.replicas} replicas", "one at least must run")
        if self.most is not None and self.most < self.replicas:
            raise UsageError(
                f"--autoscale {self.replicas}:{self.most} ends below its beginning",
                f"the smaller number comes first: --autoscale {max(1, self.most)}:{self.replicas}",
            )

    @classmethod
    def parse(cls, replicas: int | None, autoscale: str | None) -> Scale:
        """Of `--replicas N` and `--autoscale LEAST:MOST`. N with a range is where it begins, and
        must lie in it.
        """
        if autoscale is None:
            return cls(1 if replicas is None else replicas)
        found = re.fullmatch(r"(\d+):(\d+)", autoscale)
        if found is None:
            raise UsageError(
                f"--autoscale {autoscale} is not a range of replicas", "for example 1:8"
            )
        scale = cls(int(found[1]), int(found[2]))
        if replicas is not None and not scale.replicas <= replicas <= int(found[2]):
            raise UsageError(
                f"--replicas {replicas} lies outside of --autoscale {autoscale}",
                f"begin with {scale.replicas} to {found[2]}",
            )
        return scale


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one replica."""

    cpus: int
    memory_bytes: int
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.cpus < 1 or self.memory_bytes < 1 or self.gpus < 0:
            raise UsageError(
                f"{self.cpus} CPUs, {self.memory_bytes} bytes and {self.gpus} GPUs for a replica",
                "it needs a CPU and memory at least",
            )

    @property
    def memory_gib(self) -> int:
        return -(-self.memory_bytes // GIB)


@dataclass(frozen=True, slots=True)
class Deployment:
    """
    name               of services, units and applications; RFC 1123
    flags              of `qtool serve`: parameter -> value, those that were given
    asked              what they mean
    initial_replicas   where a range begins
    tensor_parallel    devices that each layer is split over
    pipeline_parallel  devices that the layers are spread over
    """

    name: str
    facts: ModelFacts
    flags: Mapping[str, Any]
    asked: Asked
    scale: Scale
    resources: Resources
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    initial_replicas: int | None = None

    @property
    def port(self) -> int:
        return self.asked.options.port

    @property
    def served_name(self) -> str:
        return self.asked.server.served_model_names[0]

    def arguments(self, model: str, *, without: Collection[str] = (), **other: Any) -> list[str]:
        """The command line of `qtool serve` after its name; ``other`` replaces or adds values."""
        values = {name: value for name, value in self.flags.items() if name not in without}
        return [model, *command_line({**values, **other})]

    def refuse(self, target: str, reasons: Mapping[str, str]) -> None:
        """Raise UsageError where a flag was given that the target cannot honour."""
        for name, reason in reasons.items():
            if self.flags.get(name):
                flag = _option(name).opts[0]
                raise UsageError(f"--to {target} cannot honour {flag}", reason)


def given_to_serve(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """MODEL, and the flags of `qtool serve` that a command line gives: parameter -> value."""
    context = serve.make_context("qtool serve", list(arguments))
    model = context.params["model"]
    if model is None:
        raise click.MissingParameter(param_hint="'MODEL'", param_type="argument")
    flags = {
        name: value
        for name, value in context.params.items()
        if name not in ("model", "list_models", "as_json")
        and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    return model, flags


def meaning(model: str, flags: Mapping[str, Any]) -> Asked:
    """What `qtool serve MODEL` with these flags, and every default, is asked to do."""
    context = serve.make_context("qtool serve", [model, *command_line(flags)])
    values = dict(context.params)
    for name in ("model", "list_models", "as_json"):
        del values[name]
    return what_to_serve(model, **values)


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Values by parameter as flags of `qtool serve`."""
    line: list[str] = []
    for name, value in flags.items():
        option = _option(name)
        if option.is_flag:
            chosen = option.opts if value else option.secondary_opts
            line += chosen[:1]
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            line += [option.opts[0], item if isinstance(item, str) else json.dumps(item)]
    return line


def _option(name: str) -> click.Option:
    option = next(parameter for parameter in serve.params if parameter.name == name)
    assert isinstance(option, click.Option)
    return option


def needed_memory(facts: ModelFacts, asked: Asked) -> int | None:
    """Bytes for the process, the weights and the KV cache; None where the weights are unknown."""
    if facts.weight_bytes is None:
        return None
    cache = asked.engine.kv_cache_memory_bytes or max(
        int(CACHE_SHARE * facts.weight_bytes), LEAST_CACHE_BYTES
    )
    return PROCESS_BYTES + int(1.1 * facts.weight_bytes) + cache


def parse_memory(text: str) -> int:
    """ "24G", "24Gi" or a number of bytes; G is 10^9 and Gi 2^30, as Kubernetes writes them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"--memory {text} is not a size", "for example 24G or 24Gi")
    power = "KMGT".find(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def default_name(model: str) -> str:
    """The last part of a model's name as a DNS label: Qwen/Qwen3-0.6B is qwen3-0-6b."""
    last = model.rstrip("/").removesuffix(".gguf").rpartition("/")[2].rpartition(":")[2]
    label = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return label or "model"


def check_name(name: str) -> None:
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        raise UsageError(
            f"--name {name} is no name for a service",
            f"use up to {LONGEST_NAME} small letters, digits and dashes: {default_name(name)}",
        )
