"""Ranks as processes: they write what one process writes, and their end is noticed and said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.errors import UsageError
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM
from qtool.runtime.memory import MemoryBudget, NotEnoughMemory
from qtool.runtime.parallel.members import Errand
from qtool.runtime.parallel.message import ClearBlocks
from qtool.runtime.parallel.process_group import choose_backend
from qtool.runtime.parallel.team import RankLost, Team
from qtool.settings import child_environment

MODEL = "builtin:books-7m"
PROMPTS = ["It was a cold evening", "It was a cold evening, and the sea", "Call", "The old man"]


def engine(size: int, **options: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 8,
        "max_num_batched_tokens": 16,
        **options,
    }
    return LLM(MODEL, tensor_parallel_size=size, **settings)


def texts(llm: LLM, **sampling: Any) -> list[list[str]]:
    wanted = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **sampling}
    asked = SamplingParams(**wanted)
    found = llm.generate(PROMPTS, asked, use_tqdm=False)
    return [[output.text for output in answer.outputs] for answer in found]


def is_gone(pid: int, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_two_ranks_write_what_one_process_does_until_one_is_killed() -> None:
    """Prompts in chunks, shared beginnings (blocks are copied), steps of several sequences."""
    torch.set_num_threads(2)
    alone, shared = engine(1), engine(2)
    assert torch.get_num_threads() == 1, "the other thread is rank 1's"
    assert texts(shared) == texts(alone)
    assert texts(shared) == texts(alone)  # from the cache now
    done, expected = shared.engine.stats(), alone.engine.stats()
    assert done.operations_total == expected.operations_total
    assert done.bytes_read_total == pytest.approx(expected.bytes_read_total, rel=0.01)
    assert shared.info.num_ranks == 2
    weights = shared.loaded.team.weight_bytes if shared.loaded.team else ()
    assert len(weights) == 2
    assert shared.info.weight_bytes == sum(weights)
    # Of one memory: as many blocks as one process has, with half of the heads in each rank.
    assert shared.info.num_kv_blocks == alone.info.num_kv_blocks
    assert shared.info.kv_cache_bytes == alone.info.kv_cache_bytes
    # Norms are on both ranks, all else on one.
    assert 1.0 < shared.info.weight_bytes / alone.info.weight_bytes < 1.01
    assert shared.engine.embed((5, 6, 7), "mean") == pytest.approx(
        alone.engine.embed((5, 6, 7), "mean"), abs=1e-5
    )
    tokens = torch.randint(0, 4096, (2, 30))
    torch.testing.assert_close(
        shared.loaded.logits(tokens), alone.loaded.logits(tokens), rtol=0, atol=1e-4
    )

    assert shared.loaded.team is not None
    (pid,) = shared.loaded.team.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankLost, match=rf"rank 1 of 2 \(process {pid}\) was killed by SIGKILL"):
        texts(shared)
    with pytest.raises(RankLost, match="was killed"):
        shared.engine.embed((5,), "last")
    shared.close()
    assert is_gone(pid)
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {
            "speculative_config": {
                "method": "draft",
                "model": MODEL,
                "num_speculative_tokens": 3,
            }
        },
        # 128 tokens for 8 answers of 30: some are preempted.
        {"kv_cache_memory_bytes": 1_100_000, "max_model_len": 64},
    ],
    ids=["int8 cache", "ngram", "draft model", "preempted"],
)
def test_ranks_write_what_one_process_does_in_every_way_of_running(
    options: dict[str, Any],
) -> None:
    alone, shared = engine(1, **options), engine(2, **options)
    assert shared.loaded.team is not None
    pids = shared.loaded.team.pids
    assert texts(shared, n=2) == texts(alone, n=2)
    if "kv_cache_memory_bytes" in options:
        assert shared.engine.stats().num_preemptions > 0
    shared.close()
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.slow
def test_a_rank_killed_within_a_step_ends_the_step() -> None:
    """Stopped first, so that the others are waiting for it when it goes."""
    llm = engine(4)
    assert llm.loaded.team is not None
    *others, last = llm.loaded.team.pids
    assert texts(llm, max_tokens=4) == texts(engine(1), max_tokens=4)
    os.kill(last, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (last, signal.SIGKILL)).start()
    with pytest.raises(RankLost, match=rf"rank 3 of 4 \(process {last}\) was killed by SIGKILL"):
        texts(llm)
    assert all(is_gone(pid) for pid in others)  # before anybody closes anything
    llm.close()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_given_up_also_when_nothing_runs() -> None:
    """Within a time that ranks are heard of in on a busy machine, too."""
    llm = engine(2, distributed_timeout_seconds=30)
    team = llm.loaded.team
    assert team is not None
    heard = threading.Event()
    team.on_lost(lambda lost: heard.set())
    (pid,) = team.pids
    os.kill(pid, signal.SIGSTOP)
    assert heard.wait(300)
    with pytest.raises(RankLost, match=rf"rank 1 of 2 \(process {pid}.*not been heard of for 30 s"):
        texts(llm)
    assert "stopped" in str(team.lost)
    assert is_gone(pid)
    llm.close()


@pytest.mark.slow
def test_a_rank_that_fails_by_itself_says_why() -> None:
    llm = engine(2)
    team = llm.loaded.team
    assert team is not None
    heard: list[RankLost] = []
    team.on_lost(heard.append)
    team.tell(ClearBlocks(77, [1]))  # a runner that there is not
    with pytest.raises(RankLost, match="rank 1 of 2 failed: 77"):
        texts(llm)
    assert [str(lost) for lost in heard] == ["rank 1 of 2 failed: 77"]
    llm.close()


@pytest.mark.slow
def test_two_models_of_one_process_do_not_mix() -> None:
    first, second = engine(2), engine(2, dtype="bfloat16")
    expected = texts(engine(1))
    assert texts(second) == texts(second)
    assert texts(first) == expected
    closed = first.loaded
    first.close()
    with pytest.raises(RankLost, match="the model was closed"):
        closed.logits(torch.tensor([[5, 6]]))
    assert len(texts(second)) == len(PROMPTS)
    second.close()


@pytest.mark.slow
def test_ranks_end_with_rank_0_however_that_ends() -> None:
    program = (
        "from qtool import LLM\n"
        "import time\n"
        f"llm = LLM({MODEL!r}, tensor_parallel_size=3 - 1, max_model_len=64)\n"
        "print(*llm.loaded.team.pids, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(PYTHONSAFEPATH="1"),
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        process.kill()
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.slow
def test_what_keeps_a_rank_from_coming_is_said(tmp_path: Path) -> None:
    def errand(rank: int, meeting: Path) -> Errand:
        model = str(tmp_path / "nothing")
        return Errand(model, "float32", "cpu", None, "auto", rank, 2, str(meeting), "gloo", 1, 60)

    team = Team.start(2, errand, timeout_seconds=60)
    with pytest.raises(RankLost, match="rank 1 of 2 failed: no model at"):
        team.meet("gloo")
    team.stop()


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"device": "cuda", "num_devices": 2}, "4 GPUs, and this machine shows 2"),
        ({"device": "cuda", "num_devices": 4, "has_nccl": False}, "4 GPUs need NCCL"),
        ({"device": "cpu", "has_gloo": False}, "4 ranks on a CPU need gloo"),
    ],
)
def test_what_the_machine_lacks_is_said(found: dict[str, Any], problem: str) -> None:
    machine = {"num_devices": 8, "has_nccl": True, "has_gloo": True, **found}
    with pytest.raises(UsageError, match=problem) as caught:
        choose_backend(machine.pop("device"), 4, **machine)
    assert "--tensor-parallel-size" in str(caught.value.hint)


def test_the_backend_follows_the_device() -> None:
    machine: dict[str, Any] = {"num_devices": 4, "has_nccl": True, "has_gloo": True}
    assert choose_backend("cuda", 4, **machine) == "nccl"
    assert choose_backend("cpu", 4, **machine) == "gloo"


def test_memory_is_counted_for_all_ranks_on_a_cpu_and_for_one_on_a_gpu() -> None:
    """1000 bytes: weights of 900 fit into one CPU's memory or, a quarter each, into four GPUs of
    300.
    """
    on_cpu = MemoryBudget(1000, 0, "cpu", num_ranks=4)
    on_cpu.check_weights("m", 900)
    with pytest.raises(NotEnoughMemory, match="does not fit"):
        on_cpu.check_weights("m", 1001)
    MemoryBudget(300, 0, "cuda", num_ranks=4).check_weights("m", 900)
    with pytest.raises(NotEnoughMemory, match="at least 250 B"):
        MemoryBudget(240, 0, "cuda", num_ranks=4).check_weights("m", 1000)
