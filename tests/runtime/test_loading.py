"""What cannot be loaded is named before anything is read; what was decided can be read."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.errors import FormatError, QtoolError, UnsupportedModel, UsageError
from qtool.runtime.loading import choose_device, choose_dtype, load_model
from qtool.runtime.models.decoder import Decoder

CPU = torch.device("cpu")


@pytest.fixture
def edited(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint with its tensors and config changed."""

    def edit(
        family: str = "qwen2",
        *,
        tensors: Callable[[dict[str, Tensor]], object] = lambda found: None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_checkpoint(family), folder)
        found = load_file(str(folder / "model.safetensors"))
        tensors(found)
        save_file(found, str(folder / "model.safetensors"), metadata={"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return edit


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, edited: Callable[..., Path]) -> None:
    folder = edited(tensors=lambda found: found.pop(name))
    with pytest.raises(FormatError, match=f"{name} is missing"):
        load_model(str(folder))


def test_wrong_shapes_are_named_all_together(edited: Callable[..., Path]) -> None:
    def cut(found: dict[str, Tensor]) -> None:
        for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.bias"):
            found[name] = found[name][:-1].contiguous()

    with pytest.raises(FormatError) as raised:
        load_model(str(edited(tensors=cut)))
    message = raised.value.message
    assert "model.layers.0.mlp.down_proj.weight has shape [255, 512], not [256, 512]" in message
    assert "model.layers.1.self_attn.q_proj.bias has shape [255], not [256]" in message
    assert raised.value.hint is not None


def test_a_config_of_another_model_is_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match=r"layers\.2\.\S+ is missing; .* and \d+ more"):
        load_model(str(edited(num_hidden_layers=3, layer_types=None)))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "bloom cannot be served: its attention does not go through"),
        ("mamba", "mamba cannot be served: its layers carry a state"),
        ("t5", "t5 is not a family of causal language models"),
        ("qwen4", "'qwen4' is neither one of the native decoder's nor of transformers'"),
    ],
)
def test_families_that_cannot_be_served_are_refused_with_the_reason(
    family: str, message: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=message) as refused:
        load_model(str(edited(model_type=family)))
    assert refused.value.hint or "causal language models" in message


def test_every_failure_to_find_a_model_is_the_users_to_read() -> None:
    for name in ("./nowhere", "builtin:books-8m"):
        with pytest.raises(QtoolError):
            load_model(name)


@pytest.mark.parametrize(
    ("asked", "model", "chosen", "reason"),
    [
        ("auto", "bfloat16", torch.bfloat16, "as the model"),
        ("auto", "float32", torch.float32, "as the model"),
        ("auto", "float16", torch.bfloat16, "CPUs are slow at"),
        ("auto", "float64", torch.bfloat16, "the model is float64"),
        ("float32", "bfloat16", torch.float32, "as asked"),
        ("float16", "float16", torch.float16, "as asked"),
    ],
)
def test_the_dtype_is_chosen_with_a_reason(
    asked: Any, model: str, chosen: torch.dtype, reason: str
) -> None:
    dtype, why = choose_dtype(asked, model, CPU)
    assert dtype == chosen
    assert reason in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("auto") == CPU
    with pytest.raises(UsageError, match="finds no CUDA device"):
        choose_device("cuda")


def test_the_table_at_the_start_says_what_runs_where(edited: Callable[..., Path]) -> None:
    loaded = load_model(str(edited()), dtype="bfloat16")
    console = Console(width=160, file=io.StringIO())
    with console.capture() as shown:
        console.print(loaded.kernel_table())
    text = " ".join(shown.get().split())
    assert "model: qwen2, dense, 6.6 MB" in text
    assert "bfloat16 on cpu (as asked)" in text
    assert "q k v o gate up down" in text
    assert "dense" in text


def test_memory_counts_each_weight_once(tiny_checkpoint: Callable[..., Path]) -> None:
    tied = load_model(str(tiny_checkpoint("llama", tie_word_embeddings=True)))
    apart = load_model(str(tiny_checkpoint("llama")))
    assert apart.nbytes - tied.nbytes == 4096 * 256 * 4
    assert apart.nbytes == sum(
        tensor.nbytes for tensor in load_file(str(apart.source.path / "model.safetensors")).values()
    )
    assert isinstance(tied.decoder, Decoder)
    assert tied.decoder.head_is_embedding
    assert tied.decoder.looked_up_bytes == 0
