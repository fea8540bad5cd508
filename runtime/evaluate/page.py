"""report.html: one page that stands alone. No script, no font, no image, nothing fetched; light and
dark follow the reader's system. The verdict first, then the table, the plots, and how to reproduce.

Every text that comes from outside (model names, file names, messages) goes through `escape`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from qtool.runtime.evaluate.plots import divergence_plot, error_map, layer_plots, pareto_plot
from qtool.runtime.evaluate.report import EvaluationReport, ModelReport, grade, verdict
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

_WITH_ERROR = re.compile(r"^(.+?) ± (\S+)( %|)(?:, (.+)|)$")

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #636973; --line: #e4e2dd;
  --accent: #2f66c9; --bar: #6f9ae3; --mark: #d2611c; --grid: #eceae5; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #141619; --card: #1b1e22; --ink: #e7e8ea; --soft: #9aa1ab; --line: #2d3138;
  --accent: #8db4ff; --bar: #4f7fd1; --mark: #ff9a57; --grid: #262a30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
.kicker { margin: 0 0 20px; color: var(--soft); }
.verdict { margin: 0 0 18px; }
.verdict .name { color: var(--accent); font-weight: 600; }
.verdict h1 { margin: 2px 0; font-size: 27px; line-height: 1.25; font-weight: 650;
  letter-spacing: -0.01em; }
.several .verdict h1 { font-size: 20px; }
.verdict .grade { color: var(--soft); }
h2 { margin: 44px 0 12px; font-size: 18px; font-weight: 650; }
h3 { margin: 24px 0 8px; font-size: 15px; font-weight: 600; }
p { margin: 8px 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
.words td, .words th { text-align: left; }
tr:last-child td { border-bottom: 0; }
tr.original td { color: var(--soft); }
td:first-child { font-weight: 550; }
td small { display: block; color: var(--soft); font: 400 12px/1.3 system-ui, sans-serif; }
ul.notes { margin: 12px 0 0; padding-left: 18px; color: var(--soft); font-size: 13px; }
figure { margin: 0; padding: 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { margin-top: 8px; color: var(--soft); font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 12px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); }
svg text.label { fill: var(--ink); font-weight: 550; }
svg .grid { stroke: var(--grid); }
svg .thin { stroke: var(--bar); stroke-width: 1.5; }
svg .bar { fill: var(--bar); }
svg .cell { fill: var(--accent); stroke: var(--line); stroke-width: 0.5; }
svg text.on-dark { fill: var(--card); }
svg .median { stroke: var(--card); stroke-width: 2.5; }
svg .dot { fill: var(--card); stroke: var(--bar); stroke-width: 2; }
svg .mean { fill: var(--mark); }
svg .rtn { stroke: var(--mark); stroke-width: 2; }
.worst td:first-child { white-space: normal; min-width: 240px; font-weight: 400; }
.item { white-space: nowrap; }
.key { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 12px; border-radius: 3px;
  background: var(--bar); vertical-align: -1px; }
.key.ring { background: none; border: 2px solid var(--bar); border-radius: 50%; }
.key.mark { background: var(--mark); border-radius: 50%; }
.key.tick { height: 3px; background: var(--mark); border-radius: 0; vertical-align: 3px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { :root { color-scheme: light; --page: #ffffff; }
  body { font-size: 12px; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  th, td { padding: 5px 8px; } pre { white-space: pre-wrap; } .scroll { overflow: visible; }
  figure, tr, .verdict, ul.notes { break-inside: avoid; } h2, summary { break-after: avoid; }
  td code { white-space: normal; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def to_html(report: EvaluationReport) -> str:
    """The whole page."""
    compared = {m.name: m.divergence for m in report.models if m.divergence is not None}
    names = ", ".join(model.name for model in report.models)
    sections = [
        _verdicts(report),
        f"<h2>Summary</h2>{_summary(report)}",
        _tasks(report) if task_rows(report) else "",
        _divergences(report.models) if compared else "",
        "".join(_worst(model) for model in report.models),
        _layers(report.models),
        _reproduce(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>qtool evaluation: {escape(names)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}\n</main>\n</body>\n</html>\n"
    )


def _verdicts(report: EvaluationReport) -> str:
    against = f" against {escape(report.reference.name)}" if report.reference else ""
    cards = []
    for model in report.models:
        words = grade(model.divergence).capitalize() + "." if model.divergence else ""
        kld = f" Mean KL divergence {model.divergence.kld.value:.4f}." if model.divergence else ""
        cards.append(
            f'<div class="verdict"><div class="name">{escape(model.name)}</div>'
            f"<h1>{escape(_headline(verdict(model, report.reference)))}</h1>"
            f'<div class="grade">{escape(words + kld)}</div></div>'
        )
    several = ' class="several"' if len(cards) > 1 else ""
    return f'<p class="kicker">qtool evaluation{against}</p><div{several}>{"".join(cards)}</div>'


def _summary(report: EvaluationReport) -> str:
    # The format goes under the name: nine columns do not fit a page.
    header = (TABLE_HEADER[0], *TABLE_HEADER[2:])
    rows = [(row[0], *row[2:]) for row in table_rows(report)]
    formats = [row[1] for row in table_rows(report)]
    classes = ["original" if row is report.reference else "" for row in report.rows]
    notes = "".join(f"<li>{escape(line)}</li>" for line in footnotes(report))
    table = _table(header, rows, classes=classes, under=formats)
    return f'{table}<ul class="notes">{notes}</ul>'


def _tasks(report: EvaluationReport) -> str:
    header = (*TASK_HEADER, *(row.name for row in report.rows))
    notes = "".join(f"<li>{escape(line)}</li>" for line in task_notes(report))
    table = _table(header, task_rows(report))
    return f'<h2>Tasks</h2>{table}<ul class="notes">{notes}</ul>'


def _divergences(models: Sequence[ModelReport]) -> str:
    compared = {m.name: m.divergence for m in models if m.divergence is not None}
    columns = [divergence_rows(divergence) for divergence in compared.values()]
    rows = [(cells[0][0], *(text for _, text in cells)) for cells in zip(*columns, strict=True)]
    return (
        "<h2>How far the predictions moved</h2>"
        f"{_pareto(models)}"
        f"<figure>{divergence_plot(compared)}<figcaption>KL divergence of each scored token from "
        "the original, in nats, left is better."
        f"{_key('', '10 % to 90 % of tokens, line at the median')}"
        f"{_key('ring', '99 %, 99.9 %, largest')}{_key('mark', 'mean')}</figcaption></figure>"
        "<details><summary>All statistics</summary>"
        f"{_table(('', *compared), rows)}</details>"
    )


def _pareto(models: Sequence[ModelReport]) -> str:
    """Size against divergence, where there are several to choose among."""
    points = {
        model.name: (model.size_bytes, model.divergence.kld.value)
        for model in models
        if model.divergence is not None
    }
    if len(points) < 2:
        return ""
    return (
        f"<figure>{pareto_plot(points)}<figcaption>Mean KL divergence against size, lower left is "
        f"better.{_key('mark', 'nothing here is both smaller and closer')}"
        f"{_key('ring', 'another is both')}</figcaption></figure><p></p>"
    )


def _worst(model: ModelReport) -> str:
    if not model.worst:
        return ""
    header = ("after", "came", "says", "original says", "p", "original's p", "KLD")
    rows = [
        (before, token, top, other, p, original, kld)
        for kld, before, token, p, original, top, other in worst_rows(model)
    ]
    return (
        f"<details><summary>Where {escape(model.name)} is furthest from the original"
        f'</summary><div class="worst">{_table(header, rows)}</div></details>'
    )


def _layers(models: Sequence[ModelReport]) -> str:
    """One section for all models that hold the same layers: a conversion keeps them."""
    sections: list[tuple[ModelReport, list[str]]] = []
    for model in models:
        for first, names in sections:
            if (first.layers, first.unquantized) == (model.layers, model.unquantized):
                names.append(model.name)
                break
        else:
            sections.append((model, [model.name]))
    return "".join(_layer_section(model, ", ".join(names)) for model, names in sections)


def _layer_section(model: ModelReport, names: str) -> str:
    panels = layer_plots(model.layers)
    left_out = list(model.unquantized.items())
    if not panels and not left_out:
        return ""
    parts = [f"<h2>Error of each layer: {escape(names)}</h2>"]
    if panels:
        parts.append(
            f"<figure>{error_map(model.layers)}<figcaption>Relative error of each linear's output "
            "on the calibration text: blocks down, linears across, stronger is larger.</figcaption>"
            "</figure>"
        )
        figures = "".join(f"<div>{panel}</div>" for panel in panels)
        parts.append(
            "<details><summary>Beside plain rounding, linear by linear</summary>"
            f'<figure><div class="panels">{figures}</div><figcaption>The same errors by block; all '
            f"panels share one scale.{_key('', 'this model')}"
            f"{_key('tick', 'plain rounding to the same grid')}</figcaption></figure></details>"
        )
    if left_out:
        table = _table(("left in 16 bit", "because"), left_out, kind="words")
        count = f"{len(left_out)} linear{'s' if len(left_out) > 1 else ''}"
        parts.append(f"<details><summary>{count} left in 16 bit</summary>{table}</details>")
    return "".join(parts)


def _key(kind: str, meaning: str) -> str:
    return f'<span class="item"><span class="key {kind}"></span>{escape(meaning)}</span> '


def _reproduce(report: EvaluationReport) -> str:
    environment = list(report.environment.items())
    hashes = [
        (f"{row.name}: {file}", digest)
        for row in report.rows
        for file, digest in row.sha256.items()
    ]
    hashes.append((f"text: {report.text.name}", report.text.sha256))
    return (
        f"<h2>How to reproduce</h2><pre>{escape(report.command)}</pre>"
        f"<details><summary>Versions and machine</summary>{_pairs(environment)}</details>"
        f"<details><summary>Hashes (sha256)</summary>{_pairs(hashes)}</details>"
    )


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>"
        for name, value in rows
    )
    return f'<div class="scroll words"><table>{body}</table></div>'


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    classes: Sequence[str] = (),
    under: Sequence[str] = (),
    kind: str = "",
) -> str:
    """A table; `under` is a second line for the first cell of each row."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        second = f"<small>{escape(under[index])}</small>" if under else ""
        cells = f"<td>{escape(row[0])}{second}</td>" + "".join(map(_cell, row[1:]))
        body += f'<tr class="{classes[index]}">{cells}</tr>' if classes else f"<tr>{cells}</tr>"
    return f'<div class="scroll {kind}"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    """A number's standard error goes under it: "94.10 ± 0.21 %" is 94.10 % over ± 0.21. What
    follows behind a comma comes under that.
    """
    match = _WITH_ERROR.match(text)
    if not match:
        return f"<td>{escape(text)}</td>"
    value, error, unit, more = match.groups()
    second = f"<small>{escape(more)}</small>" if more else ""
    return f"<td>{escape(value + unit)}<small>± {escape(error)}</small>{second}</td>"


def _headline(text: str) -> str:
    return (text[:1].upper() + text[1:]).replace(" -> ", " \N{RIGHTWARDS ARROW} ")
