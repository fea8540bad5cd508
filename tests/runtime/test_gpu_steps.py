"""Steps on a GPU, by the interpreter where there is none: fused, recorded, drawn on the device.

Weights are in float32, where fused and plain operations differ by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.kernels import dispatch
from qtool.kernels.cuda import marlin_linear
from qtool.kernels.cuda.sampling import Draw
from qtool.kernels.dispatch import Choice
from qtool.kernels.reference import Span
from qtool.runtime import layers
from qtool.runtime.config import EngineConfig, KvCacheDtype
from qtool.runtime.engine import gpu_steps
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.graphs import Inputs, Replay, sizes_for
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.models import triton_decoder
from qtool.runtime.models.decoder import Decoder
from qtool.settings import Activations
from qtool.weights import QuantizedWeight, Weight

BLOCK_SIZE = 16
CPU = torch.device("cpu")
# Of float32 sums in another order, through two blocks.
TOLERANCE = 1e-4


def _choose(
    weight: Weight, dtype: torch.dtype, device: torch.device, activations: Activations | None
) -> Choice:
    """As on a GPU."""
    marlin = next(row for row in dispatch.KERNELS if row.name == "marlin")
    if isinstance(weight, QuantizedWeight):
        assert marlin_linear.refuses_shape(weight.scheme, weight.shape) is None
        return Choice(marlin, "")
    dense = next(row for row in dispatch.KERNELS if row.name == "dense")
    return Choice(dense, "")


def record(compute: Callable[[], None]) -> Replay:
    """What a recording does: the same again."""
    return compute


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded and run as on a GPU, kernels being interpreted."""
    pytest.importorskip("triton")
    monkeypatch.setattr(layers, "choose", _choose)
    monkeypatch.setattr(triton_decoder, "obstacle", lambda device: None)
    monkeypatch.setattr(gpu_steps, "CudaRecorder", lambda: record)


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4000, (length,), generator=generator).tolist()


Part = tuple[Sequence[int], int, Sequence[int]]


def batch(*parts: Part, sampled: Sequence[int] | None = None) -> Batch:
    """(tokens, position of the first, blocks) of each sequence; sampled: rows, or all."""
    ids = [token for part, _, _ in parts for token in part]
    positions = [start + i for part, start, _ in parts for i in range(len(part))]
    return Batch(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=tuple(Span(len(part), start + len(part), table) for part, start, table in parts),
        sampled_rows=torch.arange(len(ids)) if sampled is None else torch.tensor(sampled).long(),
        row_ranges=(),
    )


def runner(loaded: LoadedModel, kind: KvCacheDtype = "auto", *, eager: bool = True) -> ModelRunner:
    return ModelRunner(
        loaded.decoder,
        num_blocks=16,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kind,
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=eager,
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def two(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., Path],
    packed_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> tuple[LoadedModel, LoadedModel]:
    """A model loaded as on a GPU, and the same weights for PyTorch's operations."""
    family, scheme = getattr(request, "param", ("llama", "int4-g128-sym"))
    folder = packed_checkpoint(tiny_checkpoint(family), tmp_path / "model", scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "choose", dispatch.choose)
        plain = load_model(str(folder), dtype="float32", device="cpu")
    return load_model(str(folder), dtype="float32", device="cpu"), plain


def check(gpu: LoadedModel, plain: LoadedModel, kind: KvCacheDtype = "auto") -> None:
    """A prompt in two chunks, then a step in which two sequences decode beside a prompt."""
    assert isinstance(gpu.decoder, Decoder)
    text, other = tokens(21), tokens(6, seed=1)  # two blocks, and one
    steps = runner(gpu, kind)
    assert steps.gpu is not None
    table, second = [7, 3], [5, 1]
    none = steps.run(batch((text[:9], 0, table), sampled=[]))
    assert none.shape == (0, gpu.decoder.vocab_size)
    found = [steps.run(batch((text[9:20], 9, table), (other[:5], 0, second), sampled=[10, 15]))]
    found.append(
        steps.run(batch((text[20:], 20, table), (other[5:], 5, second), ([9, 8, 7], 0, [2])))
    )
    logits = [plain.logits(torch.tensor([ids]))[0] for ids in (text, other, [9, 8, 7])]
    expected = [
        torch.stack((logits[0][19], logits[1][4])),
        torch.cat((logits[0][20:], logits[1][5:], logits[2])),
    ]
    for one, other_one in zip(found, expected, strict=True):
        assert relative_error(one, other_one) < (TOLERANCE if kind == "auto" else 2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_fused_steps_compute_what_the_operations_do(two: tuple[LoadedModel, LoadedModel]) -> None:
    assert isinstance(two[0].decoder, Decoder)
    assert triton_decoder.why_not(two[0].decoder) is None
    check(*two)


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "two",
    [
        ("qwen2", "int4-g64-asym"),
        ("gemma2", "int4-g32-sym"),
        ("qwen3_moe", "int8-row-sym"),
    ],
    indirect=True,
    ids=lambda pair: "-".join(pair),
)
def test_every_wiring_of_blocks(two: tuple[LoadedModel, LoadedModel]) -> None:
    check(*two)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        pytest.param(
            "olmo2", "a norm over all heads is not fused", marks=pytest.mark.slow, id="olmo2"
        ),
        ("starcoder2", "layer norms are not fused"),
    ],
)
def test_what_is_not_fused_is_named_and_runs_with_the_same_attention(
    family: str, reason: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = str(tiny_checkpoint(family))
    loaded = load_model(folder, dtype="float32", device="cpu")
    assert isinstance(loaded.decoder, Decoder)
    assert triton_decoder.why_not(loaded.decoder) == reason
    check(loaded, loaded)


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_a_cache_in_8_bits(two: tuple[LoadedModel, LoadedModel]) -> None:
    check(*two, kind="int8")


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_a_recorded_step_serves_every_smaller_batch(
    two: tuple[LoadedModel, LoadedModel],
) -> None:
    eager, recorded = runner(two[0]), runner(two[0], eager=False)
    prompts = [tokens(length, seed=length) for length in (4, 17, 3)]
    tables = [[4], [9, 2], [11]]
    prefill = batch(*((ids, 0, table) for ids, table in zip(prompts, tables, strict=True)))
    for steps in (eager, recorded):
        steps.run(prefill)
    assert recorded.gpu is not None
    graphs = recorded.gpu.graphs
    assert graphs is not None
    assert graphs.sizes == ()
    # Two after three, so that the third's numbers are left over from before.
    for count, seed in ((3, 1), (2, 2)):
        step = batch(
            *(
                (tokens(1, seed=seed + row), len(prompts[row]) + seed - 1, tables[row])
                for row in range(count)
            )
        )
        expected = eager.run(step)
        assert relative_error(recorded.run(step), expected) < 1e-6
        assert recorded.gpu is not None
        found, finite = recorded.gpu.draw(step, [Draw()] * count)
        assert found.tolist() == expected.argmax(-1).tolist()
        assert finite.tolist() == [1] * count
    assert graphs.sizes == (2, 4)
    # The third sequence's cache was not touched by the step without it.
    for mine, theirs in zip(recorded.pool.layers, eager.pool.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_an_engine_launches_recorded_steps_ahead(two: tuple[LoadedModel, LoadedModel]) -> None:
    """Beside one that waits for each step and, for log-probabilities, draws on the host."""
    asked = {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.5, "max_tokens": 3}

    def run(ahead: bool) -> tuple[dict[str, list[int]], Engine]:
        engine = Engine(
            two[0],
            EngineConfig(
                "tiny", block_size=16, max_num_seqs=2, max_model_len=64, async_scheduling=ahead
            ),
        )
        sampling = SamplingParams(**asked, ignore_eos=True, logprobs=None if ahead else 0)
        for name in "ab":
            engine.add(GenerationRequest(name, tuple(tokens(4, seed=ord(name))), sampling))
        found: dict[str, list[int]] = {"a": [], "b": []}
        while engine.has_work:
            for output in engine.step():
                found[output.request_id].extend(output.new_token_ids)
        engine.blocks.check()
        return found, engine

    found, engine = run(ahead=True)
    expected, _ = run(ahead=False)
    assert found == expected
    assert engine.stats().steps_launched_ahead_total == 2


def test_pages_are_written_when_they_change() -> None:
    """A sequence that grows, one that takes its place, and one with fewer pages of the same."""
    inputs = Inputs.empty(2, 8, CPU)

    def fill(length: int, *block_ids: int) -> list[int]:
        step = Batch(
            token_ids=torch.tensor([5]),
            positions=torch.tensor([length - 1]),
            spans=(Span(1, length, block_ids),),
            sampled_rows=torch.tensor([0]),
            row_ranges=(),
        )
        inputs.fill(step, [Draw(temperature=0.5, number=0.25)], BLOCK_SIZE)
        return inputs.pages[0, : len(block_ids)].tolist()

    assert fill(16, 7) == [7]
    assert inputs.longs[:, 0].tolist() == [5, 15, 7 * 16 + 15]
    assert fill(17, 7, 3) == [7, 3]
    assert fill(33, 7, 4, 9) == [7, 4, 9]
    assert fill(5, 7) == [7]
    assert fill(20, 7, 8) == [7, 8]
    # The row beside it has no tokens, and draws the likeliest of what it computes.
    assert inputs.longs[:, 1].tolist() == [0, 0, -1]
    assert inputs.ints[:, 1].tolist() == [0, 0]
    assert inputs.floats.t().tolist() == [[0.5, 1.0, 0.0, 1.0, 0.25], [0.0, 1.0, 0.0, 1.0, 0.0]]


def test_sizes_end_with_the_first_that_holds_every_batch() -> None:
    assert sizes_for(1) == (1,)
    assert sizes_for(3) == sizes_for(4) == (1, 2, 4)
    assert sizes_for(9) == (1, 2, 4, 8, 16)
    assert sizes_for(64)[-1] == 64
    assert sizes_for(1000)[-1] == 256
