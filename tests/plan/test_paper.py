"""On paper: weights, cache and sizes are what transformers, the engine and our writers make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from qtool.api import quantize
from qtool.arch import ARCHITECTURES
from qtool.convert.formats import open_weights
from qtool.convert.gguf.options import GgufOptions
from qtool.convert.gguf_plan import plan_gguf
from qtool.errors import UnknownName, UnsupportedModel, UsageError
from qtool.runtime.engine.kv_pool import block_bytes
from qtool.runtime.loading import load_model
from qtool.runtime.plan.fit import Setting, check_shares, fit
from qtool.runtime.plan.hardware import find_gpu
from qtool.runtime.plan.paper import PaperModel, read_config
from qtool.runtime.plan.variants import find_variant, variants
from qtool.source import resolve

NATIVE = [name for name, row in ARCHITECTURES.items() if row.native]
# Meta's config of Llama 3.2 1B, and what its model card counts.
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama() -> PaperModel:
    return PaperModel.of("llama-1b", LLAMA_1B)


def test_llama_3_2_1b_by_hand(llama: PaperModel) -> None:
    block = 2048 * (2048 + 2 * 512 + 2048 + 3 * 8192) + 2 * 2048
    assert llama.num_weights == 128256 * 2048 + 16 * block + 2048 == 1_235_814_400
    # Keys and values of 8 heads of 64 in 16 layers, two bytes each.
    assert llama.kv_bytes_per_token() == 16 * 2 * 8 * 64 * 2
    # A byte each, and a float32 scale for each head.
    assert llama.kv_bytes_per_token(int8=True) == 16 * 2 * 8 * (64 + 4)
    # The head multiplies, looking up does not.
    assert llama.num_active_weights == 1_235_814_400 - 33 * 2048
    assert llama.attention_operations == 16 * 2 * 32 * 128


@pytest.mark.parametrize("family", NATIVE)
def test_weights_are_those_of_the_checkpoint(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(family)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        stored = sum(tensors.get_tensor(name).numel() for name in tensors.keys())
    assert PaperModel.of(*read_config(str(folder))).num_weights == stored


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v2"])
def test_the_cache_is_what_the_engine_makes(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(family)
    decoder = load_model(str(folder), dtype="bfloat16").decoder
    paper = PaperModel.of(*read_config(str(folder)))
    assert paper.kv_bytes_per_token() * 16 == block_bytes(decoder, 16)
    assert paper.kv_bytes_per_token(int8=True) * 16 == block_bytes(decoder, 16, "int8")


def test_an_int4_artifact_weighs_what_the_plan_says(tmp_path: Path) -> None:
    quantize("builtin:books-7m", recipe="rtn-int4", out=tmp_path / "int4")
    header = (tmp_path / "int4" / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + length])
    written = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in entries.items()
        # Two int64 a linear that say its shape: of no weight in a model that is not a toy.
        if name != "__metadata__" and not name.endswith("_shape")
    )
    model = PaperModel.of(*read_config("builtin:books-7m"))
    assert find_variant(model, "int4").num_bytes == written


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q4_0", "Q8_0", "Q2_K"])
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("qwen3_moe", {"norm_topk_prob": True})]
)
def test_a_gguf_file_weighs_what_the_plan_says(
    family: str, settings: dict[str, bool], file_type: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(family, **settings)
    exact = plan_gguf(open_weights(resolve(str(folder))), file_type, GgufOptions())
    found = find_variant(PaperModel.of(*read_config(str(folder))), f"gguf {file_type}")
    assert found.num_bytes == sum(tensor.info.nbytes for tensor in exact.tensors)


def test_every_form_is_smaller_than_bf16(llama: PaperModel) -> None:
    whole, *others = variants(llama)
    assert whole.num_bytes == 2 * llama.num_weights
    assert all(form.num_bytes < whole.num_bytes for form in others)


def test_windows_cut_what_is_read() -> None:
    config = {**LLAMA_1B, "model_type": "gemma2", "sliding_window": 1000}
    config |= {"query_pre_attn_scalar": 64, "layer_types": None}
    model = PaperModel.of("g", config)
    assert model.attended_tokens(800) == 800
    # Every other layer sees 1,000 of 3,000.
    assert model.attended_tokens(3000) == 2000


def test_memory_by_hand(llama: PaperModel) -> None:
    int4, gpu, setting = find_variant(llama, "int4"), find_gpu("l4"), Setting(max_num_seqs=8)
    found = fit(llama, int4, gpu, setting, 1000)
    left = 0.9 * 24e9 - 1e9 - int4.num_bytes - found.activation_bytes
    assert found.kv_tokens == int(left) // llama.kv_bytes_per_token()
    assert found.sequences == 8
    assert found.decode_tokens_per_second < 0.75 * 300e9 / (int4.num_bytes - 1)


@pytest.mark.parametrize(("num_gpus", "fits"), [(1, True), (2, True), (8, True), (16, True)])
def test_heads_are_shared_out(llama: PaperModel, num_gpus: int, fits: bool) -> None:
    check_shares(llama, num_gpus)


def test_heads_that_cannot_be_shared_are_refused(llama: PaperModel) -> None:
    with pytest.raises(UsageError, match="3 GPUs cannot share 32 heads") as caught:
        check_shares(llama, 3)
    assert "1, 2, 4, 8, 16, 32" in (caught.value.hint or "")


def test_a_config_alone_is_a_model(tmp_path: Path, llama: PaperModel) -> None:
    path = tmp_path / "llama-1b.json"
    path.write_text(json.dumps(LLAMA_1B))
    assert PaperModel.of(*read_config(str(path))) == llama


def test_what_is_not_known_is_refused_by_name(llama: PaperModel) -> None:
    with pytest.raises(UnknownName, match="GPU 'H1000'") as caught:
        find_gpu("H1000")
    assert "did you mean H100" in (caught.value.hint or "")
    with pytest.raises(UnknownName, match="int5"):
        find_variant(llama, "int5.5")
    with pytest.raises(UnsupportedModel, match="'gpt9'"):
        PaperModel.of("x", {**LLAMA_1B, "model_type": "gpt9"})


def test_reading_a_plan_loads_no_weights(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    copy = folder.parent / "config-only"
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert PaperModel.of(*read_config(str(copy))).num_weights > 0
