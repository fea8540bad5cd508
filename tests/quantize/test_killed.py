"""A run killed at random points, again and again, ends with the bytes of an unbroken one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.settings import child_environment

# Forks, so that one import of torch serves every run. Delays are shares of the time that a whole
# run takes here.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from qtool.quantize.job import prepare
from qtool.quantize.pipeline import Silent, run
from qtool.recipe import load_recipe

MODEL = "model.safetensors"
model, folder, recipe, effort, seed = sys.argv[1:]
wanted = load_recipe(recipe)
wanted = wanted.with_options(num_samples=4, sequence_length=32, effort=effort or None)

def quantize(out, kill_after=None):
    child = os.fork()
    if child == 0:
        run(prepare(model, wanted), out, listener=Silent())
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)

whole, killed = Path(folder) / "whole", Path(folder) / "killed"
begun = time.perf_counter()
if quantize(whole):
    sys.exit("the unbroken run failed")
seconds = time.perf_counter() - begun
choose = random.Random(int(seed))
num_kills = 0
while num_kills < 2:
    ended = quantize(killed, choose.random() * seconds)
    if killed.exists():  # it was faster this time
        if (killed / MODEL).read_bytes() != (whole / MODEL).read_bytes():
            sys.exit(f"other bytes after {num_kills} kills")
        shutil.rmtree(killed)
        seconds /= 2
    elif ended == -signal.SIGKILL:
        num_kills += 1
    else:
        sys.exit(f"ended with {ended}")
if quantize(killed):
    sys.exit("the last run failed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recipe", "effort", "seed"),
    [
        ("llama", "int4", "default", 1),
        ("qwen3_moe", "int4", "best", 2),
        ("llama", "awq", "", 3),
    ],
)
def test_a_run_killed_at_random_points_ends_with_the_same_bytes(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    recipe: str,
    effort: str,
    seed: int,
) -> None:
    source = tiny_checkpoint(family, num_hidden_layers=3)
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path), recipe, effort, str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(OMP_NUM_THREADS="1"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))
