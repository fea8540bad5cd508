"""`qtool demo`: the whole product on the bundled model, in one command and a few minutes.

    quantize to int4 -> convert to GGUF and Marlin -> evaluate all -> serve and chat -> one table

Each step is the one that its own command runs, on real weights, and the demo succeeds only if all
of them do. Its folder is replaced by the next run; a folder that something else made is left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.errors import QtoolError, UsageError

if TYPE_CHECKING:
    from qtool.runtime.evaluate.report import EvaluationReport

MODEL = "builtin:books-7m"
RECIPE = "int4"
# The file that says a folder is the demo's own.
MARKER = "qtool-demo.json"
# A quarter of the recipe's own: half a minute in place of two, and nearly the same errors.
CALIBRATION_SAMPLES = 32
# 16 windows of 512, on four models: some ten seconds on two cores, a KL divergence within 4 %.
EVALUATION_TOKENS = 8192
QUESTION = "What did the old sailor see from the window of the inn?"
ANSWER_TOKENS = 60

INT4, MARLIN, GGUF = "books-7m-int4", "books-7m-int4-marlin", "books-7m-Q4_K_M.gguf"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("qtool-demo"),
    show_default=True,
    help="Folder for the models and the report; the demo replaces only what it made itself.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(out: Path, as_json: bool) -> None:
    """Quantize, convert, evaluate and serve the bundled model, and print one table.

    Needs no network and no GPU; takes a few minutes on two cores.

    \b
    Example:
      qtool demo --out ./demo
    """
    from qtool.json_files import write_json
    from qtool.output import OutputFolder

    refuse_foreign_folder(out)
    started = time.monotonic()
    with OutputFolder(out, force=True) as stage, one_thread():
        report, answer = run_demo(stage.path, out, show_answer=not as_json)
        seconds = time.monotonic() - started
        results = summary(report, answer, seconds)
        write_json(stage.path / MARKER, results)
    if as_json:
        click.echo(json.dumps({**results, "folder": str(out)}, allow_nan=False))
    else:
        print_table(report, out, seconds)


def refuse_foreign_folder(out: Path) -> None:
    """Raise unless the path is free, an empty folder, or an earlier demo."""
    if not out.exists():
        return
    if out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir())):
        return
    raise UsageError(
        f"{out} exists and is not an earlier demo, so it is left alone",
        "name another folder with --out",
    )


def run_demo(folder: Path, out: Path, *, show_answer: bool) -> tuple[EvaluationReport, str]:
    """All steps, their results in `folder`, which will be `out` when all is done; returns the
    evaluation and the streamed answer.
    """
    from qtool.convert.run import convert_model
    from qtool.quantize.pipeline import quantize_model
    from qtool.recipe import load_recipe
    from qtool.runtime.evaluate.run import evaluate, write_report
    from qtool.source import Source

    # Named as they will be found, so that no manifest or report speaks of the folder in the making.
    int4, marlin, gguf = (Source(str(out / name), folder / name) for name in (INT4, MARLIN, GGUF))
    recipe = load_recipe(RECIPE).with_options(num_samples=CALIBRATION_SAMPLES)
    with step(1, f"quantize {MODEL} to int4, calibrated on {CALIBRATION_SAMPLES} samples"):
        quantize_model(MODEL, recipe, out=int4.path)
    with step(2, "convert: the original to GGUF Q4_K_M, the int4 to Marlin"):
        convert_model(MODEL, to="gguf", type="Q4_K_M", out=gguf.path)
        convert_model(int4, to="marlin", out=marlin.path)
    with step(3, f"evaluate against the original on {EVALUATION_TOKENS:,} tokens of unseen text"):
        report = evaluate(
            [int4, marlin, gguf],
            MODEL,
            max_tokens=EVALUATION_TOKENS,
            command="qtool demo",
        )
        write_report(report, folder)
    with step(4, "serve the int4 model and stream a chat answer"):
        answer = chat(int4.path, show=show_answer)
    return report, answer


@contextmanager
def one_thread() -> Iterator[None]:
    """The bundled model's matrices are so small that a second thread mostly waits for the first,
    and on a busy machine both wait for a core: with ten other jobs on two cores the demo took 146 s
    with one thread and 457 s with two (AMD EPYC, 2026-11).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """A heading before a step and its time after it, on stderr."""
    from qtool.progress import console

    console.print(f"\n[bold]{number}/4 {title}[/bold]", highlight=False)
    started = time.monotonic()
    yield
    console.print(f"    done in {time.monotonic() - started:.1f} s", highlight=False, style="dim")


def chat(model: Path, *, show: bool) -> str:
    """One streamed answer from a real server process, shown as it arrives."""
    from qtool.runtime.server.process import running_server, stream_chat

    parts = []
    with running_server(str(model)) as server:
        answer = stream_chat(
            server.url, QUESTION, max_tokens=ANSWER_TOKENS, temperature=0.7, top_p=0.9, seed=1
        )
        click.echo(f"> {QUESTION}", err=not show)
        for text in answer:
            parts.append(text)
            click.echo(text, nl=False, err=not show)
        click.echo(err=not show)
    if not "".join(parts).strip():
        raise QtoolError(f"the server of {model.name} streamed an empty answer")
    return "".join(parts)


def summary(report: EvaluationReport, answer: str, seconds: float) -> dict[str, object]:
    """The table's numbers, as plain data."""
    from qtool.runtime.evaluate.report import verdict_line

    models = [
        {
            "name": row.name,
            "format": row.format,
            "size_bytes": row.size_bytes,
            "bits_per_weight": row.bits_per_weight,
            "perplexity": row.perplexity_in("llama.cpp").value,
            "kl_divergence": row.divergence.kld.value if row.divergence else 0.0,
            "same_top": row.divergence.same_top.value if row.divergence else 1.0,
            "tokens_per_second": row.speed.tokens_per_second if row.speed else None,
        }
        for row in report.rows
    ]
    return {
        "verdict": {m.name: verdict_line(m, report.reference) for m in report.models},
        "models": models,
        "evaluated_tokens": report.text.num_tokens_used,
        "question": QUESTION,
        "answer": answer,
        "seconds": seconds,
        "report": "report.html",
    }


def print_table(report: EvaluationReport, out: Path, seconds: float) -> None:
    """The one table, and where everything is."""
    from qtool.runtime.evaluate.terminal import output_console, report_table

    windows = {
        result.protocol.name: result.protocol.windows for result in report.rows[0].perplexity
    }
    console = output_console()
    console.print()
    console.print(report_table(report))
    console.print(
        f"Evaluated on {report.text.num_tokens_used:,} tokens of a text that neither training nor "
        f"calibration has seen; llama.cpp: {windows['llama.cpp']}; papers: {windows['papers']}.",
        style="dim",
    )
    console.print(f"\nmodels: {out}\nreport: {out / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s in all")
