"""The ``qtool`` command: names the subcommands, loads each on use, and turns a QtoolError into
text and an exit code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from qtool import __version__
from qtool.errors import QtoolError, closest
from qtool.settings import share_the_machine

# command -> (module:object, one line of help). The module is imported only when its command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "quantize": ("qtool.quantize.command:quantize", "Quantize a model to int4 or int8."),
    "convert": ("qtool.convert.command:convert", "Convert between GGUF, Marlin, GPTQ, AWQ, ..."),
    "imatrix": ("qtool.convert.imatrix_command:imatrix", "Measure input importance, for GGUF."),
    "eval": (
        "qtool.runtime.evaluate.command:evaluate",
        "Perplexity and KL divergence, as a report.",
    ),
    "serve": ("qtool.runtime.command:serve", "Serve a model with an OpenAI-compatible API."),
    "chat": ("qtool.runtime.command:chat", "Chat with a model in the terminal."),
    "run": ("qtool.runtime.model_commands:run", "Answer one prompt, or what is piped in."),
    "run-batch": ("qtool.runtime.batch_command:run_batch", "Answer a file of OpenAI requests."),
    "pull": ("qtool.runtime.model_commands:pull", "Download a model from the Hub."),
    "list": ("qtool.runtime.model_commands:list_models", "List the models on this machine."),
    "show": ("qtool.runtime.model_commands:show", "Show what a model is made of."),
    "create": ("qtool.runtime.model_commands:create", "Make a model from a Modelfile."),
    "cp": ("qtool.runtime.model_commands:cp", "Give a model another name."),
    "rm": ("qtool.runtime.model_commands:rm", "Remove a name or a download."),
    "ps": ("qtool.runtime.model_commands:ps", "Show the models that a server holds."),
    "bench": ("qtool.runtime.bench.command:bench", "Measure speed, of models and of servers."),
    "deploy": ("qtool.runtime.deploy.command:deploy", "Serve on Ray, vLLM, k8s, compose, systemd."),
    "plan": ("qtool.runtime.plan.command:plan", "What a model takes: memory, GPUs, replicas."),
    "inspect": ("qtool.convert.inspect_command:inspect", "What a model file or folder holds."),
    "verify": ("qtool.verify_command:verify", "Check an artifact against its manifest."),
    "push": ("qtool.push_command:push", "Upload an artifact to the Hub."),
    "demo": ("qtool.runtime.demo:demo", "Run the whole product on the bundled model."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are imported on use, so that --help stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            guess = closest(args[0], COMMANDS)
            hint = f" Did you mean {guess}?" if guess else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


EPILOG = """\b
Examples:
  qtool quantize Qwen/Qwen3-0.6B --recipe int4
  qtool convert ./Qwen3-0.6B-int4 --to gguf
  qtool eval ./Qwen3-0.6B-int4 --against Qwen/Qwen3-0.6B
  qtool serve ./Qwen3-0.6B-int4

A MODEL is a folder, a .gguf file, a Hub id, or builtin:books-7m."""


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="qtool")
def qtool() -> None:
    """Take a language model from the Hub to production: quantize, convert, prove what was lost,
    serve.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted."""
    share_the_machine()
    try:
        qtool.main(args=arguments, prog_name="qtool", standalone_mode=False)
    except QtoolError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone, as in `qtool ... | head`.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print_error(QtoolError(f"{error.strerror or error}{where}"))
        sys.exit(1)


def print_error(error: QtoolError) -> None:
    click.echo(f"Error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


if __name__ == "__main__":
    main()
