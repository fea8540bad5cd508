"""The models of an evaluation before they are loaded: what each is, and which one is the original.

Nothing here reads a weight: a wrong name, an output that exists or a model without an original are
known in the first second, not after minutes of loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qtool.artifact import MANIFEST_NAME, Manifest
from qtool.builtin import PREFIX
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import WeightReader, open_weights
from qtool.errors import QtoolError
from qtool.runtime.evaluate.perplexity import PAPERS_WINDOW
from qtool.runtime.evaluate.sizes import ModelSize, measure
from qtool.source import Source, resolve

# Where Hugging Face configs keep the longest sequence, by family.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")

# Artifacts made from artifacts; a longer chain is taken for a circle.
MAX_STEPS_TO_ORIGINAL = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """One model: its name in the report, its files, its size, its qtool.json if it has one."""

    name: str
    source: Source
    reader: WeightReader
    size: ModelSize
    manifest: Manifest | None

    @property
    def context(self) -> int:
        """The longest sequence it was made for; without a limit (ALiBi, recurrent), the longest
        window of any protocol.
        """
        return context_length(self.reader.config)


class Reference(NamedTuple):
    """The original, or None, and what the report must say about how it was found."""

    subject: Subject | None
    note: str | None


def open_subjects(models: Sequence[str | Source]) -> list[Subject]:
    sources = [_resolved(model) for model in models]
    names = short_names(sources)
    return [open_subject(name, source) for name, source in zip(names, sources, strict=True)]


def open_subject(name: str, source: Source) -> Subject:
    reader = open_weights(source)
    has_manifest = not source.is_gguf and (source.path / MANIFEST_NAME).is_file()
    manifest = Manifest.load(source.path) if has_manifest else None
    return Subject(name, source, reader, measure(reader), manifest)


def short_names(sources: Sequence[Source]) -> list[str]:
    """Short names where they tell the models apart, else the names as they were given."""
    short = [source.path.name if source.is_gguf else source.short_name for source in sources]
    return short if len(set(short)) == len(short) else [source.name for source in sources]


def find_reference(against: str | Source | None, subjects: Sequence[Subject]) -> Reference:
    """The original that was asked for, or else the one that the models' manifests lead to."""
    if against is not None:
        return Reference(_open_reference(_resolved(against), subjects), None)
    origins = {_origin(subject.manifest) for subject in subjects if subject.manifest is not None}
    if not origins:
        return Reference(None, "Not compared with an original: name one with --against.")
    if len(origins) > 1:
        names = ", ".join(sorted(origin.name for origin in origins))
        return Reference(
            None,
            f"Not compared with an original: the models were made from different ones ({names}); "
            "name one with --against.",
        )
    origin = origins.pop()
    if origin.found is None:
        return Reference(
            None,
            f"Not compared with an original: qtool.json names {origin.name}, which is not on this "
            "machine; name a copy of it with --against.",
        )
    return Reference(
        _open_reference(origin.found, subjects),
        f"Compared with {origin.name}, which qtool.json names as the source.",
    )


class _Origin(NamedTuple):
    """What a manifest leads to, and where that is, if it is on this machine."""

    name: str
    found: Source | None


def _origin(manifest: Manifest) -> _Origin:
    """Follow the sources: a Marlin file was made from an int4 artifact, which has an original."""
    for _ in range(MAX_STEPS_TO_ORIGINAL):
        found = resolve_here(manifest.source, manifest.source_revision)
        if found is None or found.is_gguf or not (found.path / MANIFEST_NAME).is_file():
            break
        manifest, origin = Manifest.load(found.path), manifest
        if manifest.format == "dense":
            return _Origin(origin.source, found)
    return _Origin(manifest.source, found)


def resolve_here(model: str, revision: str | None) -> Source | None:
    """A model that a manifest names, if all of it is on this machine: nothing is downloaded
    unasked.
    """
    try:
        if model.startswith(PREFIX) or Path(model).expanduser().exists():
            return resolve(model, revision)
        source = _in_hub_cache(model, revision)
        if source is not None:
            Checkpoint.open(source.path)  # a cache may hold a config alone
        return source
    except QtoolError:
        return None


def _in_hub_cache(model: str, revision: str | None) -> Source | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Source(model, Path(cached).parent, revision) if isinstance(cached, str) else None


def context_length(config: Mapping[str, Any]) -> int:
    for key in CONTEXT_KEYS:
        if isinstance(length := config.get(key), int):
            return length
    return PAPERS_WINDOW


def _resolved(model: str | Source) -> Source:
    return resolve(model) if isinstance(model, str) else model


def _open_reference(source: Source, subjects: Sequence[Subject]) -> Subject:
    (name,) = short_names([source])
    taken = {subject.name for subject in subjects}
    if name in taken:
        name = source.name if source.name not in taken else f"{source.name} (original)"
    return open_subject(name, source)
