"""Finished blocks and a journal of them, so that the same command goes on where it was stopped.

Each block's packed tensors are one safetensors file, flushed to disk before the journal names it,
so a journal never names what is not there. A journal belongs to one request: source files, recipe,
calibration tokens, format and versions make its fingerprint, and another request starts over.
Threads decide the order of sums inside matrix products, so a resumed run uses as many as the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.artifact import LayerReport, sha256
from qtool.errors import QtoolError
from qtool.output import flush_to_disk

_FOLDER = ".work"
_JOURNAL = "journal.json"


@dataclass(frozen=True, slots=True)
class FinishedBlock:
    """One block's outcome.

    file     packed and changed tensors, by their names in the artifact
    digests  linear -> sha256 of the float32 weight that the packed one decodes to
    changed  tensors of the source that are in the file with new values
    """

    file: str
    sha256: str
    reports: tuple[LayerReport, ...]
    digests: Mapping[str, str]
    changed: tuple[str, ...]


class Journal:
    """The record of a run in its output folder."""

    def __init__(self, stage: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = stage / _FOLDER
        self.blocks: list[FinishedBlock] = []
        self.threads = torch.get_num_threads()
        self._fingerprint = hashlib.sha256(
            json.dumps(fingerprint, sort_keys=True).encode()
        ).hexdigest()
        # Why an earlier run's blocks are not used, where there were any.
        self.restart_reason: str | None = None
        found = self._read()
        if found is None:
            for path in stage.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.folder.mkdir(parents=True)
            return
        self.threads = found["threads"]
        self.blocks = found["blocks"]

    @property
    def progress(self) -> Progress:
        return Progress(self.folder.resolve(), tuple(self.blocks), self.threads)

    def add(
        self,
        tensors: Mapping[str, Tensor],
        reports: tuple[LayerReport, ...],
        digests: Mapping[str, str],
        changed: tuple[str, ...],
    ) -> None:
        """Record the next block; on return it is on disk."""
        path = self.folder / f"block-{len(self.blocks):05d}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
        except (OSError, SafetensorError) as error:
            raise QtoolError(
                f"{path.name} could not be written: {error}", "is the disk full?"
            ) from error
        flush_to_disk(path)
        self.blocks.append(FinishedBlock(path.name, sha256(path), reports, digests, changed))
        self._write()

    def tensors(self, index: int) -> dict[str, Tensor]:
        """All tensors of a finished block."""
        with safe_open(str(self.folder / self.blocks[index].file), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    def tensor(self, index: int, name: str) -> Tensor:
        with safe_open(str(self.folder / self.blocks[index].file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def names(self) -> dict[str, int]:
        """Every tensor in a finished block's file, with the block."""
        names = {}
        for index, block in enumerate(self.blocks):
            with safe_open(str(self.folder / block.file), framework="pt") as file:
                names.update(dict.fromkeys(file.keys(), index))
        return names

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def _write(self) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "threads": self.threads,
            "blocks": [asdict(block) for block in self.blocks],
        }
        new = self.folder / f"{_JOURNAL}.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        flush_to_disk(new)
        os.replace(new, self.folder / _JOURNAL)
        flush_to_disk(self.folder)

    def _read(self) -> dict[str, Any] | None:
        """An earlier run's record; None where there is none that can be used."""
        path = self.folder / _JOURNAL
        if not path.is_file():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["fingerprint"] != self._fingerprint:
                self.restart_reason = "the model, the recipe, the data or a version is another"
                return None
            blocks = [_block(item) for item in state["blocks"]]
            threads = int(state["threads"])
        except (ValueError, KeyError, TypeError):
            self.restart_reason = "its journal is damaged"
            return None
        for block in blocks:
            file = self.folder / block.file
            if not file.is_file() or sha256(file) != block.sha256:
                self.restart_reason = f"{block.file} is damaged"
                return None
        return {"threads": threads, "blocks": blocks}


@dataclass(frozen=True, slots=True)
class Progress:
    """What other ranks need to know of a journal: where its finished blocks are."""

    folder: Path
    blocks: tuple[FinishedBlock, ...]
    threads: int

    @classmethod
    def none(cls) -> Progress:
        return cls(Path(), (), 1)


class FollowedJournal(Journal):
    """Another rank's view of a journal: blocks that were finished before are read where they are,
    which all ranks must see; those that all ranks finish now are on disk once, and not here.

    folder  for this rank's own scratch files
    """

    def __init__(self, progress: Progress, folder: Path) -> None:
        self.folder = folder
        self.blocks = list(progress.blocks)
        self.threads = progress.threads
        self.restart_reason = None
        self._finished = progress.folder

    def add(
        self,
        tensors: Mapping[str, Tensor],
        reports: tuple[LayerReport, ...],
        digests: Mapping[str, str],
        changed: tuple[str, ...],
    ) -> None:
        self.blocks.append(FinishedBlock("", "", reports, digests, changed))

    def tensors(self, index: int) -> dict[str, Tensor]:
        with safe_open(str(self._finished / self.blocks[index].file), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}


def _block(data: Mapping[str, Any]) -> FinishedBlock:
    reports = tuple(LayerReport.from_dict(report) for report in data["reports"])
    return FinishedBlock(
        data["file"], data["sha256"], reports, data["digests"], tuple(data["changed"])
    )


def digest(weight: Tensor) -> str:
    """sha256 of a dequantized weight, float32 [out, in]."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.numpy().view("u1").data).hexdigest()
