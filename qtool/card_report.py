"""What `qtool eval` has measured, put into the model card of the artifact that it measured.

A report belongs to an artifact when it names the very weight files, by sha256. It stands between
two comments, so that a later one takes its place and the rest of the card stays as it was edited.
"""

from __future__ import annotations

import re
from pathlib import Path

from qtool.artifact import CARD_NAME, Manifest
from qtool.errors import FormatError, UsageError
from qtool.json_files import read_json

BEGIN, END = "<!-- qtool eval -->", "<!-- /qtool eval -->"


def add_report(artifact: Path, report: Path) -> None:
    """Put a report into an artifact's card; its checksum in qtool.json is left to the caller.

    report  the folder that `qtool eval --out` made: report.json and report.md

    Raises UsageError where the report is of other weights.
    """
    require_same_weights(artifact, report)
    try:
        measured = (report / "report.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{report / 'report.md'} cannot be read: {error}") from error
    card = artifact / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    card.write_text(with_report(text, measured), encoding="utf-8")


def with_report(card: str, report: str) -> str:
    """A card with a report's Markdown in it, its headings one level down; in the place of an
    earlier report, or at the end.

    >>> print(with_report("# Card", "# qtool evaluation").strip())
    # Card
    <BLANKLINE>
    <!-- qtool eval -->
    ## qtool evaluation
    <!-- /qtool eval -->
    """
    section = f"{BEGIN}\n{_lowered(report).strip()}\n{END}"
    found = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", card, re.S)
    if found is not None:
        return card[: found.start()] + section + card[found.end() :]
    return f"{card.rstrip()}\n\n{section}\n".lstrip()


def require_same_weights(artifact: Path, report: Path) -> None:
    """Raise UsageError unless a model of the report has this artifact's weight files."""
    listed = Manifest.load(artifact).files
    weights = {name: digest for name, digest in listed.items() if name.endswith(".safetensors")}
    models = read_json(report / "report.json").get("models")
    measured = [model.get("sha256") for model in models] if isinstance(models, list) else []
    if not weights or weights not in measured:
        raise UsageError(
            f"{report} measured other weights than those of {artifact}",
            f"make one with `qtool eval {artifact} --out FOLDER`",
        )


def _lowered(text: str) -> str:
    """Headings one level down, code blocks as they are."""
    lines, fenced = [], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        lines.append(f"#{line}" if line.startswith("#") and not fenced else line)
    return "\n".join(lines)
