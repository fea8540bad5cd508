"""The tasks: where their questions come from, and which number of theirs is quoted.

A name of the table is looked for in the folder given with --task-data, by file name
(`hellaswag*.jsonl`), else its data set is taken from the Hub. A path is a task of its own. Read are

    .jsonl .json .parquet     rows, whose keys tell what they are (`items`)
    .csv                      MMLU (question, A, B, C, D, answer letter) or WinoGrande as llama.cpp
                              has it (number, sentence, option 1, option 2, answer 1 or 2)
    .txt                      HellaSwag as llama.cpp has it: context, number of the right ending,
                              four endings, a line each

and all of them packed with gzip or bzip2.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qtool.errors import FormatError, QtoolError, UnknownName, UsageError
from qtool.runtime.evaluate.tasks.items import (
    Item,
    blank_filled,
    described,
    following,
    lettered,
    read_row,
)

Metric = Literal["acc", "acc_norm"]

# A task file is small; what unpacks to more than this is no task file.
MAX_FILE_BYTES = 1 << 30


class HubData(NamedTuple):
    path: str
    config: str | None
    split: str


class Known(NamedTuple):
    """metric: what is quoted of the task; "acc_norm" divides by the characters of a choice."""

    metric: Metric
    hub: HubData


TASKS: dict[str, Known] = {
    "hellaswag": Known("acc_norm", HubData("Rowan/hellaswag", None, "validation")),
    "arc_easy": Known("acc", HubData("allenai/ai2_arc", "ARC-Easy", "test")),
    "arc_challenge": Known("acc_norm", HubData("allenai/ai2_arc", "ARC-Challenge", "test")),
    "piqa": Known("acc", HubData("baber/piqa", None, "validation")),
    "winogrande": Known("acc", HubData("allenai/winogrande", "winogrande_xl", "validation")),
    "lambada": Known("acc", HubData("EleutherAI/lambada_openai", "default", "test")),
    "openbookqa": Known("acc_norm", HubData("allenai/openbookqa", "main", "test")),
    "mmlu": Known("acc", HubData("cais/mmlu", "all", "test")),
}


@dataclass(frozen=True, slots=True)
class Task:
    """name, the number that is quoted, where the items come from in words, and the items used.

    num_items   how many there are; the first len(items) of them are used
    """

    name: str
    metric: Metric
    origin: str
    items: tuple[Item, ...]
    num_items: int


def open_task(wanted: str, *, folder: Path | None = None, limit: int | None = None) -> Task:
    """A task by name, or a file of questions by path; the first `limit` items of it."""
    if limit is not None and limit < 1:
        raise UsageError(f"the limit of items is {limit}, must be at least 1")
    path = Path(wanted).expanduser()
    if path.is_file():
        name, metric = path.name.partition(".")[0], _metric_of(path.name)
        items = read_file(path)
        origin = str(path)
    elif wanted in TASKS:
        name, metric = wanted, TASKS[wanted].metric
        file = _find(wanted, folder)
        items = _from_hub(wanted, TASKS[wanted].hub) if file is None else read_file(file)
        origin = f"{TASKS[wanted].hub.path} on the Hub" if file is None else str(file)
    elif "/" in wanted or path.suffix:
        raise UsageError(f"no file of questions at {wanted}")
    else:
        raise UnknownName("task", wanted, TASKS)
    if not items:
        raise FormatError(f"{origin} holds no questions")
    if len({item.gold is None for item in items}) > 1:
        raise FormatError(
            f"{origin} mixes questions with choices and texts to be continued",
            "put them into two files: what is counted differs",
        )
    return Task(name, metric, origin, tuple(items[:limit]), len(items))


def require_different_names(tasks: Sequence[Task]) -> None:
    """Raise UsageError if two tasks would stand under one name in a report."""
    for index, task in enumerate(tasks):
        if task.name in {other.name for other in tasks[:index]}:
            raise UsageError(f"two tasks are called {task.name}", "name another file, or rename it")


def _metric_of(file_name: str) -> Metric:
    known = next((name for name in TASKS if file_name.startswith(name)), None)
    return "acc" if known is None else TASKS[known].metric


def _find(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "--task-data names a folder of task files")
    # "openbook_qa" and "openbookqa", "lambada_openai" and "lambada" are the same to everybody.
    plain = name.replace("_", "")
    found = sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and file.name.replace("_", "").startswith(plain)
        and _reader_of(file) is not None
    )
    return found[0] if found else None


def _from_hub(name: str, hub: HubData) -> list[Item]:
    import datasets

    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    # The library raises a dozen kinds, its own and those of every layer under it.
    except Exception as error:
        raise QtoolError(
            f"the questions of {name} could not be had from {hub.path} on the Hub: {error}",
            "put its file into a folder and name that with --task-data",
        ) from error
    return _read_rows(rows, hub.path)


def read_file(path: Path) -> list[Item]:
    """The items of one file; raises FormatError with the file and the row."""
    reader = _reader_of(path)
    if reader is None:
        raise UsageError(
            f"{path.name} is no file of questions that is read",
            f"known are {', '.join(READERS)}, and these packed as .gz or .bz2",
        )
    return reader(path)


def _reader_of(path: Path) -> Callable[[Path], list[Item]] | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2")]
    return READERS.get(suffixes[-1]) if suffixes else None


def _read_text(path: Path) -> str:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data: bytes = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise FormatError(f"{path} holds more than {MAX_FILE_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read as text: {error}") from error


def _read_rows(rows: Sequence[object] | Any, origin: str) -> list[Item]:
    items = []
    for number, row in enumerate(rows, start=1):
        try:
            items.append(read_row(row))
        except ValueError as error:
            raise FormatError(f"{origin}, row {number}: {error}") from error
    return items


def _read_jsonl(path: Path) -> list[Item]:
    def rows() -> Iterator[object]:
        # Not splitlines: a text in JSON may hold U+2028, which is a line's end to Python.
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                yield _json(line, f"{path}, line {number}")

    return _read_rows(rows(), str(path))


def _read_json(path: Path) -> list[Item]:
    value = _json(_read_text(path), str(path))
    if not isinstance(value, list):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}, not a list of rows")
    return _read_rows(value, str(path))


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from error


def _read_parquet(path: Path) -> list[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise FormatError(f"{path} is not readable Parquet: {error}") from error
    return _read_rows(rows, str(path))


def _read_csv(path: Path) -> list[Item]:
    subject = path.name.partition(".")[0]
    for split in ("_test", "_val", "_dev"):
        subject = subject.removesuffix(split)
    description = described(subject)

    def item(row: list[str]) -> Item:
        if len(row) == 5 and "_" in row[1]:
            return blank_filled(row[1], row[2:4], int(row[4]) - 1)
        letters = "ABCDEFGHIJ"[: len(row) - 2]
        if len(row) < 4 or row[-1].strip() not in letters:
            raise ValueError(f"{len(row)} columns, the last one {row[-1:]}")
        return lettered(row[0], row[1:-1], letters.index(row[-1].strip()), description)

    items = []
    try:
        for number, row in enumerate(csv.reader(_read_text(path).splitlines(keepends=True)), 1):
            try:
                if row:
                    items.append(item(row))
            except ValueError as error:
                raise FormatError(
                    f"{path}, row {number}: {error}",
                    "a row is question, answers, letter of the right one (no header)",
                ) from error
    except csv.Error as error:
        raise FormatError(f"{path} is not CSV: {error}") from error
    return items


def _read_hellaswag(path: Path) -> list[Item]:
    lines = _read_text(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    items = []
    for start in range(0, len(lines), 6):
        try:
            context, gold, *endings = lines[start : start + 6]
            if len(endings) != 4:
                raise ValueError("the last question has fewer than six lines")
            items.append(following(context, endings, int(gold)))
        except ValueError as error:
            raise FormatError(
                f"{path}, line {start + 1}: {error}",
                "a question is six lines: context, number of the right ending, four endings",
            ) from error
    return items


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
READERS: dict[str, Callable[[Path], list[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_hellaswag,
}
