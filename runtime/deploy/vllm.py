"""`--to vllm`: the command that serves the same artifact with vLLM.

The flags of `qtool serve` have vLLM's names, so most go over as they are; `FLAGS` says for each
one what becomes of it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qtool.errors import UsageError
from qtool.runtime.deploy.deployment import GIB, Deployment, command_line
from qtool.runtime.deploy.sizes import check_split
from qtool.runtime.deploy.vllm_formats import cure, why_not
from qtool.runtime.deploy.vllm_installed import Installed, version_of
from qtool.runtime.engine.speculative_config import SpeculativeConfig

CHECKED_VERSION = "0.32"


@dataclass(frozen=True, slots=True)
class Launch:
    """A command, the variables to set for it, and what was left out or changed, and why."""

    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def shown(self, *, with_keys: bool = True) -> str:
        """As one would type it; for a log, which others read, without keys."""
        words = [
            f"{name}={shlex.quote(value) if with_keys or not name.endswith('_KEY') else '...'}"
            for name, value in self.variables.items()
        ]
        return " ".join([*words, shlex.join(self.command)])


class Becomes(NamedTuple):
    """What a flag of `qtool serve` is for vLLM.

    flag     vLLM's; None: left out
    because  said when it is left out
    refused  it would change the answers, and is an error
    """

    flag: str | None = None
    because: str = ""
    refused: bool = False


SAME = Becomes("same")
_PAGE = "vLLM's server has no such thing"

FLAGS: Mapping[str, Becomes] = {
    **dict.fromkeys(
        (
            "host",
            "port",
            "uds",
            "root_path",
            "ssl_keyfile",
            "ssl_certfile",
            "ssl_ca_certs",
            "ssl_cert_reqs",
            "allowed_methods",
            "allowed_headers",
            "allow_credentials",
            "chat_template",
            "seed",
            "default_chat_template_kwargs",
            "trust_request_chat_template",
            "tool_call_parser",
            "reasoning_parser",
            "generation_config",
            "override_generation_config",
            "shutdown_timeout",
            "sse_keep_alive_interval",
            "dtype",
            "max_model_len",
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "enable_prefix_caching",
            "revision",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_queued_reqs",
            "scheduling_policy",
            "quantization",
            "enable_lora",
            "enforce_eager",
            "async_scheduling",
        ),
        SAME,
    ),
    "api_key": Becomes(because="it goes to VLLM_API_KEY, where other users do not see it"),
    "api_key_file": Becomes(because="it goes to VLLM_API_KEY, where other users do not see it"),
    "served_model_name": Becomes("--served-model-name"),
    "lora_modules": Becomes("--lora-modules"),
    "allowed_origins": Becomes("--allowed-origins"),
    "kv_cache_dtype": Becomes("--kv-cache-dtype"),
    "speculative_config": Becomes("--speculative-config"),
    "disable_log_requests": Becomes(because="vLLM logs no requests unless it is asked to"),
    "device": Becomes(because="a build of vLLM has one kind of device"),
    "threads": Becomes(because="it goes to OMP_NUM_THREADS"),
    "activations": Becomes(because="vLLM keeps activations as the model's format says"),
    "lm_head": Becomes(because="vLLM keeps the head as it is stored"),
    "target_itl_ms": Becomes(because="vLLM bounds a step by --max-num-batched-tokens"),
    "max_client_reqs": Becomes(because=_PAGE),
    "request_timeout": Becomes(because=_PAGE),
    "log_format": Becomes(because="vLLM's log is text"),
    "speculative_model": Becomes("--speculative-config"),
    "num_speculative_tokens": Becomes(because="it is in --speculative-config"),
    "keep_alive": Becomes(because="vLLM serves one model, loaded all the time"),
    "max_loaded_models": Becomes(because="vLLM serves one model, loaded all the time"),
    "max_loaded_bytes": Becomes(because="vLLM serves one model, loaded all the time"),
    "distributed_timeout_seconds": Becomes(because="vLLM's workers have a timeout of their own"),
    "n_gpu_layers": Becomes(
        because="vLLM keeps all layers on its device (--cpu-offload-gb is its own)", refused=True
    ),
    "cache_packed": Becomes(because="vLLM packs weights on every start"),
    "also_serve": Becomes(because="vLLM serves one model", refused=True),
    "ssl_keyfile_password": Becomes(because="vLLM reads no password", refused=True),
    "max_new_tokens": Becomes("--override-generation-config"),
}


def check(deployment: Deployment, vllm: Installed) -> None:
    """Raise UsageError where this vLLM cannot do what is asked, before it is started."""
    facts = deployment.facts
    if found := why_not(facts, vllm):
        raise UsageError(f"{facts.name}: {found}", cure(facts, vllm))
    check_split(facts, deployment.tensor_parallel, deployment.pipeline_parallel, evenly=True)
    if deployment.scale.replicas > 1 or deployment.scale.most is not None:
        raise UsageError(
            f"--to vllm starts one server, not {deployment.scale.replicas} replicas",
            "vLLM's own --data-parallel-size runs several engines behind one server, or start "
            "several behind a proxy",
        )


def plan(deployment: Deployment, vllm: Installed, extra: Sequence[str] = ()) -> Launch:
    """The command line of vLLM for a deployment; extra: flags of vLLM's own, at its end."""
    facts, asked = deployment.facts, deployment.asked
    model = str(facts.path) if facts.path is not None else facts.name
    line: list[str] = []
    notes: list[str] = []
    values = dict(deployment.flags)
    for name, value in values.items():
        becomes = FLAGS.get(name, SAME)  # a new one: vLLM refuses what it does not know
        written = command_line({name: value})
        if becomes.refused:
            raise UsageError(f"--to vllm cannot honour {written[0]}", becomes.because)
        if becomes is SAME:
            line += written
        elif becomes.flag is None:
            notes.append(f"{written[0]} is left out: {becomes.because}")
    line += _changed(deployment)
    if deployment.tensor_parallel > 1:
        line += ["--tensor-parallel-size", str(deployment.tensor_parallel)]
    if deployment.pipeline_parallel > 1:
        line += ["--pipeline-parallel-size", str(deployment.pipeline_parallel)]
    if "host" not in values:
        line += ["--host", asked.options.host]
    variables: dict[str, str] = {}
    if asked.server.api_keys:
        if len(asked.server.api_keys) > 1:
            raise UsageError(
                f"{len(asked.server.api_keys)} API keys: VLLM_API_KEY holds one", "pass one"
            )
        variables["VLLM_API_KEY"] = asked.server.api_keys[0]
    if vllm.is_cpu:
        variables |= _cpu_variables(deployment)
    if version_of(vllm.version)[:2] != version_of(CHECKED_VERSION):
        notes.append(f"vLLM {vllm.version}: the flags were checked with {CHECKED_VERSION}")
    return Launch((*vllm.server(model), *line, *extra), variables, tuple(notes))


def _changed(deployment: Deployment) -> list[str]:
    """Flags that vLLM has under another name or in another form.

    Where `qtool serve` takes a flag several times, vLLM takes several values after one.
    """
    server, engine, flags = deployment.asked.server, deployment.asked.engine, deployment.flags
    # Clients keep the names that `qtool serve` answers to, whatever path vLLM is given.
    names = server.served_model_names if "served_model_name" in flags else ()
    line = ["--served-model-name", *(names or server.accepted_model_names)]
    if engine.lora_modules:
        line += ["--lora-modules", *(f"{name}={folder}" for name, folder in engine.lora_modules)]
        line += [] if "enable_lora" in flags else ["--enable-lora"]
    if server.allowed_origins:
        line += ["--allowed-origins", json.dumps(list(server.allowed_origins))]
    if engine.speculative_config is not None:
        line += ["--speculative-config", json.dumps(_speculation(engine.speculative_config))]
    if engine.kv_cache_dtype == "int8":
        line += ["--kv-cache-dtype", "int8_per_token_head"]
    if flags.get("max_new_tokens", 0) > 0 and "override_generation_config" not in flags:
        override = {"max_new_tokens": flags["max_new_tokens"]}
        line += ["--override-generation-config", json.dumps(override)]
    return line


def _speculation(config: SpeculativeConfig) -> dict[str, object]:
    guesses = {"num_speculative_tokens": config.num_speculative_tokens}
    if config.model is None:
        lookup = {
            "prompt_lookup_max": config.prompt_lookup_max,
            "prompt_lookup_min": config.prompt_lookup_min,
        }
        return {"method": "ngram", **guesses, **lookup}
    return {"method": "draft_model", "model": config.model, **guesses}


def _cpu_variables(deployment: Deployment) -> dict[str, str]:
    """vLLM on CPUs takes its cache's size, in whole GiB, and its threads from the environment. Left
    to itself it keeps one core free, which on two cores is half of the machine.
    """
    cache = deployment.asked.engine.kv_cache_memory_bytes or GIB
    threads = deployment.asked.options.threads or deployment.resources.cpus
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-cache // GIB))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }
