"""The models on this machine: Hugging Face's cache, and names made from a Modelfile.

A name is a small JSON file that says what it is made from; weights are never copied. It stands
wherever a model can be named: `qtool run NAME`, `qtool serve NAME`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from qtool.errors import FormatError, UnknownName, UsageError
from qtool.runtime.modelfile import Modelfile
from qtool.settings import settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(:[A-Za-z0-9._-]{1,64})?")


class Listed(NamedTuple):
    """num_bytes: on disk; None for a name, which has no weights of its own."""

    name: str
    num_bytes: int | None
    modified: datetime
    made_from: str


@dataclass(frozen=True, slots=True)
class Store:
    folder: Path

    def names(self) -> list[str]:
        return sorted(path.stem.replace("@", ":") for path in self.folder.glob("*.json"))

    def find(self, name: str) -> Modelfile | None:
        path = self._path(name.removesuffix(":latest"))
        if path is None or not path.is_file():
            return None
        try:
            return Modelfile.from_dict(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{path} is damaged: {error}", f"remove it with: qtool rm {name}"
            ) from None

    def keep(self, name: str, modelfile: Modelfile) -> None:
        path = self._path(name.removesuffix(":latest"))
        if path is None or name.startswith("builtin:"):
            raise UsageError(
                f"{name!r} cannot be a name", "use letters, digits and . _ -, as in my-model:small"
            )
        # A name made from a name is made from that one's model: the other may go.
        parent = self.find(modelfile.base)
        modelfile = modelfile if parent is None else modelfile.over(parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a server may be looking.
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(modelfile.as_dict(), indent=2))
        partial.replace(path)

    def remove(self, name: str) -> bool:
        path = self._path(name.removesuffix(":latest"))
        if path is None or not path.is_file():
            return False
        path.unlink()
        return True

    def _path(self, name: str) -> Path | None:
        # A colon is no part of a file name on Windows.
        found = NAME.fullmatch(name)
        return self.folder / f"{name.replace(':', '@')}.json" if found else None

    def listed(self) -> Iterator[Listed]:
        for name in self.names():
            path = self._path(name)
            assert path is not None
            modified = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            found = self.find(name)
            yield Listed(name, None, modified, found.base if found else "")


def store() -> Store:
    """This user's own."""
    return Store(settings().data_dir / "models")


def downloaded() -> list[Listed]:
    """Models in Hugging Face's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir()
    except CacheNotFound:
        return []
    return sorted(
        Listed(
            repo.repo_id,
            repo.size_on_disk,
            datetime.fromtimestamp(repo.last_modified, UTC),
            "Hugging Face",
        )
        for repo in found.repos
        if repo.repo_type == "model"
    )


def forget_download(repo_id: str) -> int:
    """Remove a model from Hugging Face's cache; the bytes that came free."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    names = {entry.name for entry in store().listed()}
    try:
        found = scan_cache_dir()
    except CacheNotFound:
        raise UnknownName("model", repo_id, names) from None
    repos = {repo.repo_id: repo for repo in found.repos if repo.repo_type == "model"}
    if repo_id not in repos:
        raise UnknownName("model", repo_id, names | repos.keys())
    revisions = [revision.commit_hash for revision in repos[repo_id].revisions]
    strategy = found.delete_revisions(*revisions)
    strategy.execute()
    return int(strategy.expected_freed_size)
