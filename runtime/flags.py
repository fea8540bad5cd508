"""The command lines of other servers, in this server's flags.

Whoever has a working `vllm serve`, `llama-server` or Text Generation Inference line should be able
to keep it. Three tables: other names of what this server has; flags that change nothing here, with
the reason; flags that would change the answer and cannot be honoured, with what to do instead. A
flag in none of them is an error with a did-you-mean, as usual.

Sources: vLLM's `vllm serve --help`, old and new names; llama.cpp's `llama-server --help`;
huggingface.co/docs/text-generation-inference, "launcher arguments".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from qtool.errors import UsageError

# Another name -> ours. "MODEL" is the argument itself.
ALIASES: Mapping[str, str] = {
    "--model": "MODEL",
    "-m": "MODEL",
    "--model-id": "MODEL",
    "--hf-repo": "MODEL",
    "-hf": "MODEL",
    "--model-tag": "MODEL",
    "--max-total-tokens": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "-c": "--max-model-len",
    "--n-ctx": "--max-model-len",
    "--max-concurrent-requests": "--max-num-queued-reqs",
    "--parallel": "--max-num-seqs",
    "-np": "--max-num-seqs",
    "--alias": "--served-model-name",
    "-a": "--served-model-name",
    "--cors-allow-origin": "--allowed-origins",
    "--chat-template-file": "--chat-template",
    "--ssl-key-file": "--ssl-keyfile",
    "--ssl-cert-file": "--ssl-certfile",
    "--hostname": "--host",
    "-t": "--threads",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--disable-uvicorn-access-log": "--disable-log-requests",
    "--generation-tokens": "--max-new-tokens",
    "--n-predict": "--max-new-tokens",
    "--predict": "--max-new-tokens",
    "-n": "--max-new-tokens",
    "--spec-model": "--speculative-model",
    "--spec-tokens": "--num-speculative-tokens",
    "--num-shard": "--tensor-parallel-size",
    "--model-draft": "--speculative-model",
    "-md": "--speculative-model",
    "--draft-max": "--num-speculative-tokens",
    "--draft": "--num-speculative-tokens",
}


class Known(NamedTuple):
    """A flag of others.

    takes_value  whether a value follows
    note         what is said when it is given; "": nothing, since leaving it out is the same
    harmless     values for which it is the same after all; None: no value is refused
    """

    takes_value: bool
    note: str
    harmless: tuple[str, ...] | None = None


def _always(what: str) -> Known:
    return Known(False, f"not needed: {what}")


_AUTO = "decided here by itself"
_ONE_DEVICE = ("1",)
_REFUSED_PARALLEL = (
    "this server shares a model out among the devices of one machine by --tensor-parallel-size; "
    "for more use the same model folder with vLLM or Ray (qtool deploy)"
)
_LORA = "adapters are named by --lora-modules NAME=FOLDER, and loaded at the start"

KNOWN: Mapping[str, Known] = {
    # vLLM: what is always so here.
    "--enable-auto-tool-choice": _always("tools are offered by the model's own syntax"),
    "--enable-reasoning": _always("thoughts are split off by the model's own marks"),
    "--enable-prompt-tokens-details": _always("usage always tells cached tokens"),
    "--enable-request-id-headers": _always("answers always have an X-Request-Id"),
    "--enable-tokenizer-info-endpoint": _always("/tokenizer_info is always there"),
    "--enable-chunked-prefill": _always("long prompts are always computed in parts"),
    "--disable-log-stats": _always("counters are at /metrics and not in the log"),
    "--disable-frontend-multiprocessing": _always("this server is one process"),
    "--disable-cascade-attn": _always(_AUTO),
    "--disable-custom-all-reduce": _always("one device is used"),
    "--use-v2-block-manager": _always(_AUTO),
    "--log-requests": _always("every request has a line in the log"),
    "--enable-log-requests": _always("every request has a line in the log"),
    "--no-enable-log-requests": Known(False, "use --disable-log-requests"),
    "--swap-space": Known(True, "not needed: what does not fit is computed again"),
    "--block-size": Known(True, f"the size of KV blocks is {_AUTO}"),
    "--tokenizer-mode": Known(True, f"how the tokenizer is read is {_AUTO}"),
    "--load-format": Known(True, "not needed: the format is read from the files"),
    "--config-format": Known(True, "not needed: the format is read from the files"),
    "--distributed-executor-backend": Known(True, "ranks are processes of this machine"),
    "--compilation-config": Known(True, "nothing is compiled at the start"),
    "-O": Known(True, "nothing is compiled at the start"),
    "--max-logprobs": Known(True, "20 likeliest tokens are told at most"),
    "--max-log-len": Known(True, "prompts are not logged"),
    "--uvicorn-log-level": Known(True, "this server's log has one line a request"),
    "--guided-decoding-backend": Known(True, "grammars are llguidance's"),
    "--structured-outputs-config": Known(True, "grammars are llguidance's"),
    "--response-role": Known(True, "answers are the assistant's", ("assistant",)),
    "--task": Known(True, "this server generates text", ("generate", "auto")),
    "--runner": Known(True, "this server generates text", ("generate", "auto")),
    "--max-seq-len-to-capture": Known(True, _AUTO),
    "--cuda-graph-sizes": Known(True, _AUTO),
    "--num-scheduler-steps": Known(True, _AUTO),
    "--max-num-partial-prefills": Known(True, _AUTO),
    "--attention-backend": Known(True, _AUTO),
    "--limit-mm-per-prompt": Known(True, "only text is taken"),
    # vLLM: what cannot be honoured.
    "--pipeline-parallel-size": Known(True, _REFUSED_PARALLEL, _ONE_DEVICE),
    "-pp": Known(True, _REFUSED_PARALLEL, _ONE_DEVICE),
    "--data-parallel-size": Known(True, _REFUSED_PARALLEL, _ONE_DEVICE),
    "-dp": Known(True, _REFUSED_PARALLEL, _ONE_DEVICE),
    "--tensor-split": Known(True, _REFUSED_PARALLEL, ()),
    "--tokenizer": Known(True, "the tokenizer is the model's; put its files beside it", ()),
    "--cpu-offload-gb": Known(True, "weights stay on one device; use fewer bits", ("0", "0.0")),
    "--rope-scaling": Known(True, "set rope_scaling in the model's config.json", ()),
    "--rope-theta": Known(True, "set rope_theta in the model's config.json", ()),
    "--hf-overrides": Known(True, "change the model's config.json", ("{}",)),
    "--middleware": Known(True, "put a proxy before the server", ()),
    "--download-dir": Known(True, "set HF_HOME, which all tools read", ()),
    "--max-loras": Known(True, _LORA),
    "--max-lora-rank": Known(True, _LORA),
    "--lora": Known(True, f"{_LORA}, from folders as peft saves them", ()),
    # TGI.
    "--max-input-length": Known(True, "a prompt may fill the context up to one token"),
    "--max-input-tokens": Known(True, "a prompt may fill the context up to one token"),
    "--max-batch-prefill-tokens": Known(True, "see --max-num-batched-tokens"),
    "--max-batch-total-tokens": Known(True, "see --kv-cache-memory-bytes"),
    "--waiting-served-ratio": Known(True, _AUTO),
    "--max-best-of": Known(True, "128 answers to a prompt at most"),
    "--max-stop-sequences": Known(True, "128 stop strings at most"),
    "--validation-workers": Known(True, _AUTO),
    "--huggingface-hub-cache": Known(True, "set HF_HOME, which all tools read", ()),
    "--disable-custom-kernels": _always(_AUTO),
    # llama.cpp.
    "--batch-size": Known(True, "see --max-num-batched-tokens"),
    "-b": Known(True, "see --max-num-batched-tokens"),
    "--ubatch-size": Known(True, "see --max-num-batched-tokens"),
    "-ub": Known(True, "see --max-num-batched-tokens"),
    "--threads-batch": Known(True, "see --threads"),
    "-tb": Known(True, "see --threads"),
    "--flash-attn": Known(True, "attention never stores its scores"),
    "-fa": Known(True, "attention never stores its scores"),
    "--cont-batching": _always("requests join and leave at every step"),
    "-cb": _always("requests join and leave at every step"),
    "--jinja": _always("the model's chat template is always used"),
    "--metrics": _always("counters are at /metrics"),
    "--mlock": _always(_AUTO),
    "--no-mmap": _always(_AUTO),
    "--no-webui": Known(False, "the page at / is small and stays"),
    "--mmproj": Known(True, "only text is taken", ()),
    "--split-mode": Known(True, _REFUSED_PARALLEL, ("none",)),
    "--main-gpu": Known(True, "choose with CUDA_VISIBLE_DEVICES", ("0",)),
    "-mg": Known(True, "choose with CUDA_VISIBLE_DEVICES", ("0",)),
    "--threads-http": Known(True, _AUTO),
}


class Translation(NamedTuple):
    arguments: list[str]
    notes: list[str]


def translate(arguments: Sequence[str], own: Mapping[str, bool]) -> Translation:
    """The same command line in this server's flags.

    own  this command's flags -> whether a value follows
    """
    translated: list[str] = []
    notes: list[str] = []
    model: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            translated += [argument, *rest]
            break
        if not _is_flag(argument):
            translated.append(argument)
            continue
        written, has_value, value = argument.partition("=")
        name = written.replace("_", "-") if written.startswith("--") else written
        if name == "--config":
            # Before the others: what stands on the command line wins.
            from_file = translate(config_flags(value or _next(rest, name)), own)
            translated[:0] = from_file.arguments
            notes += from_file.notes
            continue
        name = ALIASES.get(name, name)
        if name == "MODEL":
            model.append(value if has_value else _next(rest, written))
            continue
        if name == "--max-model-len" and name in own:
            value = value if has_value else _next(rest, written)
            # llama.cpp's 0 and vLLM's auto: what the model was made for.
            translated += [] if value in ("0", "auto", "-1") else [name, value]
            continue
        if name in own:
            translated.append(f"{name}={value}" if has_value else name)
            if own[name] and not has_value:
                translated.append(_next(rest, written))
            continue
        if name in KNOWN:
            known = KNOWN[name]
            taken = value if has_value else _value(name, known, rest)
            notes += _note(written, taken, known)
            continue
        translated.append(argument)
    return Translation([*model, *translated], notes)


def _is_flag(argument: str) -> bool:
    return len(argument) > 1 and argument[0] == "-" and not argument[1].isdigit()


def _next(rest: Iterator[str], name: str) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{name} needs a value")
    return value


def _value(name: str, known: Known, rest: Iterator[str]) -> str | None:
    if not known.takes_value:
        return None
    return _next(rest, name)


def _note(written: str, value: str | None, known: Known) -> list[str]:
    shown = written if value is None else f"{written} {value}"
    if known.harmless is None:
        return [f"{shown}: {known.note}"]
    if value is not None and value in known.harmless:
        return []
    raise UsageError(f"{shown} cannot be honoured", known.note)


def config_flags(path: str) -> list[str]:
    """The flags of a YAML file, as vLLM's --config takes them: names without dashes."""
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"--config {path} must hold names of flags and their values")
    flags: list[str] = []
    for key, value in document.items():
        name = f"--{str(key).replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                flags.append(name)
            elif item is False:
                flags.append(f"--no-{name[2:]}")
            elif item is not None:
                text = json.dumps(item) if isinstance(item, dict) else str(item)
                flags.append(f"{name}={text}")
    return flags


class ServeCommand(click.Command):
    """A command that understands the flags of other servers."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {
            name: not (parameter.is_flag or parameter.count)
            for parameter in self.params
            if isinstance(parameter, click.Option)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        translation = translate(args, {**own, "--help": False, "-h": False})
        for note in translation.notes:
            click.echo(note, err=True)
        return super().parse_args(ctx, translation.arguments)
