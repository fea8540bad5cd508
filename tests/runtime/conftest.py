"""transformers as the oracle: the same folders, in float32, through its own modelling code."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qtool import grid
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import FORMATS
from qtool.runtime.layers import PackingRules
from qtool.runtime.loading import LoadedModel
from qtool.runtime.random_model import QWEN_05B, random_model
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

Native = Callable[[int], LoadedModel]
Logits = Callable[[Path, Tensor], Tensor]
Greedy = Callable[[Path, Sequence[int], int], list[int]]


@functools.cache
def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def transformers_logits() -> Logits:
    """(folder, tokens [batch, tokens]) -> float32 [batch, tokens, vocab]"""

    def logits(folder: Path, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = _model(folder)(tokens).logits
        return found

    return logits


@pytest.fixture(scope="session")
def transformers_greedy() -> Greedy:
    """(folder, prompt ids, number of new tokens) -> what `generate` appends, end of text or not."""

    def greedy(folder: Path, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens = torch.tensor([list(prompt)])
        with torch.no_grad():
            found = _model(folder).generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids: list[int] = found[0, len(prompt) :].tolist()
        return ids

    return greedy


@pytest.fixture(scope="session")
def small_native() -> Native:
    """vocabulary -> a model by the native kernels, whose logits have the same bits whatever else is
    in a step."""

    def make(vocab_size: int) -> LoadedModel:
        config = {
            **QWEN_05B,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 512,
        }
        loaded = random_model(config, rules=PackingRules(activations="int8"))
        if not any(use.kernel.startswith("native") for use in loaded.kernels):
            # Machines without a compiler; the torch kernels' sums do differ in the last bits.
            pytest.skip("the native kernels cannot be built here")
        return loaded

    return make


@pytest.fixture(scope="session")
def packed_checkpoint() -> Callable[[Path, Path, str], Path]:
    """(folder, out, scheme) -> out, the checkpoint with the linears of its blocks packed."""

    def pack(folder: Path, out: Path, word: str) -> Path:
        scheme = QuantScheme.parse(word)
        source = Checkpoint.open(folder)
        tensors: dict[str, Tensor] = {}
        packed: dict[str, QuantScheme] = {}
        for name in source.tensors:
            values = source.tensor(name)
            module = name.removesuffix(".weight")
            if values.ndim != 2 or ".layers." not in name:
                tensors[name] = values
                continue
            found = grid.fit(values.float(), scheme)
            zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
            codes = grid.codes(values.float(), found, scheme)
            weight = QuantizedWeight(codes, found.scales, zeros, scheme)
            parts = FORMATS["compressed-tensors"].pack(weight, values.dtype)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            packed[module] = scheme
        shutil.copytree(folder, out)
        save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        described = FORMATS["compressed-tensors"].quantization_config(packed, ["lm_head"])
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
        return out

    return pack
