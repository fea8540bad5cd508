"""Ranks that run the kernels of a GPU, interpreted: the same logits as one process, also recorded.

Ranks are threads that take turns, as the interpreter serves one at a time; a sum adds their parts
in the order of the ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.convert.formats import open_weights
from qtool.kernels import dispatch
from qtool.kernels.dispatch import Choice
from qtool.kernels.reference import Span
from qtool.runtime import layers
from qtool.runtime.engine import gpu_steps
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.graphs import Replay
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.loading import load_model
from qtool.runtime.models import triton_decoder
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.load import NativePlan, plan_decoder
from qtool.runtime.parallel.layers import Ranks
from qtool.runtime.parallel.shard import Shard
from qtool.settings import Activations
from qtool.source import resolve
from qtool.weights import QuantizedWeight, Weight

BLOCK_SIZE = 16
# Of float32 sums in another order, through two blocks.
TOLERANCE = 1e-4


class Turns:
    """What ranks exchange: one thread computes at a time, and gives way where it waits."""

    def __init__(self, size: int) -> None:
        self.computing = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.parts: dict[int, Tensor] = {}
        self.num_sums = 0

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks."""
        self.parts[rank] = tensor.clone()
        self.wait()
        found = [self.parts[each] for each in sorted(self.parts)]
        self.wait()
        return found

    def wait(self) -> None:
        self.computing.release()
        try:
            self.barrier.wait()
        finally:
            self.computing.acquire()


class Rank:
    """A `Collective`."""

    def __init__(self, turns: Turns, rank: int) -> None:
        self._turns, self._rank = turns, rank

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._turns.num_sums += self._rank == 0
        first, *others = self._turns.exchange(self._rank, tensor)
        return tensor.copy_(sum(others, first.clone()))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        parts = self._turns.exchange(self._rank, tensor)
        return parts if self._rank == 0 else []


def choose_marlin(
    weight: Weight, dtype: torch.dtype, device: torch.device, activations: Activations | None
) -> Choice:
    """As on a GPU."""
    name = "marlin" if isinstance(weight, QuantizedWeight) else "dense"
    return Choice(next(row for row in dispatch.KERNELS if row.name == name), "")


def record(compute: Callable[[], None]) -> Replay:
    """What a recording does: the same again."""
    return compute


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(layers, "choose", choose_marlin)
    monkeypatch.setattr(triton_decoder, "obstacle", lambda device: None)
    monkeypatch.setattr(gpu_steps, "CudaRecorder", lambda: record)


def step(ids: list[int], start: int) -> Batch:
    return Batch(
        token_ids=torch.tensor(ids),
        positions=torch.arange(start, start + len(ids)),
        spans=(Span(len(ids), start + len(ids), [3, 1]),),
        sampled_rows=torch.tensor([len(ids) - 1]),
        row_ranges=(),
    )


def logits_of_rank(turns: Turns, model: Path, rank: int, size: int, text: list[int]) -> Tensor:
    """Of the last row of each step: a prompt in two chunks, then two recorded steps."""
    try:
        with turns.computing, torch.inference_mode():
            plan = plan_decoder(open_weights(resolve(str(model))))
            assert isinstance(plan, NativePlan)
            ranks = Ranks(plan.shard(Shard(rank, size)), Rank(turns, rank))
            decoder = plan.load(torch.float32, torch.device("cpu"), ranks=ranks).model
            assert isinstance(decoder, Decoder)
            assert triton_decoder.why_not(decoder) is None
            steps = ModelRunner(
                decoder.for_context(64),
                num_blocks=4,
                block_size=BLOCK_SIZE,
                max_model_len=64,
                max_num_seqs=1,
            )
            found = [steps.run(step(text[:9], 0)), steps.run(step(text[9:18], 9))]
            for place in (18, 19):
                found.append(steps.run(step(text[place : place + 1], place)).clone())
            assert steps.gpu is not None
            assert steps.gpu.graphs is not None
            assert steps.gpu.graphs.sizes == (1,)
            return torch.cat(found)
    except BaseException:
        turns.barrier.abort()
        raise


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_fused_ranks_compute_what_one_process_does(
    tiny_checkpoint: Callable[..., Path],
    packed_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    size = 2
    folder = packed_checkpoint(tiny_checkpoint("qwen2"), tmp_path / "model", "int4-g64-asym")
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, 4000, (20,), generator=generator).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "choose", dispatch.choose)
        whole = load_model(str(folder), dtype="float32", device="cpu")
        expected = whole.logits(torch.tensor([text]))[0, [8, 17, 18, 19]]
    turns = Turns(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [
            pool.submit(logits_of_rank, turns, folder, rank, size, text) for rank in range(size)
        ]
        found, other = (rank.result() for rank in ranks)
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE
    assert other.shape == (4, 2048)  # its own tokens'
    # The embedding's and two a block, in two chunks and two replays.
    assert turns.num_sums == 4 * (2 * 2 + 1)
