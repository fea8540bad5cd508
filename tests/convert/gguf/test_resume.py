"""Exports that were stopped go on where they stopped, and end with the same bytes."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qtool.convert.formats import open_weights
from qtool.convert.gguf.export import write_gguf
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf.plan import ExportPlan, plan_export
from qtool.convert.gguf.split import SplitLimits
from qtool.convert.run import convert_model
from qtool.convert.search import BestSearch
from qtool.errors import QtoolError, UsageError, VerificationFailed
from qtool.recipe import Calibration
from qtool.source import Source

TinyCheckpoint = Callable[..., Path]

# Converts in children that it kills when they have written some tensors more, again and again.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.run import convert_model

model, out, split, seed = sys.argv[1:]
options = GgufOptions(split_max_bytes=int(split) or None)
journal = Path(out).with_name("." + Path(out).name + ".partial") / "journal"
choose = random.Random(int(seed))

def written():
    try:
        return journal.read_bytes().count(b"\\n") - 1
    except FileNotFoundError:  # not begun, or finished and put away between two looks
        return 0

for more in [choose.randint(0, 25) for _ in range(5)] + [None]:
    before = written()
    child = os.fork()
    if child == 0:
        convert_model(model, to="gguf", type="Q4_K_M", out=out, gguf=options)
        os._exit(0)
    while more is not None and written() < before + more:
        time.sleep(0.001)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    if more is not None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    print(written())
    assert not list(Path(out).parent.glob("*.gguf"))
"""


def plan_of(folder: Path, type: str = "Q4_K_M", *, limits: SplitLimits | None = None) -> ExportPlan:
    return plan_export(open_weights(Source("tiny", folder)), type, limits=limits)


class Stop:
    """A progress callback that interrupts after some slabs."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.first = 0

    def __call__(self, nbytes: int) -> None:
        self.first = self.first or nbytes
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def stopped(plan: ExportPlan, out: Path, after: int) -> Stop:
    stop = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(plan, out, progress=stop)
    assert not out.exists()
    return stop


def stage(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def num_lines(out: Path) -> int:
    return len((stage(out) / "journal").read_text().splitlines()) - 1


@pytest.mark.parametrize("split", [pytest.param(0, marks=pytest.mark.slow), 2_000_000])
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bytes(
    split: int, books_7m: Path, tmp_path: Path
) -> None:
    options = GgufOptions(split_max_bytes=split or None)
    once = tmp_path / "once"
    convert_model(str(books_7m), to="gguf", type="Q4_K_M", out=once / "model.gguf", gguf=options)
    folder = tmp_path / "killed"
    folder.mkdir()
    arguments = [str(books_7m), str(folder / "model.gguf"), str(split), "7"]
    run = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    left = [int(line) for line in run.stdout.split()]
    assert left == sorted(left)  # what was written is kept
    assert 0 < left[-1] <= 74
    assert "tensors are there already" in run.stderr
    names = sorted(path.name for path in folder.glob("*.gguf"))
    assert names == sorted(path.name for path in once.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (once / name).read_bytes(), name
    assert not list(folder.glob(".*"))


def test_finished_tensors_are_not_made_again(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tiny_checkpoint("llama"))
    out = tmp_path / "model.gguf"
    stopped(plan, out, after=9)
    assert "the same command goes on from there" in capsys.readouterr().err
    count = num_lines(out)
    sizes: list[int] = []
    write_gguf(plan, out, progress=sizes.append)
    assert sizes[0] == sum(tensor.info.nbytes for tensor in plan.tensors[:count])
    assert sum(sizes) == sum(tensor.info.nbytes for tensor in plan.tensors)
    assert f"model.gguf: {count} of {len(plan.tensors)} tensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def spoil_last_byte(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.seek(-33, 2)  # before any padding
        byte = file.read(1)[0]
        file.seek(-33, 2)
        file.write(bytes([byte ^ 1]))


def cut_data(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)


def cut_line(folder: Path) -> None:
    text = (folder / "journal").read_text()
    (folder / "journal").write_text(text[:-10])


def spoil_header(folder: Path) -> None:
    with (folder / "model.gguf").open("r+b") as file:
        file.write(b"X")


def lose_file(folder: Path) -> None:
    (folder / "model.gguf").unlink()


@pytest.mark.parametrize("damage", [spoil_last_byte, cut_data, cut_line, spoil_header, lose_file])
def test_what_a_crash_tore_is_made_again(
    damage: Callable[[Path], None], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    plan = plan_of(tiny_checkpoint("llama"))
    out, whole = tmp_path / "model.gguf", tmp_path / "whole.gguf"
    write_gguf(plan, whole, progress=lambda n: None)
    stopped(plan, out, after=9)
    damage(stage(out))
    write_gguf(plan, out, progress=lambda n: None)
    assert out.read_bytes() == whole.read_bytes()


def test_another_export_keeps_nothing(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    out, whole = tmp_path / "model.gguf", tmp_path / "whole.gguf"
    stopped(plan_of(folder), out, after=9)
    write_gguf(plan_of(folder, "Q5_K_M"), out, progress=lambda n: None)  # another type
    write_gguf(plan_of(folder, "Q5_K_M"), whole, progress=lambda n: None)
    assert out.read_bytes() == whole.read_bytes()
    out.unlink()
    stopped(plan_of(folder), out, after=9)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] += 1  # another model of the same shapes
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    write_gguf(plan_of(folder), out, progress=lambda n: None)
    assert "already" not in capsys.readouterr().err
    write_gguf(plan_of(folder), whole, force=True, progress=lambda n: None)
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_do_not_write_one_file(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    plan, out = plan_of(tiny_checkpoint("llama")), tmp_path / "model.gguf"

    def second(nbytes: int) -> None:
        with pytest.raises(UsageError, match="being written by another process"):
            write_gguf(plan, out, progress=lambda n: None)

    write_gguf(plan, out, progress=second)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_full_disk_keeps_what_is_there(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plan, out = plan_of(tiny_checkpoint("llama")), tmp_path / "model.gguf"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.nbytes // 2, before[1]))
        with pytest.raises(QtoolError, match=r"/model\.gguf cannot be written") as error:
            write_gguf(plan, out, progress=lambda n: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert ".partial" not in error.value.message
    count = num_lines(out)
    assert 0 < count < len(plan.tensors)
    sizes: list[int] = []
    write_gguf(plan, out, progress=sizes.append)
    assert sizes[0] == sum(tensor.info.nbytes for tensor in plan.tensors[:count])


def test_a_file_that_is_not_as_meant_leaves_nothing(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    plan = plan_of(tiny_checkpoint("llama"), limits=SplitLimits(max_tensors=8))
    seen: list[Path] = []

    def check(first: Path) -> None:
        seen.append(first)
        assert first.is_file()
        assert not list(tmp_path.glob("*.gguf"))
        raise VerificationFailed("no")

    with pytest.raises(VerificationFailed):
        write_gguf(plan, tmp_path / "model.gguf", progress=lambda n: None, check=check)
    assert seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [pytest.param(9, marks=pytest.mark.slow), 20])
def test_a_search_goes_on_behind_the_blocks_that_are_written(
    after: int, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    def searched() -> ExportPlan:
        plan = plan_of(tiny_checkpoint("llama", intermediate_size=256), "Q3_K_M")
        return dataclasses.replace(plan, prepared=BestSearch(plan, Calibration(None, 4, 64)))

    whole, out = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    write_gguf(searched(), whole, progress=lambda n: None)
    stopped(searched(), out, after=after)
    notes = write_gguf(searched(), out, progress=lambda n: None).notes
    assert out.read_bytes() == whole.read_bytes()
    # stopped in the first block: all is searched; in the second: its prefix is taken up
    assert ("7 linears are those of the run that was interrupted" in notes) == (after == 20)


def test_notes_of_finished_tensors_are_kept(
    packed_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed_checkpoint("compressed-tensors", "int4-g128-sym", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] *= 1 + 2.0**-13  # no half
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(source, "Q4_0")
    whole = write_gguf(plan, tmp_path / "whole.gguf", progress=lambda n: None)
    assert sum("scales rounded" in note for note in whole.notes) == 14
    out = tmp_path / "model.gguf"
    stopped(plan, out, after=12)
    assert json.loads((stage(out) / "journal").read_text().splitlines()[-1])["notes"]
    assert write_gguf(plan, out, progress=lambda n: None).notes == whole.notes
    assert out.read_bytes() == whole.paths[0].read_bytes()
