"""llama.cpp's logits from files written here, beside those of this project's runtime.

    pip install llama-cpp-python && pytest tests/interop

The two do not compute alike: llama.cpp rounds the inputs of a quantized linear to 8 bits, the
runtime keeps them in its own type. What either rounding costs is measured, not guessed:

    theirs   llama.cpp on a file  against  llama.cpp on its weights decoded to float32
    ours     the runtime in bfloat16  against  the runtime in float32

In float32 on decoded weights both agree to the order of sums. In bfloat16 they may be as far apart
as the two roundings together: divergence is quadratic in the error, and (a + b)² <= 2 (a² + b²).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.convert.run import convert_model
from qtool.errors import UnsupportedModel
from qtool.runtime.loading import load_model
from qtool.source import Source

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

AsGguf = Callable[[Path, str], Path]

GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "query_pre_attn_scalar": 64}
# Every family of the table, with what its tiny model needs beside the defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 256},
    "qwen3": {},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 256},
    "gemma": {"head_dim": 64, **GEMMA},
    "gemma2": GEMMA,
    "gemma3_text": {
        **GEMMA,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt2": {"tie_word_embeddings": True},
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["full_attention"] * 4,
    },
    "olmo2": {},
    "starcoder2": {},
    "granite": {},
    "deepseek_v2": {"moe_intermediate_size": 256},
    "deepseek_v3": {"moe_intermediate_size": 256},
}


def logits_of_llama_cpp(path: Path, token_ids: Tensor) -> Tensor:
    """float32 [tokens, vocab], with a cache in float32."""
    count = token_ids.shape[1]
    model = llama_cpp.Llama(
        str(path),
        n_ctx=count,
        verbose=False,
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    model.eval(token_ids[0].tolist())
    return torch.from_numpy(model.scores[:count].copy())


def logits_of_runtime(path: Path, token_ids: Tensor, dtype: str) -> Tensor:
    return load_model(str(path), dtype=dtype).logits(token_ids)[0]  # type: ignore[arg-type]


def divergence(found: Tensor, wanted: Tensor) -> float:
    """Mean KL divergence in nats of `found` from `wanted`, over positions."""
    log_found, log_wanted = found.double().log_softmax(-1), wanted.double().log_softmax(-1)
    return float((log_wanted.exp() * (log_wanted - log_found)).sum(-1).mean())


@pytest.mark.slow
def test_our_logits_are_those_of_llama_cpp_for_a_file_of_each_type(
    file_type: str, books_7m: Path, as_gguf: AsGguf, token_ids: Tensor
) -> None:
    file = as_gguf(books_7m, file_type)
    rounded = logits_of_llama_cpp(file, token_ids)
    exact = logits_of_llama_cpp(as_gguf(file, "F32"), token_ids)
    ours = {name: logits_of_runtime(file, token_ids, name) for name in ("float32", "bfloat16")}
    assert (ours["float32"] - exact).abs().max() < 2e-3
    noise = divergence(rounded, exact) + divergence(ours["bfloat16"], ours["float32"])
    apart = divergence(ours["bfloat16"], rounded)
    assert apart <= 2 * noise + 1e-6
    assert apart < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_runs_quantized_files_of_every_family(
    family: str,
    type: str,
    tiny_checkpoint: Callable[..., Path],
    as_gguf: AsGguf,
    token_ids: Tensor,
    tmp_path: Path,
) -> None:
    """Against the runtime, or transformers on what comes back for families that it does not run."""
    file = as_gguf(tiny_checkpoint(family, **FAMILIES[family]), type)
    rounded = logits_of_llama_cpp(file, token_ids)
    try:
        wanted = logits_of_runtime(file, token_ids, "float32")
    except UnsupportedModel:
        wanted = logits_of_transformers(file, token_ids, tmp_path / "back")
    exact = logits_of_llama_cpp(as_gguf(file, "F32"), token_ids)
    # its GELU is a table in half precision
    assert (exact - wanted).abs().max() < (1e-2 if family.startswith("gemma") else 2e-3)
    assert divergence(rounded, wanted) <= 1.5 * divergence(rounded, exact) + 1e-6
    assert divergence(rounded, wanted) < 1e-2  # six layers of random weights make noise grow


def logits_of_transformers(file: Path, token_ids: Tensor, folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    convert_model(Source("tiny", file), to="hf", type="f32", out=folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(token_ids).logits
    return logits[0]
