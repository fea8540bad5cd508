"""Outputs that appear under their final name only when they are complete.

Writing goes to a hidden sibling of the output (``.NAME.partial``) that takes the final name by one
rename.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from qtool.errors import OutputExists, QtoolError, UsageError
from qtool.units import size_text

# What is copied beside the weights: tokenizer, templates, generation defaults, licence and card.
SIDE_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class OutputFolder:
    """A folder that appears under its name only when complete.

    ``with OutputFolder(out) as stage:`` gives ``stage.path``, a hidden sibling ``.NAME.partial``.
    A clean exit flushes it to disk and renames it to ``out``; an exception removes it, unless
    ``resumable``, where it stays for the next try.
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool = False,
        resumable: bool = False,
        needed_bytes: int | None = None,
    ) -> None:
        self.out = out.absolute()
        self.path = self.out.parent / f".{self.out.name}.partial"
        self._force = force
        self._resumable = resumable
        if self.out.exists() and not force:
            raise OutputExists(out)
        if force and self.out.exists() and not _is_model_folder(self.out):
            raise UsageError(
                f"{out} exists and is not a model folder, so --force does not replace it",
                "name another --out, or remove it by hand",
            )
        parent = _existing_parent(self.out)
        if not os.access(parent, os.W_OK):
            raise UsageError(f"{parent} is not writable, so {out} cannot be made")
        require_disk_space(parent, needed_bytes)

    def __enter__(self) -> OutputFolder:
        if self.path.exists() and not self._resumable:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            if not self._resumable:
                shutil.rmtree(self.path, ignore_errors=True)
            return
        for file in self.path.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        if self.out.exists():
            if not self._force:
                raise OutputExists(self.out)
            retired = self.out.parent / f".{self.out.name}.replaced"
            shutil.rmtree(retired, ignore_errors=True)
            self.out.rename(retired)
            self.path.rename(self.out)
            shutil.rmtree(retired)
        else:
            self.path.rename(self.out)
        flush_to_disk(self.out.parent)


def _is_model_folder(path: Path) -> bool:
    """Whether --force may replace it: an empty folder, or one that holds a model or a report of
    ours.
    """
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or bool(names & {"config.json", "qtool.json", "report.json"})


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def require_disk_space(folder: Path, needed_bytes: int | None) -> None:
    """Refuse work whose output does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed_bytes is not None and needed_bytes > free:
        raise QtoolError(
            f"the output needs {size_text(needed_bytes)}, {folder} has {size_text(free)} free",
            "free some space, or name another --out",
        )


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, templates, generation defaults and licence; returns the names copied."""
    names = sorted({path.name for pattern in SIDE_FILES for path in source.glob(pattern)})
    files = [source / name for name in names if (source / name).is_file()]
    for file in files:
        # copyfile, not copy: a Hub cache holds links to read-only blobs.
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]
