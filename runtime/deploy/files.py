"""What a target writes: named texts, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import UsageError

SECRET = 0o600


@dataclass(frozen=True, slots=True)
class File:
    """mode: of the file; what holds keys is for its owner alone."""

    text: str
    mode: int = 0o644


def write_files(folder: Path, files: Mapping[str, File], *, force: bool) -> None:
    """Write every file under a folder; refuse before the first where one is there already."""
    taken = [name for name in files if (folder / name).exists()]
    if taken and not force:
        raise UsageError(
            f"{folder / taken[0]} already exists",
            "pass --force to replace it, or name another folder with --out",
        )
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        # Made with its mode, so that a key is at no moment readable by others.
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(file.text)
        partial.replace(path)


def shown(files: Mapping[str, File]) -> str:
    """The files as one text, for --dry-run; what is secret is named and not shown."""
    parts = []
    for name, file in files.items():
        text = "(keys, not shown)\n" if file.mode == SECRET else file.text
        parts.append(f"# ---- {name}\n{text.rstrip()}\n")
    return "\n".join(parts)
