"""`qtool eval`: prove what was lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import click

from qtool.errors import UsageError
from qtool.runtime.config import Device
from qtool.runtime.evaluate.text import DEFAULT_MAX_TOKENS, ScoringDtype
from qtool.settings import Rounding


@click.command(name="eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--against",
    metavar="MODEL",
    help="The original to compare with, or a file of its predictions (--save-reference, "
    "llama-perplexity --kl-divergence-base). Default: what qtool.json names, if it is here.",
)
@click.option(
    "--save-reference",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.safetensors",
    help="Keep the original's predictions for a later --against FILE (a few MB).",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A UTF-8 text file. Default: a text that ships, unseen in calibration.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=0),
    default=DEFAULT_MAX_TOKENS,
    show_default=True,
    help="Use this much of the text; 0 for all of it.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ScoringDtype)),
    default="float32",
    show_default=True,
    help="What the models compute in.",
)
@click.option(
    "--activations",
    type=click.Choice(get_args(Rounding)),
    help="int8: quantized layers round their inputs to 8 bits, as they are served on a CPU; bf16: "
    "they do not, which shows the loss of the weights alone; llama.cpp: as that program does on a "
    "CPU, for GGUF files, several times slower. Default: QTOOL_ACTIVATIONS, or int8.",
)
@click.option(
    "--no-papers", is_flag=True, help="Perplexity by llama.cpp's protocol alone: half the time."
)
@click.option("--device", type=click.Choice(get_args(Device)), default="auto")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for report.html, report.json and report.md. Default: ./NAME-eval.",
)
@click.option("--force", is_flag=True, help="Replace the output folder if it is there.")
@click.option(
    "--tasks",
    metavar="NAME,FILE,...",
    help="Also answer these questions: hellaswag, arc_easy, arc_challenge, piqa, winogrande, "
    "lambada, openbookqa, mmlu, or files of your own (.jsonl .csv ...).",
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path),
    help="A folder with the files of named tasks. Default: the Hub.",
)
@click.option(
    "--task-limit", type=click.IntRange(min=1), help="The first N questions of each task."
)
@click.option(
    "--lm-eval",
    metavar="NAME,...",
    help="Also run these tasks of lm-evaluation-harness (pip install 'qtool[eval]').",
)
@click.option(
    "--lm-eval-include",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of your own lm-eval task files.",
)
@click.option(
    "--compare",
    "compare_reports",
    is_flag=True,
    help="The arguments are report.json files of before: set them side by side.",
)
@click.option("--no-speed", is_flag=True, help="Do not time generation.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def evaluate(
    models: tuple[str, ...],
    against: str | None,
    save_reference: Path | None,
    text: Path | None,
    max_tokens: int,
    dtype: ScoringDtype,
    activations: Rounding | None,
    no_papers: bool,
    device: Device,
    out: Path | None,
    force: bool,
    tasks: str | None,
    task_data: Path | None,
    task_limit: int | None,
    lm_eval: str | None,
    lm_eval_include: Path | None,
    compare_reports: bool,
    no_speed: bool,
    as_json: bool,
) -> None:
    """Perplexity of models, and how far their predictions are from the original's, as a report.

    A MODEL is a folder, a .gguf file, a Hub id, or builtin:NAME.

    \b
    Examples:
      qtool eval ./Qwen3-0.6B-int4 --against Qwen/Qwen3-0.6B
      qtool eval ./books-7m-int4 ./books-7m-Q4_K_M.gguf --against builtin:books-7m --out report
      qtool eval ./Qwen3-0.6B-int4 --tasks hellaswag,arc_easy,./mine.jsonl --task-limit 500
      qtool eval --compare monday/report.json tuesday/report.json
    """
    if compare_reports:
        if out is not None:
            raise UsageError(
                f"--out {out}: --compare prints, and writes no files",
                "leave --out away, and redirect what it prints, or --json",
            )
        _print_comparison(models, as_json=as_json)
        return
    from qtool.runtime.evaluate.report import to_json
    from qtool.runtime.evaluate.run import evaluate as run
    from qtool.runtime.evaluate.terminal import print_report
    from qtool.source import resolve

    folder = out or Path(f"{resolve(models[0]).short_name}-eval")
    report = run(
        models,
        against,
        text=text,
        out=folder,
        max_tokens=max_tokens or None,
        dtype=dtype,
        device=device,
        activations=activations,
        papers=not no_papers,
        force=force,
        speed=not no_speed,
        save_reference=save_reference,
        tasks=_names(tasks),
        task_data=task_data,
        task_limit=task_limit,
        lm_eval=_names(lm_eval),
        lm_eval_include=lm_eval_include,
    )
    if as_json:
        click.echo(json.dumps(to_json(report), allow_nan=False))
        click.echo(f"report in {folder}", err=True)
    else:
        print_report(report, folder)


def _print_comparison(paths: tuple[str, ...], *, as_json: bool) -> None:
    from qtool.runtime.evaluate.comparison import (
        HEADER,
        comparison_notes,
        comparison_rows,
        comparison_table,
        read_report,
    )
    from qtool.runtime.evaluate.terminal import output_console

    reports = {path: read_report(Path(path)) for path in paths}
    notes = comparison_notes(reports)
    if as_json:
        rows = [dict(zip(HEADER, row, strict=True)) for row in comparison_rows(reports)]
        click.echo(json.dumps({"rows": rows, "notes": notes}))
        return
    console = output_console()
    console.print(comparison_table(reports))
    for note in notes:
        console.print(f"- {note}", markup=False, style="dim")


def _names(text: str | None) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
