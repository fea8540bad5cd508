"""Calibration data shared out among ranks that torchrun starts: the statistics of all of it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.quantize.job import prepare
from qtool.quantize.pipeline import require_shareable
from qtool.recipe import load_recipe
from qtool.settings import Launched, child_environment, launched

MODEL = "builtin:books-7m"
DATA = ("--num-samples", "32", "--sequence-length", "128")


def quantize(ranks: int, model: str, out: Path, *options: str, fails: bool = False) -> str:
    """What the command writes to stderr."""
    command = ["-m", "qtool", "quantize", model, "--out", str(out), *options]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else ()), *command],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(PYTHONSAFEPATH="1", OMP_NUM_THREADS="1"),
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_ranks_write_the_bytes_that_one_process_writes(tmp_path: Path) -> None:
    """So their KL divergence is the same too, whatever the number of ranks."""
    quantize(1, MODEL, tmp_path / "alone", *DATA)
    for ranks in (2, 3):
        out = tmp_path / str(ranks)
        said = quantize(ranks, MODEL, out, *DATA)
        assert said.count("model.layers.0  1/8") == 1  # rank 0 speaks for all
        assert weights(out) == weights(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["awq", "gptq"])
def test_experts_are_shared_too(
    recipe: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Which experts a rank's first chunk reaches differs; rank 0's view of them is everybody's."""
    model = str(tiny_checkpoint("qwen3_moe"))
    for ranks, name in ((1, "alone"), (2, "shared")):
        quantize(ranks, model, tmp_path / name, "--recipe", recipe, *DATA)
    assert weights(tmp_path / "alone") == weights(tmp_path / "shared")


@pytest.mark.slow
def test_more_ranks_than_chunks_are_refused(tmp_path: Path) -> None:
    few = ("--num-samples", "1", "--sequence-length", "128")
    said = quantize(2, MODEL, tmp_path / "out", *few, fails=True)
    assert "1 chunks of calibration data cannot be shared by 2 ranks" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "effort", "problem"),
    [("rtn-int4", None, "takes no calibration data"), ("int4", "best", "gradient steps")],
)
def test_recipes_that_cannot_be_shared_are_refused(
    recipe: str, effort: str | None, problem: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    wanted = load_recipe(recipe).with_options(effort=effort)
    job = prepare(str(tiny_checkpoint("llama")), wanted)
    with pytest.raises(UsageError, match=problem):
        require_shareable(job)


def test_what_torchrun_says_is_read() -> None:
    said = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert launched(said) == Launched(1, 4, 1, "host:29500")
    assert launched({}) is None
    assert launched({**said, "RANK": "0", "WORLD_SIZE": "1"}) is None
    with pytest.raises(UsageError, match="RANK is '4' and WORLD_SIZE '4'"):
        launched({**said, "RANK": "4"})


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "qtool", "quantize", MODEL, "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(
                PYTHONSAFEPATH="1",
                RANK="0",
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
        )
    assert done.returncode == 1
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
