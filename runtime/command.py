"""`qtool serve` and `qtool chat`: the flags and their checks. Names and aliases are vLLM's.

What loads torch or the web stack is imported inside the commands, so that --help stays instant.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

import click

from qtool.errors import UsageError
from qtool.runtime.config import (
    TARGET_ITL_MS,
    WAITING_PER_RUNNING,
    Device,
    Dtype,
    EngineConfig,
    GpuLayers,
    KvCacheDtype,
    LmHead,
    SchedulingPolicy,
)
from qtool.runtime.engine.speculative_config import SpeculativeConfig
from qtool.runtime.flags import ServeCommand
from qtool.runtime.server_options import (
    SERVER_FLAGS,
    json_object,
    server_config,
    server_options,
)
from qtool.runtime.store import store
from qtool.settings import Activations, settings

if TYPE_CHECKING:
    from qtool.runtime.server.chat_backends import ChatBackend
    from qtool.runtime.server.config import ServerConfig
    from qtool.runtime.server.launch_options import LaunchOptions

F = TypeVar("F", bound=Callable[..., Any])

DTYPE_ALIASES = {"half": "float16", "float": "float32"}
URL_SCHEMES = ("http://", "https://")


def default_of(name: str) -> Any:
    # A slotted dataclass keeps its defaults in its fields, not on the class.
    return EngineConfig.__dataclass_fields__[name].default


def _gpu_layers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> GpuLayers | None:
    if value is None or value == "auto" or value == "all":
        return value  # type: ignore[return-value]
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value} is neither a number nor auto or all") from None


ENGINE_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice([*get_args(Dtype), *DTYPE_ALIASES]),
        default=default_of("dtype"),
        show_default=True,
        help="Type of activations, and of weights that are not quantized.",
    ),
    click.option(
        "--device",
        type=click.Choice(get_args(Device)),
        default=default_of("device"),
        show_default=True,
    ),
    click.option(
        "--max-model-len",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Longest prompt plus answer.  [default: what the model was made for]",
    ),
    click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="SHARE",
        help="Of the GPU's memory, or of the memory free at the start on a CPU: for weights and KV "
        "cache together.  [default on a CPU: a quarter of what the weights leave]",
    ),
    click.option(
        "--kv-cache-memory-bytes",
        type=click.IntRange(min=1),
        metavar="BYTES",
        help="Size of the KV cache, exactly.  [default: by the memory's share]",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(get_args(KvCacheDtype)),
        default=default_of("kv_cache_dtype"),
        show_default=True,
        help="int8: nearly twice the tokens in the same memory; fp8: on a GPU, twice.",
    ),
    click.option(
        "--activations",
        type=click.Choice(get_args(Activations)),
        help="int8: quantized layers on a CPU round their inputs to 8 bits and multiply whole "
        "numbers; bf16: they do not.  [default: int8 where inputs are in bfloat16]",
    ),
    click.option(
        "--lm-head",
        type=click.Choice(get_args(LmHead)),
        default=default_of("lm_head"),
        show_default=True,
        help="Round a head that is stored in floating point; auto: int8 beside layers that round "
        "their inputs to 8 bits.",
    ),
    click.option(
        "--cache-packed",
        is_flag=True,
        help="Keep the form that the kernels read in a file beside the model, and map it at the "
        "next start.",
    ),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=default_of("enable_prefix_caching"),
        show_default=True,
        help="Compute the beginning that prompts share once.",
    ),
    click.option(
        "--speculative-config",
        metavar="JSON",
        help='Guess tokens ahead, e.g. \'{"method": "ngram", "num_speculative_tokens": 4}\'; the '
        "text stays the same.  [default: do not]",
    ),
    click.option(
        "--speculative-model",
        metavar="MODEL",
        help="A smaller model of the same family to guess by, or [ngram].",
    ),
    click.option(
        "--num-speculative-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Guesses for each token, at most.",
    ),
    click.option(
        "--lora-modules",
        multiple=True,
        metavar="NAME=FOLDER",
        help="A LoRA adapter, which clients call by its name as a model; repeat for several.",
    ),
    click.option(
        "--enable-lora",
        is_flag=True,
        help="Take adapters later, too, as names made with one bring it.",
    ),
    click.option(
        "--tensor-parallel-size",
        "-tp",
        type=click.IntRange(min=1),
        default=default_of("tensor_parallel_size"),
        show_default=True,
        metavar="N",
        help="Share the model out among N GPUs of this machine, or N processes on a CPU.",
    ),
    click.option(
        "--distributed-timeout-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=default_of("distributed_timeout_seconds"),
        show_default=True,
        metavar="SECONDS",
        help="How long a rank may not be heard of before the service ends.",
    ),
    click.option(
        "--n-gpu-layers",
        "-ngl",
        "--gpu-layers",
        callback=_gpu_layers,
        metavar="N",
        help="Layers on the GPU, the last ones, the head being one; the others are on the CPU. "
        "auto: as many as fit; -1, all.  [default: as --device says]",
    ),
    click.option(
        "--enforce-eager", is_flag=True, help="On a GPU: launch every kernel, record no steps."
    ),
    click.option(
        "--async-scheduling/--no-async-scheduling",
        default=default_of("async_scheduling"),
        show_default=True,
        help="On a GPU: launch a step before the tokens of the one before it are read.",
    ),
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
)


def engine_options(command: F) -> F:
    """What both commands say about loading and running a model."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


@click.command(cls=ServeCommand)
@click.argument("model", required=False)
@click.option("--list-models", is_flag=True, help="Print the families that can be served.")
@click.option("--json", "as_json", is_flag=True, help="Print that list as JSON.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every interface.")
@click.option("--port", type=int, default=8000, show_default=True, help="0: a free one.")
@engine_options
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=default_of("max_num_seqs"),
    show_default=True,
    help="Sequences in one step.",
)
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(min=1),
    default=default_of("max_num_batched_tokens"),
    show_default=True,
    help="Tokens in one step, prompts and answers together.",
)
@click.option(
    "--max-num-queued-reqs",
    type=click.IntRange(min=0),
    help=f"Waiting sequences; above it 429.  [default: {WAITING_PER_RUNNING} x --max-num-seqs]",
)
@click.option(
    "--scheduling-policy",
    type=click.Choice(get_args(SchedulingPolicy)),
    default=default_of("scheduling_policy"),
    show_default=True,
    help="First come, first served, or by the requests' priority, lower first.",
)
@click.option(
    "--target-itl-ms",
    type=click.FloatRange(min=0),
    metavar="MS",
    help="Longest step beside which others decode; 0: no bound.  "
    f"[default: {TARGET_ITL_MS['cpu']:g} on a CPU, {TARGET_ITL_MS['cuda']:g} on a GPU]",
)
@click.option(
    "--seed",
    type=int,
    default=default_of("seed"),
    show_default=True,
    help="What requests without a seed of their own are sampled from.",
)
@server_options
# Read from the files: accepted so that other servers' command lines work.
@click.option("--quantization", "-q", hidden=True)
def serve(model: str | None, list_models: bool, as_json: bool, **flags: Any) -> None:
    """Serve MODEL with an OpenAI-compatible API.

    MODEL is a folder, a .gguf file, a Hub id, or builtin:books-7m.

    \b
    Examples:
      qtool serve builtin:books-7m
      qtool serve ./Qwen3-0.6B-int4 --host 0.0.0.0 --port 8080
      qtool serve ./Llama-3.1-70B-int4 --tensor-parallel-size 4
      curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "Call me"}'
    """
    if list_models:
        from qtool.runtime.list_models import print_families

        print_families(as_json=as_json)
        return
    if model is None:
        raise click.MissingParameter(param_hint="'MODEL'", param_type="argument")
    asked = what_to_serve(model, **flags)
    from qtool.runtime.server.launch import launch

    launch(asked.engine, asked.server, asked.options)


class Asked(NamedTuple):
    """The command line of `qtool serve` as values."""

    engine: EngineConfig
    server: ServerConfig
    options: LaunchOptions


def what_to_serve(
    model: str,
    *,
    host: str,
    port: int,
    uds: str | None,
    max_num_queued_reqs: int | None,
    chat_template: str | None,
    generation_config: str,
    override_generation_config: str | None,
    max_new_tokens: int | None,
    log_format: str,
    threads: int | None,
    quantization: str | None,
    **flags: Any,
) -> Asked:
    """What the flags of `qtool serve MODEL` mean; nothing of the model is read."""
    made = store().find(model)
    if made is not None:
        chat_template = chat_template or made.template
        flags["max_model_len"] = flags["max_model_len"] or made.parameters.get("num_ctx")
    overrides = {
        **(made.sampling if made else {}),
        **json_object(override_generation_config, "--override-generation-config"),
    }
    if max_new_tokens is not None and max_new_tokens > 0:
        overrides["max_new_tokens"] = max_new_tokens
    from qtool.runtime.server.launch_options import LaunchOptions
    from qtool.runtime.server.made_models import with_adapter

    server_flags = {name: flags.pop(name) for name in SERVER_FLAGS if name in flags}
    base = made.base if made else model
    engine = with_adapter(engine_config(base, max_num_waiting=max_num_queued_reqs, **flags), made)
    server = server_config(
        model,
        made,
        max_running=engine.max_num_seqs,
        max_queued=engine.num_waiting_limit,
        **server_flags,
    )
    options = LaunchOptions(
        host=host,
        port=port,
        uds=uds,
        use_generation_config=generation_config == "auto",
        generation_overrides=overrides,
        chat_template=chat_template,
        quantization=quantization,
        threads=threads,
        log_as_json=log_format == "json",
    )
    return Asked(engine, server, options)


@click.command()
@click.argument("model_or_url", metavar="MODEL_OR_URL")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0: always the likeliest token.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--seed", type=int, help="Makes the answers repeatable.")
@engine_options
@click.option(
    "--model", "model_name", metavar="NAME", help="Which model of a server.  [default: its first]"
)
@click.option("--api-key", metavar="KEY", help="The server's key.")
def chat(
    model_or_url: str,
    system: str | None,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
    model_name: str | None,
    api_key: str | None,
    **engine_flags: Any,
) -> None:
    """Chat in the terminal with a model, or with a server at a URL.

    Answers go to stdout. From a pipe, each line is a message.

    \b
    Examples:
      qtool chat builtin:books-7m
      qtool chat http://127.0.0.1:8000
      echo "Tell me a story." | qtool chat ./Qwen3-0.6B-int4 --temperature 0
    """
    sampling = {
        name: value
        for name, value in (
            ("temperature", temperature),
            ("top_p", top_p),
            ("max_tokens", max_tokens),
            ("seed", seed),
        )
        if value is not None
    }
    is_url = model_or_url.startswith(URL_SCHEMES)
    backend: ChatBackend
    if is_url:
        from qtool.runtime.server.chat_remote import RemoteChat

        backend = RemoteChat(model_or_url, model=model_name, api_key=api_key or settings().api_key)
    else:
        if model_name is not None or api_key is not None:
            raise UsageError(
                "--model and --api-key are for a server's URL",
                f"{model_or_url} is run in this process",
            )
        made = store().find(model_or_url)
        base = made.base if made else model_or_url
        config = engine_config(base, max_num_seqs=1, **engine_flags)
        from qtool.runtime.server.chat_local import LocalChat
        from qtool.runtime.server.made_models import with_adapter

        backend = LocalChat(with_adapter(config, made), made)
    from qtool.runtime.server.chat import Terminal

    with closing(backend):
        terminal = Terminal(backend, sampling, system=system)
        terminal.run()
    if terminal.failed and not terminal.is_interactive:
        raise SystemExit(1)


def engine_config(
    model: str,
    *,
    dtype: str,
    speculative_config: str | None = None,
    speculative_model: str | None = None,
    num_speculative_tokens: int | None = None,
    **flags: Any,
) -> EngineConfig:
    return EngineConfig(
        model,
        dtype=DTYPE_ALIASES.get(dtype, dtype),  # type: ignore[arg-type]
        speculative_config=_speculation(
            speculative_config, speculative_model, num_speculative_tokens
        ),
        **flags,
    )


def _speculation(
    config: str | None, model: str | None, num_tokens: int | None
) -> SpeculativeConfig | None:
    """vLLM's one flag, or its two older ones."""
    if config is not None:
        if model is not None or num_tokens is not None:
            raise UsageError(
                "--speculative-config says it all",
                "leave --speculative-model and --num-speculative-tokens out, or use them alone",
            )
        return SpeculativeConfig.parse(config)
    if model is None:
        if num_tokens is not None:
            raise UsageError(
                "--num-speculative-tokens needs to know what to guess by",
                "add --speculative-model MODEL or --speculative-model '[ngram]'",
            )
        return None
    asked = {"model": model} | (
        {} if num_tokens is None else {"num_speculative_tokens": num_tokens}
    )
    return SpeculativeConfig.parse(asked)
