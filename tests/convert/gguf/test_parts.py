"""Models in several files, as gguf-split leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.convert.formats import open_weights
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.parts import open_parts
from qtool.convert.gguf.plan import plan_export
from qtool.convert.gguf.types import ValueType
from qtool.convert.gguf.writer import GgufLayout, GgufWriter, TensorInfo
from qtool.errors import FormatError
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]


def part_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.gguf"


def split(whole: Path, folder: Path, count: int, changed: dict[str, int] | None = None) -> Path:
    """What gguf-split does; `changed` spoils keys of the second part."""
    file = GgufFile.open(whole)
    folder.mkdir(exist_ok=True)
    names = list(file.tensors)
    share = -(-len(names) // count)
    for number in range(count):
        keys = {"no": number, "count": count, "tensors_count": len(names)}
        if number == 1:
            keys |= changed or {}
        entries = [
            KeyValue("split.no", keys["no"], ValueType.UINT16),
            KeyValue("split.tensors.count", keys["tensors_count"], ValueType.INT32),
            KeyValue("split.count", keys["count"], ValueType.UINT16),
        ]
        if number == 0:
            entries = [*file.entries, *entries]
        mine = [file.tensors[name] for name in names[number * share : (number + 1) * share]]
        infos = [TensorInfo(entry.name, entry.shape, entry.type) for entry in mine]
        path = folder / part_name(number + 1, count)
        with GgufWriter(path, GgufLayout.of(entries, infos)) as writer:
            for info in infos:
                writer.write(info, file.data(info.name))
    return folder / part_name(1, count)


@pytest.fixture
def whole(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    folder = tiny_checkpoint("llama")
    path = tmp_path / "whole.gguf"
    plan = plan_export(open_weights(Source("tiny", folder)), "Q4_K_M")
    write_gguf(plan, path, progress=lambda size: None)
    return path


@pytest.mark.parametrize("count", [2, 5])
def test_parts_are_read_as_the_whole(count: int, whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "parts", count)
    parts, one = open_parts(first), GgufFile.open(whole)
    assert parts.entries == one.entries
    assert list(parts.tensors) == list(one.tensors)
    for name in one.tensors:
        assert parts.data(name).equal(one.data(name)), name
    # the whole way: a file of them is the file that was split
    again = tmp_path / "again.gguf"
    plan = plan_export(open_weights(Source("parts", first)), "Q4_K_M")
    write_gguf(plan, again, progress=lambda size: None)
    assert again.read_bytes() == whole.read_bytes()


def test_a_whole_file_is_itself(whole: Path) -> None:
    assert open_parts(whole).entries == GgufFile.open(whole).entries


def test_parts_that_do_not_belong_together_are_refused(whole: Path, tmp_path: Path) -> None:
    good = split(whole, tmp_path / "good", 3)
    with pytest.raises(FormatError, match="part 2 of 3") as error:
        open_parts(good.with_name(part_name(2, 3)))
    assert part_name(1, 3) in str(error.value.hint)

    (tmp_path / "good" / part_name(3, 3)).unlink()
    with pytest.raises(FormatError, match=r"model-00003-of-00003\.gguf is not beside it"):
        open_parts(good)

    for key, value in {"no": 2, "count": 4, "tensors_count": 7}.items():
        with pytest.raises(FormatError, match="no part 2 of 3"):
            open_parts(split(whole, tmp_path / key, 3, {key: value}))

    twice = split(whole, tmp_path / "twice", 2)
    other = GgufFile.open(twice.with_name(part_name(2, 2)))
    info = GgufFile.open(twice).tensors["token_embd.weight"]
    infos = [TensorInfo(info.name, info.shape, info.type)]
    layout = GgufLayout.of(other.entries, infos)
    data = GgufFile.open(twice).data(info.name)
    with GgufWriter(twice.with_name(part_name(2, 2)), layout, force=True) as writer:
        writer.write(infos[0], data)
    with pytest.raises(FormatError, match="in another part too"):
        open_parts(twice)


def test_a_part_under_another_name_is_refused(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "parts", 2)
    renamed = first.rename(first.with_name("mine.gguf"))
    with pytest.raises(FormatError, match="part 1 of 2, and its name does not say so"):
        open_parts(renamed)
