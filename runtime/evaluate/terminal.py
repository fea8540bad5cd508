"""The report on the terminal: verdicts, one table, what must stand beside it, where the rest is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.runtime.evaluate.report import (
    TABLE_HEADER,
    EvaluationReport,
    footnotes,
    table_rows,
    verdict_line,
)

# A pipe has no width; rich would fold the table into its 80 columns.
PIPE_WIDTH = 160


def print_report(report: EvaluationReport, folder: Path | None = None) -> None:
    """To stdout, readable without colour."""
    console = output_console()
    for model in report.models:
        line = verdict_line(model, report.reference)
        console.print(f"[bold]{escape(model.name)}[/bold]: {escape(line)}")
    table = Table(header_style="bold")
    for index, name in enumerate(TABLE_HEADER):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in table_rows(report):
        table.add_row(*map(escape, row))
    console.print(table)
    for line in footnotes(report):
        console.print(f"- {line}", markup=False, style="dim")
    if folder is not None:
        console.print(f"\nreport: {folder / 'report.html'}", markup=False)


def output_console() -> Console:
    """Stdout: as wide as the terminal, or wide enough for a table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
