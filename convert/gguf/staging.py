"""Files of an export until they are whole: hidden, and taken up again after a crash.

    .model.gguf.partial/       beside the output
        model.gguf             the files under their own names
        journal                what is in them: a line of JSON for the export, one for each tensor
        lock                   held while a process writes

A tensor's line is written after its bytes, with their checksum (CRC-32). The next run of the same
export reads the lines again, compares header and bytes with them, and goes on behind the last
tensor that is right, so the order in which a crash let things reach the disk does not matter. The
export's line is a hash of all that the bytes depend on; under another one nothing is kept.

Files take their names when the last is complete and checked, the first part of a model last of
all: where it is, the others are. An error in the data leaves nothing behind; an interrupt, a full
disk or the end of the process leave the folder for the next run.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from qtool.convert.gguf.writer import DiskError, GgufLayout, LayoutFile, TensorInfo, make_folder
from qtool.errors import OutputExists, QtoolError, UsageError
from qtool.output import flush_to_disk, require_disk_space

_READ_BYTES = 1 << 24


class _Place(NamedTuple):
    """A tensor of the export: which file, which of its tensors."""

    file: int
    number: int


class _Line(NamedTuple):
    """A finished tensor in the journal; notes are what its data told."""

    name: str
    crc: int
    notes: tuple[str, ...]


class ExportStage:
    """with ExportStage(out, targets, layouts, fingerprint) as stage:
        ...  # write the tensors from stage.finished on
        stage.publish()

    out          what the folder is named after
    targets      where the files go, in the order of `layouts`
    fingerprint  of all that the bytes depend on
    """

    def __init__(
        self,
        out: Path,
        targets: Sequence[Path],
        layouts: Sequence[GgufLayout],
        fingerprint: str,
        *,
        force: bool = False,
    ) -> None:
        taken = next((path for path in targets if path.exists()), None)
        if taken is not None and not force:
            raise OutputExists(taken)
        self._targets = tuple(targets)
        self._layouts = tuple(layouts)
        self._fingerprint = fingerprint
        self._folder = out.with_name(f".{out.name}.partial")
        self._places = [
            _Place(file, number)
            for file, layout in enumerate(layouts)
            for number in range(len(layout.tensors))
        ]
        self._lines: list[_Line] = []
        self._crc = 0
        self._open: LayoutFile | None = None
        self._open_number = -1
        self._journal: IO[str] | None = None
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> int:
        """Tensors that are written, counted from the first."""
        return len(self._lines)

    @property
    def notes(self) -> tuple[str, ...]:
        """Of all finished tensors, those of an earlier run too."""
        return tuple(note for line in self._lines for note in line.notes)

    @property
    def first(self) -> Path:
        """The first file as it is now, hidden."""
        return self._staged(0)

    def _staged(self, number: int) -> Path:
        return self._folder / self._targets[number].name

    # -- beginning ------------------------------------------------------------------------------

    def __enter__(self) -> ExportStage:
        make_folder(self._targets[0])
        try:
            if self._folder.is_file():
                self._folder.unlink()
            self._folder.mkdir(exist_ok=True)
            self._lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise QtoolError(
                f"{self._targets[0]} cannot be made: {error.strerror or error}"
            ) from error
        _hold(self._lock, self._targets[0])
        try:
            self._lines = self._found()
            kept = {self._staged(place.file) for place in self._places[: self.finished]}
            for path in self._folder.iterdir():
                if path not in kept and path.name != "lock":
                    path.unlink()
            there = sum(path.stat().st_size for path in kept)
            total = sum(layout.nbytes for layout in self._layouts)
            require_disk_space(self._folder.parent, total - there)
            self._begin_journal()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _found(self) -> list[_Line]:
        """The journal's lines up to the first that does not hold."""
        lines = _read_journal(self._folder / "journal", self._fingerprint)
        good: list[_Line] = []
        # a file is complete, or the one at which an earlier run stopped
        for number, layout in enumerate(self._layouts):
            wanted = lines[len(good) : len(good) + len(layout.tensors)]
            held = _good_tensors(self._staged(number), layout, wanted)
            good += wanted[:held]
            if held < len(layout.tensors):
                break
        return good

    def _begin_journal(self) -> None:
        """Anew, with the lines that hold."""
        path, fresh = self._folder / "journal", self._folder / "journal.new"
        lines = [json.dumps({"export": self._fingerprint})]
        lines += [json.dumps(line._asdict()) for line in self._lines]
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        fresh.replace(path)
        self._journal = path.open("a", encoding="utf-8")

    # -- writing --------------------------------------------------------------------------------

    def write(self, info: TensorInfo, slab: Tensor, notes: Sequence[str] = ()) -> None:
        """Append bytes (uint8, contiguous, CPU) of `info`, the next tensor that is not complete."""
        file = self._file(self._places[self.finished].file)
        data = slab.contiguous()
        self._crc = zlib.crc32(data.numpy().data, self._crc)
        if file.write(info, data):
            file.flush()
            self._note(_Line(info.name, self._crc, tuple(notes)))
            self._crc = 0

    def _file(self, number: int) -> LayoutFile:
        if self._open is None or self._open_number != number:
            if self._open is not None:
                self._open.close()
            held = sum(place.file == number for place in self._places[: self.finished])
            layout, shown = self._layouts[number], self._targets[number]
            self._open = LayoutFile(self._staged(number), layout, shown=shown, finished=held)
            self._open_number = number
        return self._open

    def _note(self, line: _Line) -> None:
        assert self._journal is not None
        try:
            self._journal.write(json.dumps(line._asdict()) + "\n")
            self._journal.flush()
        except OSError as error:
            raise DiskError(
                f"{self._targets[0]} cannot be written: {error.strerror or error}",
                "is the disk full?",
            ) from error
        self._lines.append(line)

    def read(self, number: int) -> Tensor:
        """A finished tensor's bytes, uint8 [rows, row_bytes]."""
        place = self._places[number]
        layout = self._layouts[place.file]
        info = layout.tensors[place.number]
        with self._staged(place.file).open("rb") as file:
            file.seek(layout.offsets[place.number])
            data = bytearray(file.read(info.nbytes))
        assert len(data) == info.nbytes, info.name
        return torch.frombuffer(data, dtype=torch.uint8).view(info.rows, -1)

    # -- the end --------------------------------------------------------------------------------

    def complete(self) -> None:
        """Close the last file, and write those that have no tensors."""
        assert self.finished == len(self._places), "not every tensor was written"
        if self._open is not None:
            self._open.close()
        for number, layout in enumerate(self._layouts):
            if not layout.tensors:
                LayoutFile(self._staged(number), layout, shown=self._targets[number]).close()

    def publish(self) -> None:
        """Flush the files to disk and give them their names."""
        for number in range(len(self._targets)):
            flush_to_disk(self._staged(number))
        for number in reversed(range(len(self._targets))):
            self._staged(number).replace(self._targets[number])
        flush_to_disk(self._targets[0].parent)  # the renames themselves, not only the data

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(DiskError):
            if self._open is not None:
                self._open.close()
        if self._journal is not None:
            self._journal.close()
        data_error = kind is not None and issubclass(kind, Exception) and kind is not DiskError
        if kind is None or data_error or not self._lines:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _read_journal(path: Path, fingerprint: str) -> list[_Line]:
    """What the journal of an export says is written; nothing where it is another export's."""
    found: list[_Line] = []
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or torn from here on
        head, *rest = path.read_text(encoding="utf-8").split("\n")[:-1]
        if json.loads(head) == {"export": fingerprint}:
            for text in rest:
                line = json.loads(text)
                found.append(_Line(line["name"], line["crc"], tuple(line["notes"])))
    return found


def _good_tensors(path: Path, layout: GgufLayout, lines: Sequence[_Line]) -> int:
    """How many tensors at the beginning of a file are what the journal says they are."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        if file.read(len(layout.header)) != layout.header:
            return 0
        for number, (info, line) in enumerate(zip(layout.tensors, lines, strict=False)):
            file.seek(layout.offsets[number])
            if info.name != line.name or _checksum(file, info.nbytes) != line.crc:
                return number
        # the padding behind the last one may be missing; it is not worth a look of its own
        padded = path.stat().st_size >= layout.end_of(len(lines))
        return len(lines) if padded else max(0, len(lines) - 1)


def _checksum(file: IO[bytes], nbytes: int) -> int | None:
    """CRC-32 of the next bytes, None where there are fewer."""
    crc, left = 0, nbytes
    while left > 0:
        data = file.read(min(left, _READ_BYTES))
        if not data:
            return None
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def _hold(lock: IO[str], target: Path) -> None:
    """Refuse to write what another process is writing. Windows has no such locks."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UsageError(
            f"{target} is being written by another process", "wait for it, or name another --out"
        ) from error
