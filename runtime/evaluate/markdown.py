"""report.md: verdicts, the tables, what stands beside them, the divergence block, the command."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.runtime.evaluate.report import EvaluationReport, verdict_line
from qtool.runtime.evaluate.rows import (
    TABLE_HEADER,
    TASK_HEADER,
    divergence_rows,
    footnotes,
    table_rows,
    task_notes,
    task_rows,
    worst_rows,
)


def to_markdown(report: EvaluationReport) -> str:
    """report.md: verdicts, the table, what stands beside it, the divergence block, the command."""
    parts = ["# qtool evaluation", ""]
    parts += [
        f"- **{_escape(model.name)}**: {verdict_line(model, report.reference)}"
        for model in report.models
    ]
    parts += ["", *_markdown_table(TABLE_HEADER, table_rows(report)), ""]
    parts += [f"- {_escape(line)}" for line in footnotes(report)]
    if task_rows(report):
        task_header = (*TASK_HEADER, *(row.name for row in report.rows))
        parts += ["", "## Tasks", "", *_markdown_table(task_header, task_rows(report)), ""]
        parts += [f"- {_escape(line)}" for line in task_notes(report)]
    compared = [model for model in report.models if model.divergence is not None]
    if compared:
        header = ("", *(model.name for model in compared))
        columns = [divergence_rows(model.divergence) for model in compared if model.divergence]
        rows = [
            (cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)
        ]
        parts += ["", "## Against the original", "", *_markdown_table(header, rows)]
    for model in report.models:
        if model.worst:
            header = ("KLD", "after", "came", "p", "p of the original", "says", "original says")
            parts += ["", f"## Worst tokens of {_escape(model.name)}", ""]
            parts += _markdown_table(header, worst_rows(model))
    parts += ["", "## How to reproduce", "", "```", report.command, "```", ""]
    parts += [f"- {name}: {value}" for name, value in report.environment.items()]
    return "\n".join(parts) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_escape, header)) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
