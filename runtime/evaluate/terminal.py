"""The report on the terminal: verdicts, one table, what must stand beside it, where the rest is."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.runtime.evaluate.report import EvaluationReport, verdict_line
from qtool.runtime.evaluate.rows import footnotes, table_rows, task_notes, task_rows

# A pipe has no width; rich would fold the table and the notes into its 80 columns.
PIPE_WIDTH = 160

# Two lines each, so that the table fits 80 columns: names under names, errors under numbers.
HEADER = (
    "model\nformat",
    "size",
    "bits /\nweight",
    "PPL\nllama.cpp",
    "PPL\npapers",
    "KL\ndivergence",
    "same\ntop",
    "tokens\n/ s",
)


def print_report(report: EvaluationReport, folder: Path | None = None) -> None:
    """To stdout, readable without colour."""
    console = output_console()
    for model in report.models:
        line = verdict_line(model, report.reference)
        console.print(f"[bold]{escape(model.name)}[/bold]: {escape(line)}")
    console.print(report_table(report))
    if task_rows(report):
        console.print(task_table(report))
    for line in [*footnotes(report), *task_notes(report)]:
        console.print(f"- {line}", markup=False, style="dim")
    if folder is not None:
        console.print(f"\nreport: {folder / 'report.html'}", markup=False, soft_wrap=True)


def report_table(report: EvaluationReport) -> Table:
    """The summary table, the original first."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    first, *others = HEADER
    table.add_column(first, overflow="fold", min_width=13)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for name, kind, *numbers in table_rows(report):
        table.add_row(f"{escape(name)}\n[dim]{escape(kind)}[/dim]", *map(_two_lines, numbers))
    return table


def task_table(report: EvaluationReport) -> Table:
    """A row a task, a column a model."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task\n[dim]metric[/dim]", overflow="fold")
    for row in report.rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    for name, metric, *cells in task_rows(report):
        table.add_row(
            f"{escape(name)}\n[dim]{metric}[/dim]", *(cell.replace(", ", "\n") for cell in cells)
        )
    return table


def _two_lines(text: str) -> str:
    """ "94.10 ± 0.21 %" with its error underneath, the unit at the value."""
    value, _, error = escape(text).partition(" ± ")
    unit = " %" if error.endswith(" %") else ""
    return f"{value}{unit}\n[dim]± {error.removesuffix(unit)}[/dim]" if error else value


def output_console() -> Console:
    """Stdout: as wide as the terminal, or wide enough for a table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
