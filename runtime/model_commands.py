"""`qtool pull`, `list`, `show`, `rm`, `cp`, `create`, `ps` and `run`: Ollama's ease of handling
models, over Hugging Face's cache and a small store of names.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from qtool.errors import QtoolError, UsageError
from qtool.progress import console
from qtool.runtime.modelfile import Modelfile, parse_modelfile
from qtool.runtime.store import Listed, downloaded, forget_download, store
from qtool.settings import settings
from qtool.units import size_text

SERVER = "http://127.0.0.1:8000"


@click.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
def pull(model: str, revision: str | None) -> None:
    """Download MODEL from the Hub into Hugging Face's cache, for use without a network.

    \b
    Example:
      qtool pull Qwen/Qwen3-0.6B
    """
    from qtool.source import resolve

    found = store().find(model)
    source = resolve(found.base if found else model, revision)
    click.echo(str(source.path))


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One object a model.")
def list_models(as_json: bool) -> None:
    """List the models on this machine: names made here, and downloads.

    \b
    Examples:
      qtool list
      qtool list --json
    """
    entries = [*store().listed(), *downloaded()]
    if as_json:
        import orjson

        click.echo(orjson.dumps([entry._asdict() for entry in entries]).decode())
        return
    if not entries:
        console.print("no models yet: try `qtool pull Qwen/Qwen3-0.6B`", highlight=False)
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        click.echo(
            f"{entry.name:<{width}}  {_size(entry):>9}  {_age(entry):>12}  {entry.made_from}"
        )


def _size(entry: Listed) -> str:
    return "-" if entry.num_bytes is None else size_text(entry.num_bytes)


def _age(entry: Listed) -> str:
    days = (datetime.now(UTC) - entry.modified).days
    return "today" if days < 1 else f"{days} days ago" if days > 1 else "yesterday"


@click.command()
@click.argument("model")
@click.option("--modelfile", is_flag=True, help="The Modelfile alone.")
def show(model: str, modelfile: bool) -> None:
    """Show what MODEL is made of.

    \b
    Examples:
      qtool show captain
      qtool show captain --modelfile > Modelfile
    """
    found = store().find(model)
    if found is not None and modelfile:
        click.echo(found.text(), nl=False)
        return
    from qtool.source import resolve

    # Nothing is printed of a model that is not there.
    made = found or Modelfile(base=model)
    source = resolve(made.base)
    click.echo(made.text(), nl=False)
    if modelfile:
        return
    console.print(
        f"at {source.path}; `qtool inspect {made.base}` shows its tensors", highlight=False
    )


@click.command()
@click.argument("models", nargs=-1, required=True)
def rm(models: tuple[str, ...]) -> None:
    """Remove MODELS: names made here, or downloads.

    \b
    Example:
      qtool rm captain Qwen/Qwen3-0.6B
    """
    for model in models:
        if store().remove(model):
            click.echo(f"{model}: the name is removed; what it was made from stays")
        else:
            click.echo(f"{model}: {size_text(forget_download(model))} are free again")


@click.command()
@click.argument("source")
@click.argument("name")
def cp(source: str, name: str) -> None:
    """Give the model SOURCE another NAME.

    \b
    Example:
      qtool cp captain mate
    """
    made = store().find(source)
    if made is None:
        from qtool.source import resolve

        # A name for nothing is not kept.
        resolve(source, config_only=True)
        made = Modelfile(base=_beside(Path(), source))
    store().keep(name, made)
    click.echo(f"{name}: made from {source}")


@click.command()
@click.argument("name")
@click.option(
    "-f", "--file", "path", type=click.Path(dir_okay=False), default="Modelfile", show_default=True
)
def create(name: str, path: str) -> None:
    """Make NAME from a Modelfile: a model with a system prompt and values of its own.

    \b
    Example:
      qtool create captain -f Modelfile
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "name it with -f FILE") from None
    made = parse_modelfile(text, path)
    # Relative to the Modelfile, as it was written, and not to where it will be used.
    folder = Path(path).parent
    made = replace(made, base=_beside(folder, made.base))
    if made.adapter is not None:
        made = replace(made, adapter=_beside(folder, made.adapter))
        if not Path(made.adapter or "").is_dir():
            raise UsageError(f"{path}: ADAPTER {made.adapter} is no folder as peft writes it")
    store().keep(name, made)
    click.echo(f"{name}: made from {made.base}; try: qtool run {name}")


def _beside(folder: Path, written: str) -> str:
    path = Path(written).expanduser()
    beside = folder / path
    return str(beside.resolve()) if not path.is_absolute() and beside.exists() else written


@click.command()
@click.option("--server", default=SERVER, show_default=True, metavar="URL")
@click.option("--api-key", metavar="KEY", help="The server's key.  [default: $QTOOL_API_KEY]")
def ps(server: str, api_key: str | None) -> None:
    """Show the models that a running server holds.

    \b
    Example:
      qtool ps --server http://127.0.0.1:8000
    """
    import httpx

    key = api_key or settings().api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        response = httpx.get(f"{server.rstrip('/')}/api/ps", headers=headers, timeout=10)
        if response.status_code == 401:
            raise QtoolError(
                f"the server at {server} asks for a key"
                if key is None
                else f"the server at {server} does not know this key",
                "pass the server's key with --api-key",
            )
        response.raise_for_status()
        models = response.json()["models"]
    except (httpx.HTTPError, ValueError, KeyError):
        raise QtoolError(
            f"no qtool server answers at {server}", "start one with: qtool serve MODEL"
        ) from None
    for model in models:
        click.echo(f"{model['name']}  {size_text(model['size'])}  {model['context_length']} tokens")


@click.command()
@click.argument("model", required=False)
@click.argument("prompt", nargs=-1)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(min=0))
@click.option("--seed", type=int)
@click.option(
    "--chat-template", metavar="TEMPLATE", help="A file, a template, or a name such as llama3."
)
# llama-cli's names, so that its command lines work.
@click.option("-m", "--model", "model_option", hidden=True)
@click.option("-p", "--prompt", "prompt_option", hidden=True)
@click.pass_context
def run(
    context: click.Context,
    /,
    model: str | None,
    prompt: tuple[str, ...],
    model_option: str | None,
    prompt_option: str | None,
    chat_template: str | None,
    **options: Any,
) -> None:
    """Answer PROMPT with MODEL and end; what is piped in is part of the question.

    Without a prompt on a terminal, this is `qtool chat`.

    \b
    Examples:
      qtool run builtin:books-7m "Tell me a story."
      git diff | qtool run ./Qwen3-0.6B-int4 "Describe this change."
      qtool run -m Llama-3.gguf --chat-template llama3 -n 200 -p "Why is the sky blue?"
    """
    from qtool.runtime.command import chat

    if model_option is not None:
        # What stands first is then the prompt's first word.
        model, prompt = model_option, (*([] if model is None else [model]), *prompt)
    if model is None:
        raise click.MissingParameter(param_hint="'MODEL'", param_type="argument")
    words = " ".join(prompt) or (prompt_option or "")
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    question = "\n\n".join(part for part in (words, piped.strip()) if part)
    if not question:
        if not sys.stdin.isatty():
            raise UsageError("there is nothing to answer", "give a prompt, or pipe one in")
        context.invoke(chat, model_or_url=model, **options)
        return
    from qtool.runtime.config import EngineConfig
    from qtool.runtime.server.chat_backends import AnswerEnd
    from qtool.runtime.server.chat_local import LocalChat
    from qtool.runtime.server.made_models import with_adapter

    sampling = {
        name: value for name, value in options.items() if name != "system" and value is not None
    }
    made = store().find(model)
    if chat_template is not None:
        made = replace(made or Modelfile(model), template=chat_template)
    config = EngineConfig(made.base if made else model, max_num_seqs=1)
    backend = LocalChat(with_adapter(config, made), made)
    try:
        system = [{"role": "system", "content": options["system"]}] if options["system"] else []
        messages = [*system, {"role": "user", "content": question}]
        for part in backend.answer(messages, sampling):
            if not isinstance(part, AnswerEnd):
                click.echo(part, nl=False)
        click.echo()
    finally:
        backend.close()
