"""The native path: one call for all blocks, equal to the decoder's own operations, and a token's
logits have the same bits whatever else is in the step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.convert.run import convert_model
from qtool.kernels.cpu.native import load
from qtool.kernels.reference import Span
from qtool.native_build import Missing
from qtool.runtime.config import EngineConfig, KvCacheDtype
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.llm import LLM
from qtool.runtime.loading import LoadedModel, load_model
from qtool.runtime.models.decoder import Decoder
from qtool.runtime.models.native import NativeDecoder, why_not

BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load()
    if isinstance(found, Missing):
        pytest.skip(f"native {found.reason}")
    monkeypatch.setenv("QTOOL_ACTIVATIONS", "int8")


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4000, (length,), generator=generator).tolist()


def to_gguf(folder: Path, out: Path, type: str = "Q8_0") -> Path:
    return convert_model(str(folder), to="gguf", type=type, out=out)


def batch(parts: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> Batch:
    """(tokens, position of the first, blocks) of each sequence; every row's logits are wanted."""
    ids = [token for part, _, _ in parts for token in part]
    positions = [start + i for part, start, _ in parts for i in range(len(part))]
    return Batch(
        token_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=tuple(Span(len(part), start + len(part), table) for part, start, table in parts),
        sampled_rows=torch.arange(len(ids)),
        row_ranges=(),
    )


def runner(loaded: LoadedModel, kv_cache_dtype: KvCacheDtype = "auto") -> ModelRunner:
    return ModelRunner(
        loaded.decoder, num_blocks=80, block_size=BLOCK_SIZE, kv_cache_dtype=kv_cache_dtype
    )


@pytest.fixture(scope="module")
def model(books_7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(books_7m, tmp_path_factory.mktemp("native") / "model.gguf")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_tokens_logits_have_the_same_bits_in_any_step(
    model: Path, kv_cache_dtype: KvCacheDtype
) -> None:
    """50 tokens at once, in chunks, one by one; and beside 7 and 31 other sequences."""
    loaded = load_model(str(model))
    assert isinstance(loaded.decoder, Decoder)
    assert why_not(loaded.decoder) is None
    text, table = tokens(50), [70, 3, 60, 9]

    def run(chunks: Sequence[int], company: int = 0) -> Tensor:
        steps, found, start = runner(loaded, kv_cache_dtype), [], 0
        for size in chunks:
            others = [(tokens(1, seed=i + 1), 0, [10 + i]) for i in range(company)]
            own = (text[start : start + size], start, table)
            found.append(steps.run(batch([*others[: company // 2], own, *others[company // 2 :]])))
            found[-1] = found[-1][company // 2 :][:size]
            start += size
        return torch.cat(found)

    expected = run([50])
    assert bool(expected.isfinite().all())
    for chunks, company in (([8, 32, 10], 0), ([1] * 50, 0), ([30, 20], 7), ([49, 1], 31)):
        assert torch.equal(run(chunks, company), expected), (chunks, company)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "phi3", "smollm3"]
)
def test_the_one_call_computes_what_the_operations_do(
    family: str,
    tiny_checkpoint: Callable[..., Path],
    packed_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """In float32, where both differ by little more than the order of sums."""
    folder = packed_checkpoint(tiny_checkpoint(family), tmp_path / "model", "int8-g32-sym")
    loaded = load_model(str(folder), dtype="float32")
    decoder = loaded.decoder
    assert isinstance(decoder, Decoder)
    assert why_not(decoder) is None
    expected = loaded.logits(torch.tensor([tokens(40)]))[0]
    found = runner(loaded).run(batch([(tokens(40), 0, [5, 2, 7])]))
    error = float((found - expected).norm() / expected.norm())
    # Activations that lie between two of 255 steps may be rounded to either.
    assert error < 2e-2
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert float(agree) > 0.8


def test_what_the_library_does_not_have_is_named(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(family: str, dtype: str = "bfloat16") -> str | None:
        decoder = load_model(str(tiny_checkpoint(family)), dtype=dtype).decoder  # type: ignore[arg-type]
        assert isinstance(decoder, Decoder)
        return why_not(decoder)

    assert reason("mixtral") == "experts are not in the library"
    assert (reason("llama") or "").startswith("qkv runs by ")
    assert reason("llama", "float16") == "the library computes in bfloat16 or float32, not float16"


def test_greedy_text_is_the_same_in_any_company(model: Path) -> None:
    """Alone, among 31 others, without a prefix cache, and with a cache that makes answers wait."""
    prompts = [tokens(3 + 5 * (i % 7), seed=i) for i in range(32)]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def answers(some: Sequence[list[int]], **options: object) -> list[tuple[int, ...]]:
        config = EngineConfig(str(model), max_model_len=128, **options)  # type: ignore[arg-type]
        llm = LLM.from_loaded(load_model(str(model)), config)
        found = llm.generate(list(some), sampling, use_tqdm=False)
        return [answer.outputs[0].token_ids for answer in found]

    together = answers(prompts)
    assert answers(prompts, enable_prefix_caching=False, max_num_batched_tokens=13) == together
    for i in (0, 6, 31):
        assert answers([prompts[i]]) == [together[i]]
    assert answers(prompts[:8], max_num_seqs=3) == together[:8]


def test_a_bound_decoder_says_its_vocabulary(model: Path) -> None:
    loaded = load_model(str(model))
    assert isinstance(loaded.decoder, Decoder)
    steps = runner(loaded)
    bound = NativeDecoder(loaded.decoder, steps.pool.layers, BLOCK_SIZE)
    assert bound.vocab_size == loaded.decoder.vocab_size
