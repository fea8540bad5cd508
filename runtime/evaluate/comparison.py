"""`qtool eval --compare a.json b.json`: reports that exist already, side by side.

Numbers are set beside each other only where they mean the same: perplexity and divergence of one
text, cut by one protocol, used to one length. Where two reports differ in that, the cell says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from qtool.errors import FormatError
from qtool.json_files import read_json
from qtool.runtime.evaluate.report import REPORT_VERSION
from qtool.units import size_text

HEADER = ("report", "model", "size", "bits/weight", "PPL (llama.cpp)", "KL divergence", "same top")


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, or the folder that holds one."""
    file = path / "report.json" if path.is_dir() else path
    report = read_json(file)
    version = report.get("qtool_report")
    if version != REPORT_VERSION:
        raise FormatError(
            f"{file} is no report of this version: qtool_report is {version!r}, not "
            f"{REPORT_VERSION}",
            "make it anew with `qtool eval ... --out`",
        )
    if not isinstance(report.get("models"), list) or not isinstance(report.get("text"), Mapping):
        raise FormatError(f"{file} has no models or no text")
    return report


def comparison_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row a model, in the order of the reports; originals once."""
    rows = []
    first = next(iter(reports.values()))
    shown: set[str] = set()
    for name, report in reports.items():
        original = report.get("reference")
        if original and original["name"] not in shown:
            shown.add(original["name"])
            rows.append(_row(name, original, first, report))
        rows += [_row(name, model, first, report) for model in report["models"]]
    return rows


def comparison_notes(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line where the texts differ."""
    texts = {_text(report) for report in reports.values()}
    if len(texts) == 1:
        return []
    used = "; ".join(
        f"{name}: {report['text']['name']}, {report['text']['num_tokens_used']:,} tokens"
        for name, report in reports.items()
    )
    return [f"The reports are of different texts, so only sizes can be compared ({used})."]


def comparison_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in comparison_rows(reports):
        table.add_row(*map(escape, row))
    return table


def _row(
    name: str, model: Mapping[str, Any], first: Mapping[str, Any], report: Mapping[str, Any]
) -> tuple[str, ...]:
    comparable = _text(first) == _text(report)
    divergence = model.get("divergence")
    perplexity = next(
        (p for p in model["perplexity"] if p["protocol"]["name"] == "llama.cpp"), None
    )
    return (
        name,
        str(model["name"]),
        size_text(model["size_bytes"]),
        f"{model['bits_per_weight']:.2f}",
        _estimate(perplexity, 3) if comparable else "another text",
        (_estimate(divergence["kld"], 5) if divergence else "-") if comparable else "another text",
        f"{100 * divergence['same_top']['value']:.2f} %" if divergence and comparable else "-",
    )


def _estimate(found: Mapping[str, float] | None, digits: int) -> str:
    return "-" if found is None else f"{found['value']:.{digits}f} ± {found['error']:.{digits}f}"


def _text(report: Mapping[str, Any]) -> tuple[object, ...]:
    """What two reports must share for their numbers to mean the same."""
    protocols: Sequence[Mapping[str, Any]] = report["models"][0]["perplexity"]
    labels = tuple(found["protocol"]["label"] for found in protocols)
    return (report["text"]["sha256"], report["text"]["num_tokens_used"], labels)
