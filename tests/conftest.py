"""Fixtures every folder shares: the bundled model, optional shared data, tiny real checkpoints.

A tiny checkpoint is a seeded, randomly initialised two-block model of a real family, made by
transformers' own config class and saved as a Hugging Face folder with the bundled tokenizer. Tests
run the real thing on it; nothing is mocked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.builtin import builtin_model
from qtool.native_build import InstructionSet, Unavailable, find_compiler, find_instruction_set
from qtool.settings import child_environment

PROJECT = Path(__file__).parent.parent

if not torch.cuda.is_available():
    # Triton decides when it is imported whether kernels are compiled or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}
_SLIDING: dict[str, Any] = {
    "head_dim": 64,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}

# What a family needs beyond TINY, or under other names. Sizes keep every row a multiple of 64. The
# families differ in how a block is wired: parallel attention, norms after, Conv1D, fused
# projections, learned positions, sliding windows, experts, latent attention.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "deepseek_v2": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 512},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 32},
    "gemma3_text": _SLIDING,
    "gemma4_text": {
        **_SLIDING,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "head_dim": 64,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 32,
    },
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "phi": {},
    "phi3": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 256, **_EXPERTS},
    "qwen3_5_text": {
        "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "qwen3_moe": {"head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], **_EXPERTS},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """No test leaves others with more threads of torch than there were, or fewer."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def run_sanitized(tmp_path: Path) -> Callable[..., str]:
    """Compile a harness with C++ sources under the address and undefined-behaviour sanitizers, run
    it, and return what it printed. Skips where the CPU, the compiler or its sanitizers are missing.
    """

    def run(
        harness: Path,
        sources: Path,
        flags: Sequence[str],
        isa: InstructionSet,
        instruction_sets: Sequence[InstructionSet],
    ) -> str:
        try:
            find_instruction_set(tuple(instruction_sets), isa.name)
            compiler, _ = find_compiler()
        except Unavailable as reason:
            pytest.skip(str(reason))
        program = tmp_path / "harness"
        checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        files = [str(harness), *map(str, sources.glob("*.cpp"))]
        made = subprocess.run(
            [compiler, *flags, *checks, f"-I{sources}", *files, "-o", str(program)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "cannot find -lasan" in made.stderr or "cannot find -lubsan" in made.stderr:
            pytest.skip("the compiler comes without its sanitizers")
        assert made.returncode == 0, made.stderr
        environment = child_environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
        ran = subprocess.run(
            [program], capture_output=True, text=True, check=False, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


@pytest.fixture(scope="session")
def books_7m() -> Path:
    """The bundled model's folder."""
    return builtin_model("books-7m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger real data beside the checkout; tests that need it say so where it is absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: this test needs data that the project does not ship")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """stories260K, a real Llama of 260,032 parameters whose down_proj rows are 172 wide."""
    return shared_data / "models" / "stories260K-hf"


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, books_7m: Path
) -> Callable[..., Path]:
    """``tiny_checkpoint("qwen2", num_hidden_layers=3)`` -> a model folder, made once a session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, *, dtype: str = "float32", **overrides: Any) -> Path:
        key = json.dumps([family, dtype, overrides], sort_keys=True)
        folder = root / f"{family}-{abs(hash(key)):x}"
        if not folder.exists():
            settings = {**TINY, **FAMILIES.get(family, {}), **overrides}
            _save_tiny_model(family, settings, getattr(torch, dtype), folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(books_7m / name, folder / name)
        return folder

    return make


def _save_tiny_model(
    family: str, settings: dict[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = AutoModelForCausalLM.from_config(config)
        # Norm gains and biases start at one and zero; spread them, so that a lost one is seen.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.to(dtype).save_pretrained(folder)


@pytest.fixture(scope="session")
def same_in_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``same_in_ranks(model, size)`` asserts that ranks compute what one process does, in float32:
    logits within 1e-4, and the same greedy text. Ranks are threads here, gloo between them is real.
    """
    from qtool.runtime.loading import load_model

    def check(model: Path, size: int, *, num_new: int = 12) -> None:
        loaded = load_model(str(model), dtype="float32")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 4096, (2, 20), generator=generator)
        for _ in range(num_new):
            likeliest = loaded.logits(tokens)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, likeliest), dim=1)
        expected = loaded.logits(tokens)
        meeting = tmp_path_factory.mktemp("ranks") / "meeting"
        with ThreadPoolExecutor(size) as pool:
            several = [
                pool.submit(_logits_of_rank, model, rank, size, meeting, tokens)
                for rank in range(size)
            ]
            found, *_ = [rank.result() for rank in several]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        written = slice(-num_new - 1, -1)
        assert torch.equal(found[:, written].argmax(-1), tokens[:, -num_new:])

    return check


def _logits_of_rank(
    model: Path, rank: int, size: int, meeting: Path, tokens: torch.Tensor
) -> torch.Tensor:
    from qtool.convert.formats import open_weights
    from qtool.runtime.models.load import plan_decoder
    from qtool.runtime.models.model import causal_hidden
    from qtool.runtime.parallel.layers import Ranks
    from qtool.runtime.parallel.process_group import ProcessGroup
    from qtool.runtime.parallel.shard import Shard
    from qtool.source import resolve

    plan = plan_decoder(open_weights(resolve(str(model))))
    parts = plan.shard(Shard(rank, size))
    ranks = Ranks(parts, ProcessGroup(rank, size, meeting, "gloo", timeout_seconds=300))
    with torch.inference_mode():
        loaded = plan.load(torch.float32, torch.device("cpu"), ranks=ranks)
        hidden = causal_hidden(loaded.model, tokens)
        logits = loaded.model.logits(hidden.flatten(0, 1))
    # Of other ranks than 0 these are the logits of their own tokens.
    return logits.view(*tokens.shape, -1)
